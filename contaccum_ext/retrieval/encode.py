"""Texts to vectors with any encoder module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from .optional import require

Tokenizer = Callable[..., Mapping[str, torch.Tensor]]


class Encoder(Protocol):
    """A module that turns a tokenizer's batch into one vector per text.

    Pooling and normalisation are the encoder's own: what it returns is what is searched.
    """

    def __call__(self, **batch: torch.Tensor) -> torch.Tensor:
        """Returns representations (b, d) for `input_ids`, `attention_mask`, ... of shape (b, t)."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """The module and all below it, as in `nn.Module`."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters, as in `nn.Module`."""
        ...


def encode_texts(
    encoder: Encoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_length: int = 256,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Encodes texts in evaluation mode, without gradients, as `encoder(**tokenizer(texts))`.

    Texts are batched by length, which saves most of the padding; the result is in the order
    given. Each submodule's train or eval mode is as before afterwards, also after an error.

    Args:
        encoder: see `Encoder`.
        tokenizer: a transformers tokenizer, or a callable with its arguments.
        texts: N texts; empty ones are allowed.
        max_length: tokens kept of each text.
        batch_size: texts per call of the encoder.
        device: where batches are sent; where the encoder's parameters are by default.
        autocast_dtype: run under autocast with this dtype, e.g. torch.bfloat16.
        progress: show a progress bar.

    Returns:
        (N, d) fp32 on the CPU.

    Raises:
        ValueError: no texts, a non-positive `batch_size` or `max_length`, or an encoder that does
            not return a floating-point (b, d).
    """
    if not texts:
        raise ValueError("texts: expected at least one, got none")
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    target = torch.device(device) if device is not None else _device_of(encoder)
    # Longest first: a batch that does not fit in memory fails at once, not after an hour.
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    starts: Iterable[int] = range(0, len(order), batch_size)
    if progress:
        starts = require("tqdm.auto").tqdm(starts, desc="encode", unit="batch")
    vectors: torch.Tensor | None = None
    with _evaluating(encoder):
        for start in starts:
            indices = order[start : start + batch_size]
            batch = tokenizer(
                [texts[index] for index in indices],
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
            with torch.inference_mode(), _autocast(target, autocast_dtype):
                encoded = encoder(**{name: tensor.to(target) for name, tensor in batch.items()})
            _check_encoded(encoded, len(indices))
            # Made outside inference mode, the result may take part in autograd later.
            if vectors is None:
                vectors = torch.empty(len(texts), encoded.shape[1])
            vectors[torch.tensor(indices)] = encoded.float().cpu()
    assert vectors is not None
    return vectors


def _device_of(encoder: Encoder) -> torch.device:
    for parameter in encoder.parameters():
        return parameter.device
    return torch.device("cpu")


def _autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def _evaluating(encoder: Encoder) -> Iterator[None]:
    # Mode by mode: train() on the whole would also wake submodules that were kept in eval().
    modes = [(module, module.training) for module in encoder.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_encoded(encoded: object, n_texts: int) -> None:
    if not isinstance(encoded, torch.Tensor):
        raise ValueError(f"encoder: expected a tensor ({n_texts}, d), got {type(encoded).__name__}")
    if encoded.ndim != 2 or encoded.shape[0] != n_texts or not encoded.is_floating_point():
        raise ValueError(
            f"encoder: expected floating-point ({n_texts}, d), "
            f"got {encoded.dtype} {tuple(encoded.shape)}"
        )
