"""One column of a batch, as a model's tokenizer gives it: some of its rows, or several in one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Features = dict[str, Any]


def row_count(features: Mapping[str, Any]) -> int:
    """Texts (or images, ...) in a column; layouts as in ``identity.text_ids``."""
    if "cu_seq_lens_q" in features:
        return len(features["cu_seq_lens_q"]) - 1
    if "offsets" in features:
        return len(features["offsets"])
    tensors = (value for value in features.values() if isinstance(value, Tensor) and value.dim())
    tokens = features.get("input_ids")
    return len(tokens if isinstance(tokens, Tensor) else next(tensors))


def split(features: Mapping[str, Any], rows: int, at_once: int) -> list[Features]:
    """Copies of the first rows, `at_once` in each, without padding behind the longest of them.

    All rows in one copy where nobody knows which numbers belong to which: images cut into patches.
    """
    count = row_count(features)
    rows = min(rows, count)
    if "cu_seq_lens_q" in features:
        select = _select_flattened
    elif "offsets" in features:
        select = _select_bags
    elif all(len(value) in (1, count) for value in _tensors(features)):
        select = _select_padded
    else:
        return [_copy(features)]
    return [
        _copy(select(features, begin, min(begin + at_once, rows)))
        for begin in range(0, rows, at_once)
    ]


def _copy(features: Mapping[str, Any]) -> Features:
    return {n: v.clone() if isinstance(v, Tensor) else v for n, v in features.items()}


def _tensors(features: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in features.values() if isinstance(value, Tensor) and value.dim()]


def _has_rows(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == count


def _select_flattened(features: Mapping[str, Any], begin: int, end: int) -> Features:
    """Texts without padding, one after the other in a single row, for variable-length attention."""
    bounds = features["cu_seq_lens_q"][begin : end + 1]
    first, last = bounds[0].item(), bounds[-1].item()
    total = features["cu_seq_lens_q"][-1].item()
    part = dict(features)  # the longest text's length remains, as an upper bound
    for name, value in features.items():
        if name.startswith("cu_seq_lens"):
            part[name] = bounds - first
        elif isinstance(value, Tensor) and value.dim() and value.shape[-1] == total:
            part[name] = value[..., first:last] - (begin if name == "seq_idx" else 0)
    return part


def _select_bags(features: Mapping[str, Any], begin: int, end: int) -> Features:
    """Texts one after the other, as StaticEmbedding takes them."""
    tokens, bounds = features["input_ids"], features["offsets"].tolist()
    part = tokens[bounds[begin] : bounds[end] if end < len(bounds) else len(tokens)]
    offsets = features["offsets"][begin:end] - bounds[begin]
    return {**features, "input_ids": part, "offsets": offsets}


def _select_padded(features: Mapping[str, Any], begin: int, end: int) -> Features:
    count = row_count(features)
    part = {
        name: value[begin:end] if _has_rows(value, count) else value
        for name, value in features.items()
    }
    mask = part.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not mask.any():
        return part
    width = mask.shape[1]
    # Padding before the texts stays: positions may be counted from there.
    used = int(mask.any(0).nonzero().max()) + 1
    return {
        name: value[:, :used]
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == width
        else value
        for name, value in part.items()
    }


def join(batches: Iterable[Features], at_once: int) -> list[Features]:
    """The same rows in as few batches as possible, of up to `at_once` rows, in the same order.

    Batches that are not padded texts of the same kind stay as they are.
    """
    joined: list[Features] = []
    for batch in batches:
        both = None
        if joined and row_count(joined[-1]) + row_count(batch) <= at_once:
            both = _join_two(joined[-1], batch)
        if both is None:
            joined.append(batch)
        else:
            joined[-1] = both
    return joined


def _join_two(first: Features, second: Features) -> Features | None:
    if first.keys() != second.keys() or "attention_mask" not in first:
        return None
    counts = row_count(first), row_count(second)
    both: Features = {}
    for name in first:
        pair = first[name], second[name]
        if all(map(_has_rows, pair, counts)):
            rows = _stack_rows(*pair)
            if rows is None:
                return None
            both[name] = rows
        elif _same(*pair):
            both[name] = pair[0]
        else:
            return None
    return both


def _stack_rows(first: Tensor, second: Tensor) -> Tensor | None:
    """Rows of both, padded with zeros behind: padding, by the zeros in the attention mask."""
    if first.shape[1:] != second.shape[1:]:
        if first.dim() != 2 or second.dim() != 2 or first.is_floating_point():
            return None
        width = max(first.shape[1], second.shape[1])
        first, second = (
            nn.functional.pad(value, (0, width - value.shape[1])) for value in (first, second)
        )
    return torch.cat([first, second])


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    return isinstance(first, (str, int, float, tuple, type(None))) and first == second
