"""The bank of the one oracle: a list of slots, oldest first. See `contaccum_ext.reference`."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from contaccum_ext.layout import BankLayout, accumulation_dtype
from contaccum_ext.reference_scores import LaggingScores


@dataclass
class _Slot:
    query: Tensor  # (d,)
    passages: Tensor  # (m, d)
    ids: Tensor  # (m,) int64, -1 where there is none
    generation: tuple[int, int]  # lap around the ring, offset block: who shares a stored mean


class DualMemoryBank:
    """The bank as a list, oldest slot first: no ring, no table; nothing is checked.

    Args:
        capacity: slots C.
        dim: embedding size d.
        passages_per_query: m, the positive first.
        dtype: what representations are rounded to on entry.
        drift: "none" or "mean".
        drift_decay: decay per micro-batch of the running means.
        layout: offset_block slots share a mean; a window is rounded to whole blocks.
        anticipate: a batch's own loss sees the means that it moves.

    Source: ContAccum, arXiv 2406.12356, section 3.1; window and drift are this project's.
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        passages_per_query: int = 1,
        dtype: torch.dtype = torch.float32,
        drift: str = "none",
        drift_decay: float = 0.9,
        layout: BankLayout | None = None,
        anticipate: bool = False,
    ) -> None:
        self.capacity, self.dim, self.passages_per_query = capacity, dim, passages_per_query
        self.dtype, self.drift, self.drift_decay = dtype, drift, drift_decay
        self.anticipate = anticipate
        self.layout = layout or BankLayout.default(capacity)
        self.window: int | None = None
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.slots: list[_Slot] = []
        self.written = 0  # slots ever written, so written % capacity is the ring's write position
        self.has_ids: bool | None = None
        acc = accumulation_dtype(self.dtype)
        self.mean = torch.zeros(1 + self.passages_per_query, self.dim, dtype=acc)
        self.block_means: dict[tuple[int, int], tuple[int, Tensor]] = {}
        # What has not been taken out of gradients yet; batches since the update began. Of passages,
        # and of queries, which are the columns of a symmetric loss's other half.
        self.centering = torch.zeros(2, self.dim, dtype=acc)
        self.mirror = SimpleNamespace(centering=torch.zeros_like(self.centering))
        # The temperature that scores among banked vectors are known for; those of a symmetric
        # loss's both halves, where they are not of the vectors as they are.
        self._temperature: float | None = None
        self._lagging: tuple[LaggingScores, LaggingScores] | None = None

    def begin_update(self) -> None:
        """Count batches anew for ``center_over``."""
        self.centering.zero_()
        self.mirror.centering.zero_()

    def __len__(self) -> int:
        return len(self.slots)

    def queries(self) -> Tensor:
        """(F, d), oldest first."""
        return self._stack([slot.query for slot in self.slots], (self.dim,))

    def passages(self) -> Tensor:
        """(F, m, d), oldest first."""
        shape = (self.passages_per_query, self.dim)
        return self._stack([slot.passages for slot in self.slots], shape)

    def passage_ids(self) -> Tensor:
        """(F, m) int64."""
        return self._stack([slot.ids for slot in self.slots], (self.passages_per_query,)).long()

    def places(self) -> Tensor:
        """(F,) int64 ring positions, oldest first."""
        return torch.arange(self.written - len(self), self.written) % self.capacity

    def lagging_scores(self, temperature: float) -> tuple[LaggingScores, LaggingScores] | None:
        """Scores among banked vectors, and among positives and queries; None: as vectors are now.

        Args:
            temperature: that they are used at. All are computed anew where it is another one.
        """
        if self._temperature != temperature:
            self._temperature, self._lagging = temperature, None
        return self._lagging

    def _halves(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Rows and columns of both halves of a symmetric loss."""
        queries, passages = self.queries(), self.passages()
        return (queries, passages), (passages[:, 0], queries[:, None])

    def _stack(self, rows: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        return torch.stack(rows) if rows else torch.zeros(0, *shape, dtype=self.dtype)

    def _offsets(self) -> Tensor:
        """(F, 1 + m, d): running mean now minus the mean stored with each slot's generation."""
        then = [self.block_means[slot.generation][1] for slot in self.slots]
        return self.mean - torch.stack(then) if then else self.mean.new_zeros(0, *self.mean.shape)

    def query_offsets(self) -> Tensor:
        """(F, d) added to banked queries where they meet local passages."""
        return self._offsets()[:, 0]

    def passage_offsets(self) -> Tensor:
        """(F, m, d) added to banked passages where they meet local queries."""
        return self._offsets()[:, 1:]

    def set_offsets(self, query_offsets: Tensor, passage_offsets: Tensor) -> None:
        """Give every generation of offset block b the offsets of row b.

        Args:
            query_offsets: (offset blocks, d) floating.
            passage_offsets: (offset blocks, m, d) floating.
        """
        for (lap, block), (count, _) in self.block_means.items():
            offset = torch.cat([query_offsets[block : block + 1], passage_offsets[block]])
            self.block_means[lap, block] = (count, self.mean - offset.to(self.mean.dtype))

    def ahead(self, queries: Tensor, passages: Tensor) -> Tensor:
        """(1 + m, d): how far a batch moves the means before its own loss.

        Args:
            queries: (n, d) floating.
            passages: (n, m, d) floating.
        """
        return self._move(queries, passages) if self.anticipate else torch.zeros_like(self.mean)

    def _move(self, queries: Tensor, passages: Tensor) -> Tensor:
        batch = torch.cat([queries[:, None], passages], 1).detach().to(self.dtype).to(self.mean)
        return (1 - self.drift_decay * bool(self.slots)) * (batch.mean(0) - self.mean)

    def transport(
        self,
        old: Tensor,
        new: Tensor,
        kind: str,
        ridge: float,
        normalize: bool,
        rebuild: bool = True,
    ) -> None:
        """Move banked vectors as probes have moved; with drift="mean" about their running means.

        Args:
            old: (R, d) floating, probes before a step.
            new: (R, d) the same probes after it.
            kind: "queries" or "passages": what they are, and what is moved.
            ridge: in units of the mean eigenvalue of the probes' Gram matrix.
            normalize: bring moved vectors to length 1; with drift="mean" they are left as they are.
            rebuild: scores among banked vectors follow; otherwise see `LaggingScores`.
        """
        if rebuild:
            self._temperature = self._lagging = None
        elif self._lagging is None and self._temperature is not None and self.slots:
            first, second = (
                LaggingScores(self.places(), *half, self.capacity, self.layout)
                for half in self._halves()
            )
            self._lagging = first, second
        old, new = old.double(), new.double()
        spread, moved = old - old.mean(0), new - old
        gram = spread @ spread.T
        strength = ridge * gram.trace() / len(old) * torch.eye(len(old), dtype=gram.dtype)
        slope = spread.T @ torch.linalg.solve(gram + strength, moved - moved.mean(0))

        def image(v: Tensor) -> Tensor:
            return v.double() + moved.mean(0) + (v.double() - old.mean(0)) @ slope

        part = slice(0, 1) if kind == "queries" else slice(1, None)
        mean = image(self.mean[part])  # where the running mean is now
        for slot in self.slots:
            v = slot.query[None] if kind == "queries" else slot.passages
            if self.drift == "mean":
                rest = v.double() - self.block_means[slot.generation][1][part].double()
                there = mean + rest + rest @ slope
            else:
                there = image(v) / (image(v).norm(dim=-1, keepdim=True) if normalize else 1)
            if kind == "queries":
                slot.query = there[0].to(self.dtype)
            else:
                slot.passages = there.to(self.dtype)
        if self.drift == "mean" and self.slots:
            for means in (self.mean, *(stored for _, stored in self.block_means.values())):
                means[part] = mean.to(means.dtype)

    def effective_window(self) -> int:
        """Newest slots in use: the started block plus ceil(window / block) whole ones."""
        head = self.written % self.capacity
        return self.layout.effective_window(self.capacity, head, self.window)

    def enqueue(self, queries: Tensor, passages: Tensor, passage_ids: Tensor | None = None) -> None:
        """Append queries (n, d), passages (n, m, d) and passage_ids (n, m) int64, one by one."""
        queries, passages = queries.detach().to(self.dtype), passages.detach().to(self.dtype)
        if passages.dim() == 2:
            passages = passages[:, None]
        self.has_ids = passage_ids is not None
        if passage_ids is None:
            passage_ids = torch.full((len(queries), self.passages_per_query), -1, dtype=torch.int64)
        if self.drift == "mean":
            self.mean = self.mean + self._move(queries, passages)
        for i in range(len(queries)):
            lap, position = divmod(self.written, self.capacity)
            generation = (lap, position // self.layout.offset_block)
            count, mean = self.block_means.get(generation, (0, torch.zeros_like(self.mean)))
            self.block_means[generation] = (count + 1, (count * mean + self.mean) / (count + 1))
            self.slots.append(_Slot(queries[i], passages[i], passage_ids[i], generation))
            self.written += 1
        self.slots = self.slots[-self.capacity :]
        if self._temperature is None:
            self._temperature = 1.0  # as the package's bank, whose table must be of some
        if self._lagging is not None:
            count = len(queries)
            head = (self.written - count) % self.capacity
            known = [
                scores.enqueued(head, count, self.places(), *half)
                for scores, half in zip(self._lagging, self._halves(), strict=True)
            ]
            if not all(known):
                self._lagging = None
