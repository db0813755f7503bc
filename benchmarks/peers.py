"""What does the same work: ours, and the ways to do it without a kernel.

Each peer holds a full bank and takes steps: loss, both gradients and enqueue. python_tests holds
all to the reference. cuda_peers has those that only a GPU run compares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import contaccum_ext as ca
from benchmarks.cases import TEMPERATURE, Case, fill_batch
from benchmarks.linear_torch import LinearTorch


class Stepper(Protocol):
    """A bank of one peer."""

    def fill(self, queries: Tensor, passages: Tensor) -> None:
        """Fill the empty bank with (C, d) and (C, m, d); not timed."""

    def step(self, queries: Tensor, passages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, backward and enqueue of (n, d) and (n, m, d); returns detached loss, dq and dp."""

    def table_bytes(self) -> int:
        """What is kept from step to step beside the two banks."""


@dataclass(frozen=True)
class Peer:
    name: str
    what: str
    lacks: str  # what of our op it does not do
    build: Callable[..., Stepper]  # (case, device="cpu")
    quadratic_copies: int = 0  # matrices of (n + F) x (n + F)m alive at the peak of a step
    quadratic_time: bool = False
    dtype: str | None = None  # of its bank and batch; None for the case's
    precision: str = "highest"  # of float32 products: see torch.set_float32_matmul_precision

    def peak_bytes(self, case: Case) -> int:
        """Bytes of its quadratic matrices at the peak; 0 if it has none."""
        accumulated = max(4, case.item_bytes)
        rows = case.n + case.slots
        return self.quadratic_copies * rows * rows * case.m * accumulated

    def case(self, case: Case) -> Case:
        """The case in the dtype that this peer runs it in."""
        return case if self.dtype is None else dataclasses.replace(case, dtype=self.dtype)


class Ours:
    """The package's op, called as its users call it."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.bank = ca.DualMemoryBank(
            case.slots, case.d, case.m, dtype=case.torch_dtype, device=device, drift=case.drift
        )
        self.center_over = case.center_over

    @torch.no_grad()
    def fill(self, queries: Tensor, passages: Tensor) -> None:
        # At the temperature of the steps to come: another one would rebuild the whole table.
        size = fill_batch(len(queries))
        for q, p in zip(queries.split(size), passages.split(size), strict=True):
            ca.contaccum_loss(q, p, self.bank, TEMPERATURE)

    def loss(self, queries: Tensor, passages: Tensor) -> Tensor:
        """Loss with its graph, and enqueue."""
        over = self.center_over
        return ca.contaccum_loss(queries, passages, self.bank, TEMPERATURE, center_over=over)

    def step(self, queries: Tensor, passages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = self.loss(queries, passages)
        d_queries, d_passages = torch.autograd.grad(loss, (queries, passages))
        return loss.detach(), d_queries, d_passages

    def table_bytes(self) -> int:
        bank = self.bank
        kept = (bank.block_lse, bank.group_lse, bank.row_state, bank.means)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)


class FullMatrix:
    """The official algorithm as it is run: concatenate, one matmul, cross entropy, autograd.

    Row weights are 1/n as in ours; the official 1/(n + F) costs the same.
    """

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.capacity, self.head, self.filled = case.slots, 0, 0
        self.queries = torch.zeros(case.slots, case.d, dtype=case.torch_dtype, device=device)
        self.passages = torch.zeros(
            case.slots, case.m, case.d, dtype=case.torch_dtype, device=device
        )
        self._targets = torch.arange(0, device=device)

    def fill(self, queries: Tensor, passages: Tensor) -> None:
        self._enqueue(queries, passages)

    def loss(self, queries: Tensor, passages: Tensor) -> Tensor:
        """Loss with its graph, and enqueue: the graph has copies of what the loss saw."""
        loss = self._mean_loss(queries, passages)
        self._enqueue(queries.detach(), passages.detach())
        return loss

    def step(self, queries: Tensor, passages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = self._mean_loss(queries, passages)
        d_queries, d_passages = torch.autograd.grad(loss, (queries, passages))
        # Only now: a compiled loss may save the bank itself and concatenate once more in backward.
        self._enqueue(queries.detach(), passages.detach())
        return loss.detach(), d_queries, d_passages

    def _mean_loss(self, queries: Tensor, passages: Tensor) -> Tensor:
        used, n, m = self.filled, len(queries), passages.shape[1]
        if len(self._targets) != n + used:
            self._targets = torch.arange(n + used, device=queries.device) * m
        banked = (self.queries[:used], self.passages[:used])
        return self.summed_loss(queries, passages, *banked, self._targets) / n

    def summed_loss(
        self,
        queries: Tensor,
        passages: Tensor,
        banked_queries: Tensor,
        banked_passages: Tensor,
        targets: Tensor,
    ) -> Tensor:
        """Sum over all rows; (n, d), (n, m, d), (F, d), (F, m, d) and (n + F,) column numbers."""
        return full_matrix_loss(queries, passages, banked_queries, banked_passages, targets)

    @torch.no_grad()
    def _enqueue(self, queries: Tensor, passages: Tensor) -> None:
        row = 0
        while row < len(queries):  # twice where the ring ends
            count = min(len(queries) - row, self.capacity - self.head)
            slots = slice(self.head, self.head + count)
            self.queries[slots] = queries[row : row + count]
            self.passages[slots] = passages[row : row + count]
            row, self.head = row + count, (self.head + count) % self.capacity
        self.filled = min(self.capacity, self.filled + len(queries))

    def table_bytes(self) -> int:
        return 0


def concatenated(
    queries: Tensor, passages: Tensor, banked_queries: Tensor, banked_passages: Tensor
) -> tuple[Tensor, Tensor]:
    """Scaled (n + F, d) rows and ((n + F) m, d) columns; local ones first."""
    rows = torch.cat([queries, banked_queries]) / TEMPERATURE
    return rows, torch.cat([passages, banked_passages]).flatten(0, 1)


def full_matrix_loss(
    queries: Tensor,
    passages: Tensor,
    banked_queries: Tensor,
    banked_passages: Tensor,
    targets: Tensor,
) -> Tensor:
    """Sum over rows of the cross entropy over the whole matrix of scores."""
    rows, columns = concatenated(queries, passages, banked_queries, banked_passages)
    scores = rows @ columns.T
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()  # as under autocast
    return cross_entropy(scores, targets, reduction="sum")


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
    quadratic_time=True,
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
