"""Whether any step is slow: a whole lap around the ring, timed step by step.

The table's upkeep is meant to be spread over the steps; a lap has every kind of step in it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from benchmarks.cases import Batches, Case, make_vectors
from benchmarks.measure import percentile
from benchmarks.peers import Ours


@dataclass(frozen=True)
class LapResult:
    """Seconds at each position of the ring: the fastest of all laps there.

    A disturbance from outside meets a position in one lap; what the op itself does there, in each.
    """

    case: Case
    laps: int
    steps: tuple[float, ...]
    crossing: tuple[bool, ...]  # the step moves head into the next block of the table

    @property
    def median(self) -> float:
        return percentile(self.steps, 50)

    @property
    def p99(self) -> float:
        return percentile(self.steps, 99)

    @property
    def slowest(self) -> float:
        return max(self.steps)

    @property
    def slowest_crosses(self) -> bool:
        return self.crossing[self.steps.index(self.slowest)]

    @property
    def crossing_median(self) -> float | None:
        """Of the steps into another block; None if a lap has none."""
        crossing = [s for s, crosses in zip(self.steps, self.crossing, strict=True) if crosses]
        return percentile(crossing, 50) if crossing else None


def crossing_steps(capacity: int, block: int, n: int) -> list[bool]:
    """For the ceil(C / n) steps of a lap that starts at slot 0: does head leave its block?

    A batch that reaches the last slot of the ring also ends the ring's last block, however short.
    """
    crossing = []
    for head in range(0, capacity, n):
        first, behind_last = head // block, head + n
        crossing.append(behind_last >= capacity or behind_last // block != first)
    return crossing


def run_lap(case: Case, laps: int) -> LapResult:
    """Time each step of `laps` laps around a full bank."""
    ours, batches = Ours(case), Batches(case)
    ours.fill(*make_vectors(case, case.slots, seed=0))
    crossing = crossing_steps(case.slots, ours.bank.layout.block, case.n)
    best = [float("inf")] * len(crossing)
    if case.slots % case.n:
        raise ValueError(f"lap: expected n to divide the slots, got {case.n} and {case.slots}")
    for lap in range(laps):
        for i in range(len(best)):
            batch = batches.next()
            start = time.perf_counter()
            ours.step(*batch)
            seconds = time.perf_counter() - start
            # The very first steps also start threads and touch scratch for the first time.
            if lap or i >= 3 or laps == 1:
                best[i] = min(best[i], seconds)
    return LapResult(case, laps, tuple(best), tuple(crossing))
