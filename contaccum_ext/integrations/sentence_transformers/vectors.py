"""Where embeddings and banks lie, and in which precision scores are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from contaccum_ext.bank import DualMemoryBank
from contaccum_ext.ops import op_runs_on


def place(device: torch.device) -> torch.device:
    """Where the op runs: without a kernel for the device the few embeddings travel to the CPU."""
    return device if op_runs_on(device) else torch.device("cpu")


def move_to(bank: DualMemoryBank, device: torch.device) -> None:
    """Let the bank lie there."""
    if bank.device != device:  # restored, or the model has moved
        bank.to(device)


def widen(column: Tensor) -> Tensor:
    """As sentence-transformers does before it computes scores."""
    return column.float() if column.dtype.itemsize < 4 else column
