"""What a bank keeps: its buffers, what of the table still fits, and how all of it is saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from contaccum_ext import ops
from contaccum_ext.layout import BankLayout, accumulation_dtype
from contaccum_ext.processes import refuse_broadcast, several_processes

if TYPE_CHECKING:
    from contaccum_ext.bank import DualMemoryBank

DRIFT = ("none", "mean")
# Never narrower than float32.
_TABLE = ("block_lse", "group_lse", "row_state", "means", "expected", "centering")


class BankState(nn.Module):
    """The buffers of a `DualMemoryBank`, in ``state_dict`` and out of it."""

    capacity: int
    dim: int
    passages_per_query: int
    drift: str
    drift_decay: float
    anticipate: bool
    learn_temperature: bool
    layout: BankLayout
    mirror: DualMemoryBank | None  # rows and columns exchanged, where the loss is symmetric
    bank_queries: Tensor  # (C, d)
    bank_passages: Tensor  # (C, m, d)
    bank_ids: Tensor  # (C, m) int64, -1 where there is none
    cursor: Tensor  # (2) int64: next slot to be written, filled slots
    block_lse: Tensor  # (blocks, C)
    group_lse: Tensor  # (groups, C)
    row_state: Tensor  # (ROW_STATES, C)
    means: Tensor  # (2 + offset blocks, 1 + m, d)
    expected: Tensor  # (layout.expected_rows, C), with learn_temperature
    centering: Tensor  # (2, d): gradients' sum that is still to be taken out; batches of the update
    _scale: float | None  # the scale that the table holds for
    _summed_window: int  # the window that row_state holds for
    _window: int | None
    _has_ids: bool | None
    _manual_offsets: bool
    _is_mirror: bool
    _uses: int  # where there are several processes
    _next_check: int

    def _shapes(self, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shapes = self.layout.buffers(self.capacity, self.passages_per_query, self.dim, dtype)
        if self.learn_temperature:
            rows = self.layout.expected_rows(self.capacity)
            shapes["expected"] = ((rows, self.capacity), accumulation_dtype(dtype))
        shapes["centering"] = ((2, self.dim), accumulation_dtype(dtype))
        return shapes

    @property
    def device(self) -> torch.device:
        """Where the buffers live."""
        b: dict = self._buffers  # faster than attributes
        return b["cursor"].device

    def buffers_in_order(self) -> tuple[Tensor | None, ...]:
        """The op's bank arguments, in the order of its schema; the last is None if not kept."""
        b: dict = self._buffers  # faster than attributes
        return (
            *(b["bank_queries"], b["bank_passages"], b["bank_ids"], b["cursor"]),
            *(b["block_lse"], b["group_lse"], b["row_state"], b["means"], b.get("expected")),
        )

    def check_process(self) -> None:
        """Refuse to be what another process's bank is copied over, as far as can be seen.

        At the first use and ever more rarely later, because wrappers can be made at any time.
        """
        if torch.compiler.is_compiling() or not several_processes():
            return
        self._uses += 1
        if self._uses == self._next_check:
            self._next_check *= 8  # a look takes a tenth of a second
            refuse_broadcast(self.cursor)

    def pending_rebuild(self, scale: float, window_blocks: int) -> int:
        """What of the table does not fit this scale or window."""
        if self._scale != scale:
            return ops.REBUILD_TABLE
        if self._summed_window != window_blocks:
            return ops.REBUILD_WINDOW
        return ops.REBUILD_NOTHING

    def vectors_changed(self, rebuild: bool = True) -> None:
        """Note that banked vectors are no longer those of the table.

        Args:
            rebuild: compute the table anew before it is used; otherwise it stays as it is, and with
                it the scores among banked vectors.
        """
        if rebuild:
            self._scale = None
        self.restore_mirror(rebuild)

    @torch.no_grad()
    def restore_mirror(self, rebuild: bool = True) -> None:
        """Give the mirror, if there is one, what this bank holds; its table is rebuilt later."""
        mirror = self.mirror
        if mirror is None:
            return
        mirror.bank_queries.copy_(self.bank_passages[:, 0])
        mirror.bank_passages[:, 0].copy_(self.bank_queries)
        mirror.bank_ids.copy_(self.bank_ids[:, :1])
        mirror.cursor.copy_(self.cursor)
        mirror.means.copy_(self.means[:, :2].flip(1))
        mirror._has_ids, mirror._manual_offsets = self._has_ids, self._manual_offsets
        if rebuild:
            mirror._scale = None

    def accept(self, scale: float, window_blocks: int, has_ids: bool | None) -> None:
        """Note that the op has succeeded: its table fits, and ids were given or not."""
        if (self._scale, self._summed_window) != (scale, window_blocks):  # setting is not cheap
            self._scale, self._summed_window = scale, window_blocks
        if has_ids not in (None, self._has_ids):
            self._has_ids = has_ids

    def get_extra_state(self) -> Tensor:
        """(11,) float64: what is not a buffer; -1 for None."""
        has_ids = -1 if self._has_ids is None else int(self._has_ids)
        window = -1 if self._window is None else self._window
        scale = -1.0 if self._scale is None else self._scale
        state = (scale, has_ids, window, self._summed_window, int(self._manual_offsets))
        return torch.tensor((*state, *self._identity()), dtype=torch.float64)

    def _identity(self) -> tuple[float, ...]:
        """What must be the same for a state to mean the same, beside the buffers' shapes."""
        table = self.layout
        decay = self.drift_decay if self.drift == "mean" else -1.0
        sizes = (table.group, table.offset_block, table.block)
        return (DRIFT.index(self.drift), *sizes, decay, int(self.anticipate))

    def set_extra_state(self, state: Tensor) -> None:
        """Take the state (11,) that ``get_extra_state`` gave."""
        scale, has_ids, window, summed, manual = state[:5].tolist()
        self._scale = None if scale < 0 else scale
        self._has_ids = None if has_ids < 0 else bool(has_ids)
        self._window = None if window < 0 else int(window)
        self._summed_window, self._manual_offsets = int(summed), bool(manual)

    def _differences(self, state_dict: dict, prefix: str) -> list[str]:
        """What makes a state that of another bank, the mirror's part included."""
        wanted = {**self._shapes(self.bank_queries.dtype), "_extra_state": ((11,), torch.float64)}
        errors = []
        for name, (shape, dtype) in wanted.items():
            given = state_dict.get(prefix + name, "missing")
            came = given if isinstance(given, str) else type(given).__name__
            if isinstance(given, Tensor):
                came = f"{tuple(given.shape)} {given.dtype}"
            if came != f"{shape} {dtype}":
                errors.append(f"{prefix}{name}: expected {shape} {dtype}, got {came}")
        if "expected" not in wanted and prefix + "expected" in state_dict:
            errors.append(f"{prefix}expected: expected none (learn_temperature=False), got some")
        if not errors:
            identity = tuple(state_dict[prefix + "_extra_state"][5:].tolist())
            if identity != self._identity():
                layout = "layout.group, layout.offset_block, layout.block"
                names = f"(drift of {DRIFT}, {layout}, drift_decay, anticipate)"
                errors.append(f"{prefix}bank: expected {names} {self._identity()}, got {identity}")
        if errors:
            errors += self._other_layout(state_dict.get(f"{prefix}_extra_state"), prefix)
        if self.mirror is not None:
            errors += self.mirror._differences(state_dict, f"{prefix}mirror.")
        elif any(key.startswith(f"{prefix}mirror.") for key in state_dict):
            errors.append(f"{prefix}mirror: expected none (symmetric=False), got one")
        return errors

    def _other_layout(self, state: object, prefix: str) -> list[str]:
        """How to make a bank that takes this extra state, if it is of another layout."""
        if not isinstance(state, Tensor) or state.shape != (11,):
            return []
        sizes = tuple(state[6:9].tolist())
        if sizes == self._identity()[1:4]:
            return []
        layout = ", ".join(f"{size:.0f}" for size in sizes)
        return [f"{prefix}bank: the state is that of a bank made with layout=BankLayout({layout})"]

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, extra, errors):
        """Refuse the state of another bank before anything is copied."""
        if self._is_mirror:  # the bank itself loads both, or neither
            return
        for part in (prefix, f"{prefix}mirror."):
            if f"{part}bank_queries" in state_dict:  # saved before there was any centering: none
                state_dict.setdefault(f"{part}centering", torch.zeros_like(self.centering))
        differences = self._differences(state_dict, prefix)
        errors += differences
        if differences:
            return
        arguments = (metadata, strict, missing, extra, errors)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if self.mirror is not None:
            nn.Module._load_from_state_dict(self.mirror, state_dict, f"{prefix}mirror.", *arguments)

    def _apply(self, fn, recurse=True):
        """Move or cast. The representations follow a cast, the table stays in its own precision."""
        before = self.bank_queries.dtype
        kept = {name: x for name, x in self._buffers.items() if name in _TABLE and x is not None}
        super()._apply(fn, recurse)
        acc = accumulation_dtype(self.bank_queries.dtype)
        for name, tensor in kept.items():
            setattr(self, name, tensor.to(device=self.bank_queries.device, dtype=acc))
        if self.bank_queries.dtype != before:
            self.vectors_changed()  # by rounding
        return self
