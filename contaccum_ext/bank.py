"""The dual memory bank: two FIFO ring buffers and the table that makes the loss linear in them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from contaccum_ext import ops, validation
from contaccum_ext.bank_state import DRIFT, BankState
from contaccum_ext.layout import BankLayout

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class DualMemoryBank(BankState):
    """Detached representations of earlier queries and passages, first in, first out.

    Equivalent to two deques of `capacity` entries (ContAccum, arXiv 2406.12356, section 3.1) with a
    table of partial log-sum-exps, so that no banked x banked score is ever computed twice.

    Args:
        capacity: slots C. A slot is one query, its passages and their ids.
        dim: embedding size d.
        passages_per_query: m, the positive first, then hard negatives.
        dtype: what representations are rounded to on entry: float32, float64, bfloat16 or float16.
            All sums are float32 (float64 for float64).
        device: where the buffers live.
        drift: "none", or "mean": correct old representations by the shift of their mean.
        drift_decay: decay per micro-batch of the running means that "mean" keeps; 0.9 suits 16
            micro-batches an update, `mean_decay` says what suits others: means must not lag.
        layout: how slots are grouped; the default suits the capacity.
        anticipate: put each batch into the running means of "mean" before its own loss, not after
            it. For updates of fewer than eight micro-batches, where means that wait lag by a good
            part of an update; with one, that ruins training (docs/drift.md). Not where `transport`
            moves the means: there it does harm.
        learn_temperature: keep what the gradient of a temperature needs, a second table as large
            as the first.
        symmetric: for ``contaccum_loss(symmetric=True)``: keep queries and positives a second time,
            with their roles exchanged, in ``mirror``, a bank of one passage per query. A slot then
            holds 3 + m vectors instead of 1 + m.

    Drift: with "mean" each block of slots remembers the running means at which it was enqueued, and
    a banked vector v counts as v + (mean now - mean then) wherever it meets a local one: a model
    can no longer tell old negatives from fresh positives by it. `transport` goes further.

    All state is in ``state_dict``: loading it and going on gives the same bits as never having
    stopped.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        passages_per_query: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        drift: str = "none",
        drift_decay: float = 0.9,
        layout: BankLayout | None = None,
        *,
        anticipate: bool = False,
        learn_temperature: bool = False,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        self.capacity = validation.count("capacity", capacity)
        self.dim = validation.count("dim", dim)
        self.passages_per_query = validation.count("passages_per_query", passages_per_query)
        if dtype not in _FLOATING:
            raise TypeError(f"dtype: expected one of {_FLOATING}, got {dtype}")
        self.drift = validation.choice("drift", drift, DRIFT)
        self.drift_decay = validation.number("drift_decay", drift_decay)
        if not 0 <= self.drift_decay < 1:
            raise ValueError(f"drift_decay: expected a number in [0, 1), got {drift_decay}")
        self.anticipate = validation.instance("anticipate", anticipate, bool)
        if anticipate and drift != "mean":
            raise ValueError(f"anticipate: expected False with drift={drift!r}, got True")
        layout = layout or BankLayout.default(capacity)
        self.layout = validation.instance("layout", layout, BankLayout)
        self.learn_temperature = validation.instance("learn_temperature", learn_temperature, bool)
        self._window: int | None = None
        self._is_mirror = False
        self._uses, self._next_check = 0, 1
        self.mirror = None
        if validation.instance("symmetric", symmetric, bool):
            same = (dtype, device, drift, drift_decay, layout)
            self.mirror = DualMemoryBank(
                capacity, dim, 1, *same, anticipate=anticipate, learn_temperature=learn_temperature
            )
            self.mirror._is_mirror = True
        for name, (shape, kind) in self._shapes(dtype).items():
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device))
        self.clear()

    @torch.no_grad()
    def clear(self) -> None:
        """Forget every slot, the running means and whether passages have ids."""
        for name in ("bank_queries", "bank_passages", "cursor", "row_state", "means", "centering"):
            getattr(self, name).zero_()
        self.bank_ids.fill_(-1)
        for buffer in (self.block_lse, self.group_lse, *self.row_state):
            buffer.fill_(-math.inf)
        self.row_state[ops.FRESH_SUM].zero_()
        if self.learn_temperature:
            self.expected.zero_()
        self._scale = None
        self._summed_window = self.window_blocks()
        self._has_ids = None
        self._manual_offsets = False
        if self.mirror is not None:
            self.mirror.clear()

    @torch.no_grad()
    def begin_update(self) -> None:
        """Count batches anew for ``contaccum_loss(center_over=K)``.

        Needed only where an update may have had fewer than K batches. Nothing waits for the device.
        """
        self.centering.zero_()
        if self.mirror is not None:
            self.mirror.centering.zero_()

    def __len__(self) -> int:
        """Filled slots F (reads the device)."""
        return int(self.cursor[1])

    @property
    def dtype(self) -> torch.dtype:
        """What representations are rounded to."""
        return self.bank_queries.dtype

    @property
    def has_ids(self) -> bool | None:
        """Whether passages came with ids; None while the bank is empty (reads the device)."""
        return self._has_ids if len(self) else None

    def conflicts_with_ids(self, given: bool) -> bool:
        """Whether a batch with (or without) ids cannot join what is in the bank."""
        # A first batch may have been refused by the op.
        return self._has_ids is not None and self._has_ids != given and len(self) > 0

    @property
    def use_offsets(self) -> bool:
        """Whether banked vectors are corrected where they meet local ones."""
        return self.drift != "none" or self._manual_offsets

    def slots(self) -> Tensor:
        """(F,) ring positions, oldest first."""
        head, fill = self.cursor.tolist()
        first = head if fill == self.capacity else 0
        return (first + torch.arange(fill, device=self.device)) % self.capacity

    def queries(self) -> Tensor:
        """(F, d) banked queries, oldest first; a copy."""
        return self.bank_queries[self.slots()]

    def passages(self) -> Tensor:
        """(F, m, d) banked passages, oldest first; a copy."""
        return self.bank_passages[self.slots()]

    def passage_ids(self) -> Tensor:
        """(F, m) int64, -1 where there is none."""
        return self.bank_ids[self.slots()]

    def query_offsets(self) -> Tensor:
        """(F, d) what is added to banked queries where they meet local passages."""
        return self.offsets(self.slots())[:, 0]

    def passage_offsets(self) -> Tensor:
        """(F, m, d) what is added to banked passages where they meet local queries."""
        return self.offsets(self.slots())[:, 1:]

    def offsets(self, slots: Tensor) -> Tensor:
        """(S, 1 + m, d) both of the filled ring positions slots (S,), queries first."""
        row = self.layout.mean_rows(self.capacity, slots, self.cursor[0])
        return self.means[0] - self.means[row]

    @torch.no_grad()
    def set_offsets(self, query_offsets: Tensor, passage_offsets: Tensor) -> None:
        """Set the offsets by hand (only with drift="none"); slots enqueued later start with zero.

        Args:
            query_offsets: (offset blocks, d) floating, a row for each layout.offset_block slots.
            passage_offsets: (offset blocks, m, d) floating.
        """
        if self.drift != "none":
            raise ValueError(f"drift: expected 'none' to set offsets, got {self.drift!r}")
        blocks = self.layout.offset_blocks(self.capacity)
        shapes = (blocks, self.dim), (blocks, self.passages_per_query, self.dim)
        given = {"query_offsets": query_offsets, "passage_offsets": passage_offsets}
        for (name, tensor), shape in zip(given.items(), shapes, strict=True):
            validation.instance(name, tensor, Tensor)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name}: expected finite values")
        self.means[0].zero_()
        self.means[1:-1, 0] = -query_offsets.to(self.means)
        self.means[1:-1, 1:] = -passage_offsets.to(self.means)
        self.means[-1] = self.means[1 + int(self.cursor[0]) // self.layout.offset_block]
        self._manual_offsets = True
        if self.mirror is not None:
            self.mirror.set_offsets(passage_offsets[:, 0], query_offsets[:, None])

    @torch.no_grad()
    def ahead(
        self,
        queries: Tensor,
        passages: Tensor,
        scale: float = 1.0,
        companions: Tensor | None = None,
    ) -> Tensor:
        """(1 + m, d): how far a batch moves the running means before its own loss; else zeros.

        Zeros too where the batch may not enter the bank. Nothing waits for the device.

        Args:
            queries: (n, d) floating.
            passages: (n, m, d) floating.
            scale: that scores are multiplied by.
            companions: (n, k, d) floating vectors that must be finite too.
        """
        if not self.anticipate:
            return torch.zeros_like(self.means[0])
        parts = [queries.unsqueeze(1), passages] + ([] if companions is None else [companions])
        vectors = torch.cat(parts, 1).to(self.dtype).to(self.means)
        finite = (scale * vectors.square().sum(-1)).isfinite().all()
        mean = vectors[:, : 1 + self.passages_per_query].mean(0)
        keep = self.drift_decay * (self.cursor[1] > 0).to(mean)
        return torch.where(finite, (1 - keep) * (mean - self.means[0]), 0.0)

    @property
    def window(self) -> int:
        """Newest slots in use: what was set, rounded up to whole blocks as the ring stands now."""
        return self.effective_window()

    @window.setter
    def window(self, value: int | None) -> None:
        self._window = None if value is None else validation.count("window", value)
        if self.mirror is not None:
            self.mirror.window = value

    def effective_window(self) -> int:
        """The same as ``window`` (reads the device)."""
        return self.layout.effective_window(self.capacity, int(self.cursor[0]), self._window)

    @property
    def used(self) -> int:
        """Filled slots within the window, the newest (reads the device)."""
        return min(len(self), self.window)

    def window_blocks(self) -> int:
        """Whole blocks in use besides the one being filled; -1 for every slot."""
        return self.layout.window_blocks(self.capacity, self._window)

    def enqueue(self, queries: Tensor, passages: Tensor, passage_ids: Tensor | None = None) -> None:
        """Append queries (n, d), passages (n, m, d) and passage_ids (n, m) int64 without a loss."""
        from contaccum_ext.functional import contaccum_loss

        with torch.no_grad():
            temperature = 1.0 if self._scale is None else 1.0 / self._scale
            both = self.mirror is not None
            contaccum_loss(queries, passages, self, temperature, passage_ids, symmetric=both)

    def table(self) -> Tensor:
        """(F, blocks) Invariant T: log-sum-exp of each row, oldest first, over each block."""
        rows = self.row_state
        table = self.block_lse.clone()
        head = int(self.cursor[0]) // self.layout.block
        fresh = rows[ops.FRESH_MAX] + rows[ops.FRESH_SUM].log()
        table[head] = torch.logaddexp(fresh, rows[ops.OLD_LSE])
        return table[:, self.slots()].T

    def extra_repr(self) -> str:
        """Say what ``repr`` shows."""
        shape = f"{self.capacity}, {self.dim}, {self.passages_per_query}, dtype={self.dtype}"
        options = f"drift={self.drift!r}, window={self._window or 'all'}"
        for name in ("anticipate", "learn_temperature"):
            options += f", {name}=True" if getattr(self, name) else ""
        return f"{shape}, {options}"
