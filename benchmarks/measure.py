"""Timing: one call after another, wall clock and processor time, with median, p20 and p80."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the sorted values lie, linear between neighbours."""
    if not values:
        raise ValueError("values: expected at least one, got none")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent: expected 0 to 100, got {percent}")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True)
class Timing:
    """Repetitions of one step. All numbers in seconds."""

    wall: tuple[float, ...] = ()
    cpu_total: float = 0.0  # of all repetitions and all threads of the process

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.wall + other.wall, self.cpu_total + other.cpu_total)

    @property
    def repetitions(self) -> int:
        return len(self.wall)

    @property
    def median(self) -> float:
        return percentile(self.wall, 50)

    @property
    def p20(self) -> float:
        return percentile(self.wall, 20)

    @property
    def p80(self) -> float:
        return percentile(self.wall, 80)

    @property
    def cpu_mean(self) -> float:
        return self.cpu_total / len(self.wall)


def time_calls(
    call: Callable[[], object],
    seconds: float,
    *,
    warmup: int = 3,
    at_least: int = 3,
    at_most: int = 100_000,
) -> Timing:
    """Repeat `call` for about `seconds`.

    Args:
        call: one step, to its end (a device's call must synchronise).
        seconds: stop after the first repetition that ends later than this.
        warmup: repetitions before, not counted: thread pools, page tables, library buffers.
        at_least, at_most: repetitions, whatever the time.
    """
    for _ in range(warmup):
        call()
    wall: list[float] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        # Over all repetitions: the clock learns of other running threads only at scheduler ticks.
        cpu_start, end = time.process_time(), time.perf_counter() + seconds
        while len(wall) < at_least or (time.perf_counter() < end and len(wall) < at_most):
            start = time.perf_counter()
            call()
            wall.append(time.perf_counter() - start)
        cpu_total = time.process_time() - cpu_start
    finally:
        if collecting:
            gc.enable()
    return Timing(tuple(wall), cpu_total)
