"""What is wrong with the arguments of the loss, beyond what the op itself says."""

from __future__ import annotations

import torch
from torch import Tensor

from contaccum_ext import validation
from contaccum_ext.bank import DualMemoryBank


def value_of(temperature: Tensor) -> float:
    """The value of a temperature that is a tensor; the host waits for it."""
    if not temperature.is_floating_point():
        raise TypeError(f"temperature: expected a floating tensor, got {temperature.dtype}")
    if temperature.numel() != 1:
        raise ValueError(f"temperature: expected one element, got shape {tuple(temperature.shape)}")
    return validation.positive("temperature", temperature.item())


def check_arguments(queries, passages, bank, passage_ids) -> None:
    """What the op cannot say as well: kinds of object, devices, ids given sometimes."""
    if bank is not None:
        validation.instance("bank", bank, DualMemoryBank)
        bank.check_process()
    validation.instance("queries", queries, Tensor)
    device = queries.device if bank is None else bank.device
    _check_tensor("queries", queries, device)
    _check_tensor("passages", passages, device)
    if passage_ids is not None:
        _check_tensor("passage_ids", passage_ids, device)
    if queries.dim() != 2:
        raise ValueError(f"queries: expected shape (n, d), got {tuple(queries.shape)}")
    if passages.dim() not in (2, 3):
        raise ValueError(
            f"passages: expected shape (n, m, d) or (n, d), got {tuple(passages.shape)}"
        )
    given = passage_ids is not None
    if bank is not None and bank.conflicts_with_ids(given):
        stored, came = ("without", "some") if given else ("with", "none")
        raise ValueError(
            f"passage_ids: expected as in the bank, which was filled {stored} ids, got {came}; "
            "clear the bank to change"
        )


def check_symmetric(bank, banks) -> None:
    """What both directions want."""
    if banks != "both":
        raise ValueError(f"banks: expected 'both' with symmetric=True, got {banks!r}")
    if bank is not None and bank.mirror is None:
        raise ValueError(
            "symmetric: expected False, since the bank was made without symmetric=True, got True"
        )


def check_shapes(queries, columns, passage_ids, bank, squeezed) -> None:
    """What the op would say too late, or in the words of the other direction."""
    (n, d), m = queries.shape, columns.shape[1]
    if bank is not None:
        m, d = bank.passages_per_query, bank.dim
    expected: list = [("queries", queries, (n, d)), ("passages", columns, (n, m, d))]
    if passage_ids is not None:
        expected.append(("passage_ids", passage_ids, (n, m)))
        if passage_ids.dtype != torch.int64:
            raise TypeError(f"passage_ids: expected int64, got {passage_ids.dtype}")
    if not queries.is_floating_point():
        kinds = "float32, float64, bfloat16 or float16"
        raise TypeError(f"queries: expected dtype {kinds}, got {queries.dtype}")
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape or 0 in shape:
            came = tuple(tensor.shape)
            if tensor is columns and squeezed:
                came, shape = (came[0], came[2]), shape if m > 1 else (n, d)
            raise ValueError(f"{name}: expected shape {shape}, got {came}")
    if columns.dtype != queries.dtype:
        raise TypeError(f"passages: expected {queries.dtype} as queries, got {columns.dtype}")


def _check_tensor(name: str, tensor: Tensor, device: torch.device) -> None:
    validation.instance(name, tensor, Tensor)
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
