"""``python -m benchmarks op --device cuda``: the op and its peers on a GPU, case by case."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.agreement import LIMIT, Errors, measure_errors
from benchmarks.cases import Case
from benchmarks.ceilings import Ceilings
from benchmarks.cuda_cases import (
    CASES,
    HostFloor,
    NamedCase,
    Rotation,
    banks_in_rotation,
    measure_ceilings,
    measure_host_floor,
)
from benchmarks.cuda_peers import CUDA_PEERS
from benchmarks.device import (
    Device,
    StepTimes,
    backward_in_calling_thread,
    time_steps,
    told,
)
from benchmarks.op import say
from benchmarks.peers import OURS, Peer


@dataclass(frozen=True)
class CudaOptions:
    cases: tuple[NamedCase, ...] = CASES
    peers: tuple[Peer, ...] = CUDA_PEERS
    seconds: float = 0.5  # for each peer and case, and again with the backward in the same thread
    rounds: int = 2  # that time is spent in turns, so that a change of clock meets everyone
    step_limit: float = 1.0  # seconds: a step expected to take longer is not run
    budget: float = math.inf  # seconds: once they are spent, only ours is measured
    memory: bool = True
    graph: bool = True
    ceiling_size: int = 8192
    ceiling_bytes: int = 2 << 30


@dataclass
class CudaMeasured:
    """One peer on one case; what was not measured is None and `note` says why."""

    named: NamedCase
    peer: Peer
    banks: int  # in rotation
    errors: Errors | None = None
    times: StepTimes | None = None
    calling: StepTimes | None = None  # the same with the backward in the calling thread
    graph: StepTimes | None = None
    extra_bytes: int | None = None
    table_bytes: int | None = None
    fill_seconds: float | None = None
    note: str = ""


@dataclass
class CudaResult:
    options: CudaOptions
    ceilings: Ceilings
    host_floor: HostFloor
    measured: list[CudaMeasured] = field(default_factory=list)

    def find(self, label: str, peer: Peer) -> CudaMeasured | None:
        for one in self.measured:
            if one.named.label == label and one.peer.name == peer.name:
                return one
        return None


def run(
    options: CudaOptions, device: Device, after_case: Callable[[CudaResult], None]
) -> CudaResult:
    """Measure all cases in order; `after_case` may write what there is so far."""
    runner = _Runner(options, device)
    for named in options.cases:
        say(f"{named.label}: {named.case}")
        runner.measure_case(named)
        after_case(runner.result)
    runner.raise_ceilings()
    after_case(runner.result)
    return runner.result


def quadratic_work(case: Case) -> float:
    """(n + F)^2 m d: what the time of a quadratic peer grows with."""
    return float(case.n + case.slots) ** 2 * case.m * case.d


def expected_seconds(peer: Peer, case: Case, result: CudaResult) -> float:
    """Of a quadratic peer's step: from its largest case so far, and at least its three products."""
    if not peer.quadratic_time:
        return 0.0
    work = quadratic_work(case)
    least = 6 * work / result.ceilings.best_multiplying()[1]
    timed = [one for one in result.measured if one.times and one.peer.name == peer.name]
    if not timed:
        return least
    last = max(timed, key=lambda one: quadratic_work(one.named.case))
    assert last.times is not None
    return max(least, last.times.median * work / quadratic_work(last.named.case))


class _Runner:
    def __init__(self, options: CudaOptions, device: Device) -> None:
        self._options, self._device = options, device
        self._start = time.monotonic()
        self._errors: dict[tuple[str, int, int, str], Errors] = {}
        self.result = CudaResult(
            options, self._ceilings(), measure_host_floor(device, options.seconds)
        )

    def _ceilings(self) -> Ceilings:
        options = self._options
        return measure_ceilings(self._device, options.ceiling_size, options.ceiling_bytes)

    def raise_ceilings(self) -> None:
        """Measure them once more: the card may have been throttled at the start."""
        self.result.ceilings = self.result.ceilings.raised_by(self._ceilings())

    def measure_case(self, named: NamedCase) -> None:
        """Every peer of the case, in turns; whatever fails is a note."""
        banks = banks_in_rotation(named.case, self._device.cache_bytes())
        peers = [peer for peer in self._options.peers if peer in named.peers]
        measured = [CudaMeasured(named, peer, banks) for peer in peers]
        self.result.measured += measured
        rotations: dict[str, Rotation] = {}
        for one in measured:
            one.note = self._refusal(one.peer, named.case)
            if not one.note:
                self._guarded(one, rotations, self._prepare)
        for turn in range(self._options.rounds):
            for one in measured:
                if one.peer.name in rotations:
                    self._guarded(one, rotations, self._time, turn)
        for one in measured:
            if one.peer.name in rotations:
                self._guarded(one, rotations, self._finish)
            say(f"  {one.peer.name:20s} {_line(one)}")
        torch.set_float32_matmul_precision("highest")
        rotations.clear()
        self._device.release()

    def _refusal(self, peer: Peer, case: Case) -> str:
        """Why the case is not run, or nothing."""
        needed = peer.peak_bytes(case)
        gib = f"{needed / 2**30:,.1f} GiB of matrices"
        if needed > self._device.total_bytes():
            return f"impossible: {gib}"
        if needed > 0.9 * self._device.free_bytes():
            return f"out of memory: would need {gib}"
        limit, expected = self._options.step_limit, expected_seconds(peer, case, self.result)
        if expected > limit:
            return f"not run: about {expected:.1f} s a step expected, limit {limit:g} s"
        if peer.name != OURS.name and time.monotonic() - self._start > self._options.budget:
            return f"not run: the {self._options.budget:g} s of the run were spent"
        return ""

    def _guarded(self, one: CudaMeasured, rotations: dict, call: Callable, *arguments) -> None:
        torch.set_float32_matmul_precision(one.peer.precision)
        try:
            call(one, rotations, *arguments)
        except Exception as error:
            one.note = told(error)
            rotations.pop(one.peer.name, None)
        if one.note:
            gc.collect()  # the failed call's frames, once their exception is gone
        self._device.release()

    def _prepare(self, one: CudaMeasured, rotations: dict) -> None:
        case = one.named.case
        one.errors = self._errors_of(one.peer, case)
        if not one.errors.small:
            one.note = f"wrong: an error is above {LIMIT:g}; not timed"
            return
        start = time.perf_counter()
        rotation = Rotation(one.peer, case, self._device, one.banks)
        float(rotation.step())  # to the end of all that
        one.fill_seconds = time.perf_counter() - start
        one.table_bytes = rotation.steppers[0].table_bytes()
        rotations[one.peer.name] = rotation

    def _errors_of(self, peer: Peer, case: Case) -> Errors:
        key = (peer.name, case.d, case.m, case.corrections)
        if key not in self._errors:
            self._errors[key] = measure_errors(peer, case, self._device.name)
        return self._errors[key]

    def _time(self, one: CudaMeasured, rotations: dict, turn: int) -> None:
        seconds = self._options.seconds / self._options.rounds
        if turn and one.times and one.times.median > seconds / 4:
            return  # three slow steps are enough
        step, warmup = rotations[one.peer.name].step, 1 if turn else 3
        times = time_steps(self._device, step, seconds, warmup=warmup)
        one.times = times if one.times is None else one.times + times
        with backward_in_calling_thread():
            calling = time_steps(self._device, step, seconds, warmup=1)
        one.calling = calling if one.calling is None else one.calling + calling

    def _finish(self, one: CudaMeasured, rotations: dict) -> None:
        """Peak memory, and ours in a graph."""
        rotation = rotations.pop(one.peer.name)
        assert one.times is not None
        if self._options.memory:
            # Ours and the linear peer have steps of several kinds.
            count = 1 if one.peer.quadratic_time else max(2, min(32, int(0.5 / one.times.median)))
            one.extra_bytes = self._device.peak_extra(rotation.step, count)
        if self._options.graph and one.peer.name == OURS.name:
            one.graph = self._time_graph(one, rotation)

    def _time_graph(self, one: CudaMeasured, rotation: Rotation) -> StepTimes | None:
        assert one.times is not None
        # Whole turns through the banks, some 16 steps unless those take long.
        wanted = max(1, min(16, round(0.05 / one.times.median)))
        count = one.banks * math.ceil(wanted / one.banks)
        replay = self._device.graph(rotation.step, count)
        if replay is None:
            return None
        times = time_steps(self._device, replay, self._options.seconds)
        return StepTimes(
            tuple(seconds / count for seconds in times.elapsed),
            tuple(seconds / count for seconds in times.issued),
            times.steps * count,
        )


def _line(one: CudaMeasured) -> str:
    if one.times is None:
        return one.note
    t = one.times
    calling = f", in one thread {one.calling.median * 1e3:.4f}" if one.calling else ""
    graph = f", in a graph {one.graph.median * 1e3:.4f}" if one.graph else ""
    return (
        f"{t.median * 1e3:9.4f} ms (p20 {t.p20 * 1e3:.4f}, p80 {t.p80 * 1e3:.4f}, "
        f"host {t.host * 1e3:.4f}, {t.steps} steps){calling}{graph} {one.note}"
    )
