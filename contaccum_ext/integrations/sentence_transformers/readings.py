"""What the banks of a run show in a line of its log, and what there is to say about it."""

from __future__ import annotations

from collections.abc import Mapping

from contaccum_ext.bank import DualMemoryBank
from contaccum_ext.drift_signs import DriftWatch, ScoreShift, score_shift
from contaccum_ext.integrations.sentence_transformers.memory import BankMemory


class Readings:
    """Reads all banks, which costs a few small products and some waiting for the device.

    Args:
        memories: by the places of the losses that they are in.
    """

    def __init__(self, memories: Mapping[str, BankMemory]) -> None:
        self.memories = memories
        self.begin_run(1)

    def begin_run(self, update_size: int) -> None:
        """Begin anew, with updates of so many rows."""
        self._update_size = update_size
        self._watch = DriftWatch()

    def take(self) -> tuple[dict[str, float], list[str]]:
        """Values by their names in the log, and warnings that have not been given before."""
        values: dict[str, dict[str, float]] = {}
        shifts: list[tuple[ScoreShift, str]] = []
        said: list[str] = []
        for place, memory in self.memories.items():
            for shape, bank in memory.banks.items():
                assert isinstance(bank, DualMemoryBank)
                found: dict[str, float] = {"bank_filled": len(bank)}
                slots = memory.staleness.get(shape)
                if slots is not None:
                    found["bank_window"] = bank.used
                    found["bank_staleness"] = slots.staleness
                    said += self._watch.window(bank, slots.within_limit(), self._update_size)
                shift = score_shift(bank, self._update_size)
                if shift is not None:
                    found |= {"bank_score_gap": shift.gap, "bank_score_spread": shift.spread}
                    shifts.append((shift, memory.drift))
                values[f"{place}.{shape}".lstrip(".")] = found
        worst = max(shifts, key=lambda pair: pair[0].size, default=(None, ""))
        said += self._watch.scores(*worst)
        return {
            key if len(values) == 1 else f"{key}_{name}": value
            for name, found in values.items()
            for key, value in found.items()
        }, said
