"""Numbers that tell whether weights are the same, without a copy of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@torch.no_grad()
def bit_sums(tensors: Iterable[Tensor]) -> list[int]:
    """The sum of each tensor's bits, read as integers; exact, so the same on every device.

    Equivalent to ``[t.view(torch.int64).sum() for t in tensors]`` modulo 2**64, with narrower
    integers where the bytes are no multiple of eight. One changed number always changes the sum.
    It reads each tensor once and waits for the device once.
    """
    sums = [_bits(tensor.detach()).sum() for tensor in tensors]
    return torch.stack([s.to(sums[0].device) for s in sums]).tolist() if sums else []


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    if flat.numel() * flat.itemsize % 8:
        return flat.view(_INTEGERS[flat.itemsize])
    # The widest integers: sums of narrower ones are converted one by one, ten times slower on CPUs.
    aligned = flat.storage_offset() * flat.itemsize % 8 == 0
    return (flat if aligned else flat.clone()).view(torch.int64)


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """64 bits for all tensors and their order."""
    total = 0
    for value in bit_sums(tensors):
        total = (total * 6364136223846793005 + value) % 2**64
    return total
