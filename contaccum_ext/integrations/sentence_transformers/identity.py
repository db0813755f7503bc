"""Which texts are the same, as far as a loss can see: a number computed from their token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# With one of these the token ids are not all of the input: two images share one placeholder text.
_NOT_TEXT = ("pixel_values", "pixel_values_videos", "input_features", "input_values")

_GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio, as a signed number: odd, its bits irregular
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # of splitmix64, signed


def text_ids(features: Mapping[str, Any]) -> Tensor | None:
    """63-bit hash of each row's token ids without padding; the same in every process.

    Equivalent to hashing the tuple of each row's real tokens. Padding on either side, its amount
    and the other rows make no difference. Texts that were truncated to the same tokens are the
    same. Two different ones among N collide with a probability of about N**2 / 2**64.

    Args:
        features: one column: padded (``input_ids`` and ``attention_mask``, (n, length)), flattened
            (``input_ids`` (1, tokens) with ``cu_seq_lens_q``) or as StaticEmbedding takes them
            (``input_ids`` (tokens) with ``offsets``).

    Returns:
        (n,) int64, at least 0; None where there are no token ids or more than token ids.
    """
    tokens = features.get("input_ids")
    if not isinstance(tokens, Tensor) or any(name in features for name in _NOT_TEXT):
        return None
    if "cu_seq_lens_q" in features:
        return _hash_segments(tokens.flatten(), features["cu_seq_lens_q"][:-1].long())
    if "offsets" in features:
        return _hash_segments(tokens, features["offsets"])
    mask = features.get("attention_mask")
    real = torch.ones_like(tokens) if mask is None else (mask != 0).long()
    hashes = _hash_tokens(tokens, real.cumsum(1) - 1)
    return _finish((hashes * real).sum(1), real.sum(1))


def _hash_segments(tokens: Tensor, starts: Tensor) -> Tensor:
    """tokens (total,); starts (n,): where each text begins."""
    ends = torch.cat([starts[1:], starts.new_full((1,), len(tokens))])
    lengths = ends - starts
    rows = torch.repeat_interleave(lengths)
    position = torch.arange(len(tokens), device=tokens.device) - starts[rows]
    total = torch.zeros_like(starts).index_add(0, rows, _hash_tokens(tokens, position))
    return _finish(total, lengths)


def _hash_tokens(tokens: Tensor, position: Tensor) -> Tensor:
    """A number for each token at its place, so that their sum over a text depends on the order."""
    return _scramble(_scramble(tokens.long()) + position * _GOLDEN)


def _finish(total: Tensor, length: Tensor) -> Tensor:
    return _scramble(total + length * _GOLDEN) & (2**63 - 1)


def _scramble(x: Tensor) -> Tensor:
    """The finalizer of splitmix64: a bijection in which each bit changes half of the others.

    int64 arithmetic wraps around on every device, as unsigned 64-bit arithmetic does.
    """
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ _shift_right(x, shift)) * multiplier
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """As for unsigned numbers: zeros come in, not copies of the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def stack_identities(
    identities: Sequence[Tensor | None], rows: int, device: torch.device
) -> Tensor:
    """(n, m) int64; -1, which equals nothing, in columns that have no identities."""
    unknown = torch.full((rows,), -1, dtype=torch.int64, device=device)
    return torch.stack([unknown if ids is None else ids.to(device) for ids in identities], 1)
