"""What is timed: the shape of a step, its inputs, and what a step costs at least."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
TEMPERATURE = 0.05  # cosine scores at scale 20, as retrievers are commonly trained
ROTATED_BATCHES = 16
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """One step: `n` local queries with `m` passages each against a full bank of `slots` slots."""

    slots: int  # F, equal to the capacity C
    n: int = 8
    d: int = 384
    m: int = 1
    dtype: str = "fp32"
    drift: str = "none"
    center_over: int | None = None  # of `contaccum_loss`

    @property
    def corrections(self) -> str:
        """Of drift and of gradients, in words."""
        return self.drift if self.center_over is None else f"{self.drift}, centered gradients"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def item_bytes(self) -> int:
        return self.torch_dtype.itemsize

    def bank_bytes(self) -> int:
        """Bytes of both banks, so what a step reads at least: F (1 + m) d size."""
        return self.slots * (1 + self.m) * self.d * self.item_bytes

    def operations(self) -> int:
        """Multiplications and additions of a step: 4nFmd for each side (scores, then gradients).

        The enqueue is counted as free: what the table costs is ours to answer for.
        """
        query_side = 4 * self.n * self.slots * self.m * self.d
        passage_side = 4 * self.n * self.slots * self.m * self.d
        return query_side + passage_side

    def with_slots(self, slots: int) -> Case:
        return dataclasses.replace(self, slots=slots)


def floor_seconds(case: Case, bytes_per_second: float, operations_per_second: float) -> float:
    """No step is faster: the longer of reading both banks once and of the multiplications."""
    return max(case.bank_bytes() / bytes_per_second, case.operations() / operations_per_second)


def make_vectors(case: Case, count: int, seed: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Unit (count, d) queries and (count, m, d) passages; a positive's cosine is near 0.7."""
    generator = torch.Generator(device).manual_seed(seed)
    queries = torch.randn(count, case.d, generator=generator, device=device)
    queries = normalize(queries, dim=-1)
    passages = torch.randn(count, case.m, case.d, generator=generator, device=device)
    passages = normalize(passages, dim=-1)
    passages[:, 0] = normalize(passages[:, 0] + queries, dim=-1)
    return queries.to(case.torch_dtype), passages.to(case.torch_dtype)


def fill_batch(slots: int) -> int:
    """Slots per call while a bank of so many is filled: few calls, and scratch of a few percent."""
    return min(4096, max(1024, slots // 64))


class Batches:
    """Local batches in rotation, as leaves that want gradients: one alone would stay cached."""

    def __init__(
        self, case: Case, count: int = ROTATED_BATCHES, seed: int = 1, device: str = "cpu"
    ) -> None:
        queries, passages = make_vectors(case, count * case.n, seed, device)
        self._batches = [
            (q.clone().requires_grad_(), p.clone().requires_grad_())
            for q, p in zip(queries.split(case.n), passages.split(case.n), strict=True)
        ]
        self._next = 0

    def next(self) -> tuple[Tensor, Tensor]:
        """The next (n, d) queries and (n, m, d) passages."""
        batch = self._batches[self._next]
        self._next = (self._next + 1) % len(self._batches)
        return batch
