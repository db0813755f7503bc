"""``python -m benchmarks op``: the op and its peers over a range of bank sizes, time and memory."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

from benchmarks import memory
from benchmarks.cases import Batches, Case, make_vectors
from benchmarks.ceilings import Ceilings, measure_multiplying, measure_reading
from benchmarks.lap import LapResult, run_lap
from benchmarks.measure import Timing, time_calls
from benchmarks.peers import OURS, PEERS, Peer

SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
TARGET_CASE = Case(32768)


@dataclass(frozen=True)
class OpOptions:
    case: Case  # its number of slots is replaced by each of `sizes`
    sizes: tuple[int, ...] = SIZES
    peers: tuple[Peer, ...] = PEERS
    threads: int = 1
    seconds: float = 3.0  # per peer and size
    rounds: int = 3  # that time is spent in turns, so that a disturbance meets everyone
    step_limit: float = 120.0  # seconds: a step expected to take longer is not run
    memory: bool = True
    lap_slots: int | None = None  # bank size of the lap; None for no lap
    laps: int = 2


@dataclass
class Measured:
    """One peer at one size; what was not measured is None and `note` says why."""

    peer: Peer
    case: Case
    ceilings: Ceilings
    timing: Timing | None = None
    table_bytes: int | None = None
    extra_bytes: int | None = None
    note: str = ""


@dataclass
class OpResult:
    options: OpOptions
    measured: list[Measured] = field(default_factory=list)
    lap: LapResult | None = None

    def find(self, peer: Peer, slots: int) -> Measured | None:
        for one in self.measured:
            if one.peer.name == peer.name and one.case.slots == slots:
                return one
        return None

    def of(self, peer: Peer) -> list[Measured]:
        return [one for one in self.measured if one.peer.name == peer.name]


def run(options: OpOptions) -> OpResult:
    """Measure every size, smallest first: it tells what a quadratic peer takes at the next."""
    result = OpResult(options)
    for slots in sorted(options.sizes):
        case = options.case.with_slots(slots)
        say(f"F = {slots}:")
        result.measured += _measure_times(result, case)
        if options.memory:
            for one in result.measured[-len(options.peers) :]:
                _measure_memory(one, options)
    share_products(result.measured)
    if options.lap_slots:
        case = options.case.with_slots(options.lap_slots)
        say(f"F = {case.slots}: {options.laps} laps, step by step")
        result.lap = run_lap(case, options.laps)
    return result


def share_products(measured: list[Measured]) -> None:
    """Hold every size to the best product of the whole run: its rate does not hang on the bank.

    Reading does, by where the bank fits, and stays each size's own.
    """
    best = Ceilings({}, {})
    for one in measured:
        best = best.raised_by(one.ceilings)
    for one in measured:
        one.ceilings = Ceilings(one.ceilings.reading, best.multiplying)


def say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def expected_seconds(peer: Peer, case: Case, smaller: list[Measured]) -> float:
    """Of a quadratic peer's step, from its largest size so far; 0 where nothing is known."""
    timed = [one for one in smaller if one.timing]
    if not peer.quadratic_copies or not timed:
        return 0.0
    last = max(timed, key=lambda one: one.case.slots)
    assert last.timing is not None
    return last.timing.median * (case.slots / last.case.slots) ** 2


def _refusal(peer: Peer, case: Case, expected: float, limit: float) -> str:
    """Why the case is not run, or nothing."""
    short_of_memory = memory.refusal(peer, case)
    if short_of_memory:
        return short_of_memory
    if expected > limit:
        return f"not run: about {expected:.0f} s a step expected, limit {limit:.0f} s"
    return ""


def _measure_times(result: OpResult, case: Case) -> list[Measured]:
    options = result.options
    vectors, batches = make_vectors(case, case.slots, seed=0), Batches(case)
    ceilings = Ceilings({}, {})
    measured, steppers, slow = [], {}, {}
    for peer in options.peers:
        expected = expected_seconds(peer, case, result.of(peer))
        note = _refusal(peer, case, expected, options.step_limit)
        measured.append(Measured(peer, case, ceilings, note=note))
        slow[peer.name] = expected > options.seconds
        if not note:
            steppers[peer.name] = peer.build(case)
            steppers[peer.name].fill(*vectors)
    del vectors
    each = options.seconds / options.rounds
    for turn in range(options.rounds):
        ceilings = ceilings.raised_by(
            Ceilings(measure_reading(case, each), measure_multiplying(case, each))
        )
        for one in measured:
            stepper = steppers.get(one.peer.name)
            if stepper is None or (turn and slow[one.peer.name]):
                continue
            step = lambda s=stepper: s.step(*batches.next())  # noqa: E731
            if slow[one.peer.name]:
                timing = time_calls(step, options.seconds, warmup=0, at_least=2)
            else:
                timing = time_calls(step, each, warmup=1 if turn else 3)
            one.timing = timing if one.timing is None else one.timing + timing
    for one in measured:
        one.ceilings = ceilings
        if one.timing:
            one.table_bytes = steppers[one.peer.name].table_bytes()
        say(f"  {one.peer.name:15s} {_told(one)}")
    return measured


def _told(one: Measured) -> str:
    if one.timing is None:
        return one.note
    t = one.timing
    return (
        f"{t.median * 1e3:9.3f} ms  (p20 {t.p20 * 1e3:.3f}, p80 {t.p80 * 1e3:.3f}, "
        f"{t.repetitions} steps)  floor {one.ceilings.floor(one.case) * 1e3:.3f} ms"
    )


def _measure_memory(one: Measured, options: OpOptions) -> None:
    if one.timing is None:
        return
    try:
        peak = memory.measure_peak(one.peer, one.case, options.threads, 10 * options.step_limit)
    except RuntimeError as error:
        one.note = str(error)
        return
    one.extra_bytes = peak.extra_bytes
    if not peak.exact:
        one.note = "memory: only growth beyond the peak of filling the bank could be seen"
    say(f"  {one.peer.name:15s} {peak.extra_bytes / 2**20:9.1f} MiB beyond bank, table and batch")


@dataclass(frozen=True)
class Target:
    text: str
    value: float | None  # a ratio; None where its case was not measured
    passed: bool | None


def targets(result: OpResult) -> list[Target]:
    """What is to be reached at n=8, d=384, m=1, fp32, F=32768 on two cores."""
    case = TARGET_CASE
    ours = peer = None
    if result.options.case.with_slots(case.slots) == case:
        ours = result.find(OURS, case.slots)
        peer = next((p for p in result.options.peers if p.quadratic_copies), None)
    full = result.find(peer, case.slots) if peer else None
    faster = over_floor = None
    if ours and ours.timing:
        over_floor = ours.timing.median / ours.ceilings.floor(case)
        if full and full.timing:
            faster = full.timing.median / ours.timing.median
    at = f"F = {case.slots}"
    return [
        Target(
            f"{at}: at least 200 times faster than the full matrix",
            faster,
            None if faster is None else faster >= 200,
        ),
        Target(
            f"{at}: within 3 times of the floor",
            over_floor,
            None if over_floor is None else over_floor <= 3,
        ),
    ]


@dataclass(frozen=True)
class Linearity:
    """Least squares of our median times: seconds = constant + slope F, and the power of F."""

    constant: float
    slope: float
    exponent: float


def linearity(slots: list[int], seconds: list[float]) -> Linearity | None:
    """None for fewer than two sizes."""
    if len(slots) < 2:
        return None
    slope, constant = _line([float(f) for f in slots], seconds)
    exponent, _ = _line([math.log(f) for f in slots], [math.log(t) for t in seconds])
    return Linearity(constant, slope, exponent)


def _line(x: list[float], y: list[float]) -> tuple[float, float]:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    variance = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / variance
    return slope, mean_y - slope * mean_x
