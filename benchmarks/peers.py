"""What does the same work: ours, and the ways to do it without a kernel.

Each peer holds a full bank and takes steps: loss, backward and enqueue, with gradients left in
``queries.grad`` and ``passages.grad``. python_tests holds all to the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import contaccum_ext as ca
from benchmarks.cases import FILL_BATCH, TEMPERATURE, Case
from benchmarks.linear_torch import LinearTorch


class Stepper(Protocol):
    """A bank of one peer."""

    def fill(self, queries: Tensor, passages: Tensor) -> None:
        """Fill the empty bank with (C, d) and (C, m, d); not timed."""

    def step(self, queries: Tensor, passages: Tensor) -> Tensor:
        """Loss, backward and enqueue of (n, d) and (n, m, d); returns the detached loss."""

    def table_bytes(self) -> int:
        """What is kept from step to step beside the two banks."""


@dataclass(frozen=True)
class Peer:
    name: str
    what: str
    lacks: str  # what of our op it does not do
    build: Callable[[Case], Stepper]
    quadratic_copies: int = 0  # matrices of (n + F) x (n + F)m alive at the peak of a step

    def peak_bytes(self, case: Case) -> int:
        """Bytes of its quadratic matrices at the peak; 0 if it has none."""
        accumulated = max(4, case.item_bytes)
        rows = case.n + case.slots
        return self.quadratic_copies * rows * rows * case.m * accumulated


class Ours:
    """The package's op, called as its users call it."""

    def __init__(self, case: Case) -> None:
        self.bank = ca.DualMemoryBank(
            case.slots, case.d, case.m, dtype=case.torch_dtype, drift=case.drift
        )

    @torch.no_grad()
    def fill(self, queries: Tensor, passages: Tensor) -> None:
        # At the temperature of the steps to come: another one would rebuild the whole table.
        for q, p in zip(queries.split(FILL_BATCH), passages.split(FILL_BATCH), strict=True):
            ca.contaccum_loss(q, p, self.bank, TEMPERATURE)

    def step(self, queries: Tensor, passages: Tensor) -> Tensor:
        loss = ca.contaccum_loss(queries, passages, self.bank, TEMPERATURE)
        loss.backward()
        return loss.detach()

    def table_bytes(self) -> int:
        bank = self.bank
        kept = (bank.block_lse, bank.group_lse, bank.row_state, bank.means)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)


class FullMatrix:
    """The official algorithm as it is run: concatenate, one matmul, cross entropy, autograd.

    Row weights are 1/n as in ours; the official 1/(n + F) costs the same.
    """

    def __init__(self, case: Case) -> None:
        self.capacity, self.head, self.filled = case.slots, 0, 0
        self.queries = torch.zeros(case.slots, case.d, dtype=case.torch_dtype)
        self.passages = torch.zeros(case.slots, case.m, case.d, dtype=case.torch_dtype)

    def fill(self, queries: Tensor, passages: Tensor) -> None:
        self._enqueue(queries, passages)

    def step(self, queries: Tensor, passages: Tensor) -> Tensor:
        n, m, d = passages.shape
        rows = torch.cat([queries, self.queries[: self.filled]])
        columns = torch.cat([passages, self.passages[: self.filled]]).reshape(-1, d)
        targets = torch.arange(len(rows)) * m
        loss = self._cross_entropy(rows, columns, targets) / n
        loss.backward()
        self._enqueue(queries.detach(), passages.detach())
        return loss.detach()

    @staticmethod
    def _cross_entropy(rows: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
        # Of its own, so that the matrix of scores is released before backward.
        scores = (rows / TEMPERATURE) @ columns.T
        if scores.dtype in (torch.bfloat16, torch.float16):
            scores = scores.float()  # as under autocast
        return cross_entropy(scores, targets, reduction="sum")

    def _enqueue(self, queries: Tensor, passages: Tensor) -> None:
        slots = (self.head + torch.arange(len(queries))) % self.capacity
        self.queries[slots], self.passages[slots] = queries, passages
        self.head = (self.head + len(queries)) % self.capacity
        self.filled = min(self.capacity, self.filled + len(queries))

    def table_bytes(self) -> int:
        return 0


OURS = Peer(
    "ours",
    "contaccum_ext.contaccum_loss, eager Python call",
    "",
    Ours,
)
FULL_MATRIX = Peer(
    "full matrix",
    "the official algorithm in PyTorch: cat, (n+F) x (n+F)m matmul, cross_entropy, autograd",
    "drift correction, window, id masking; its memory and time are quadratic in F",
    FullMatrix,
    # The saved log-softmax, the gradient that comes in and the one that goes out.
    quadratic_copies=3,
)
LINEAR_TORCH = Peer(
    "linear PyTorch",
    "the same algorithm in PyTorch ops: a table of partial log-sum-exps, local rows and columns",
    "drift correction, window, id masking; scores of n x F are stored; upkeep comes all at once "
    "when the write position enters a block, where a row's scores must lie within 87 of each other",
    LinearTorch,
)
PEERS = (OURS, FULL_MATRIX, LINEAR_TORCH)


def find(name: str) -> Peer:
    """The peer of that name."""
    for peer in PEERS:
        if peer.name == name:
            return peer
    raise ValueError(f"peer: expected one of {[peer.name for peer in PEERS]}, got {name!r}")
