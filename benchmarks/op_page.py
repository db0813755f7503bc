"""The result of ``python -m benchmarks op`` as a page to read."""

from __future__ import annotations

from benchmarks.cases import MIB
from benchmarks.lap import LapResult
from benchmarks.op import Measured, OpResult, linearity, targets
from benchmarks.peers import FULL_MATRIX, LINEAR_TORCH, OURS
from benchmarks.report import last_level_cache_bytes, number, table, what_is_compared


def compose(header: dict[str, str], result: OpResult) -> str:
    """Markdown: targets first, then what they were read from."""
    case = result.options.case
    title = (
        f"# Loss + backward + enqueue: n={case.n}, d={case.d}, m={case.m}, {case.dtype}, "
        f"drift={case.drift}"
    )
    parts = [
        title,
        "\n".join(f"- {key}: {value}" for key, value in header.items()),
        _targets(result),
        _times(result),
        _rates(result),
    ]
    if result.options.memory:
        parts.append(_memory(result))
    peers = what_is_compared(result.options.peers)
    parts += [_linearity(result), _lap(result.lap), peers, _ceilings(result)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _targets(result: OpResult) -> str:
    verdicts = {True: "pass", False: "FAIL", None: "not measured"}
    lines = [
        [target.text, number(target.value), verdicts[target.passed]] for target in targets(result)
    ]
    return "## Targets\n\n" + table(["target", "times", "verdict"], lines)


def _ms(one: Measured | None) -> str:
    if one is None:
        return "-"
    return number(one.timing.median * 1e3) if one.timing else one.note


def _over(a: Measured | None, b: Measured | None) -> str:
    if a is None or b is None or a.timing is None or b.timing is None:
        return "-"
    return number(a.timing.median / b.timing.median)


def _times(result: OpResult) -> str:
    lines = []
    for one in result.of(OURS):
        assert one.timing is not None
        t, floor = one.timing, one.ceilings.floor(one.case)
        full = result.find(FULL_MATRIX, one.case.slots)
        linear = result.find(LINEAR_TORCH, one.case.slots)
        lines.append(
            [
                str(one.case.slots),
                number(t.median * 1e3),
                f"{number(t.p20 * 1e3)} .. {number(t.p80 * 1e3)}",
                number(floor * 1e3),
                number(t.median / floor),
                _ms(linear),
                _over(linear, one),
                _ms(full),
                _over(full, one),
            ]
        )
    head = ["F", "ours", "p20 .. p80", "floor", "ours / floor", "linear PyTorch"]
    head += ["/ ours", "full matrix", "/ ours"]
    return "## Time, milliseconds a step\n\n" + table(head, lines)


def _rates(result: OpResult) -> str:
    cache = last_level_cache_bytes()
    lines = []
    for one in result.of(OURS):
        assert one.timing is not None
        t, case = one.timing, one.case
        bank = case.bank_bytes()
        where = "-" if cache is None else "cache" if bank <= cache else "memory"
        reading, multiplying = one.ceilings.best_reading(), one.ceilings.best_multiplying()
        lines.append(
            [
                str(case.slots),
                number(bank / MIB),
                where,
                number(t.cpu_mean * 1e3),
                number(case.operations() / t.median / 1e9),
                number(multiplying[1] / 1e9),
                number(bank / t.median / 1e9),
                number(reading[1] / 1e9),
                str(t.repetitions),
            ]
        )
    head = ["F", "banks MiB", "they fit", "processor ms", "GFLOP/s", "at best"]
    head += ["GB/s", "at best", "steps timed"]
    text = (
        "Operations are the 8nFmd that scores and gradients need, bytes one reading of both banks; "
        "what ours does besides, for its table, is not counted. 'cache': both banks fit the "
        "last-level cache, which other parts of a training step would use as well. Processor time "
        "is the sum over threads; where it is far from milliseconds times threads, something else "
        "was running."
    )
    return "## Ours: rates\n\n" + table(head, lines) + "\n\n" + text


def _memory(result: OpResult) -> str:
    def extra(one: Measured | None) -> str:
        if one is None:
            return "-"
        if one.extra_bytes is not None:
            return number(one.extra_bytes / MIB)
        return one.note or "-"

    lines = []
    for one in result.of(OURS):
        linear = result.find(LINEAR_TORCH, one.case.slots)
        full = result.find(FULL_MATRIX, one.case.slots)
        lines.append(
            [
                str(one.case.slots),
                number(one.case.bank_bytes() / MIB),
                number(None if one.table_bytes is None else one.table_bytes / MIB),
                extra(one),
                number(linear.table_bytes / MIB if linear and linear.table_bytes else None),
                extra(linear),
                extra(full),
            ]
        )
    head = ["F", "banks", "our table", "ours", "its table", "linear PyTorch", "full matrix"]
    text = "Peak of a step beyond banks, table and batch; each case in a fresh process."
    return "## Memory, MiB\n\n" + text + "\n\n" + table(head, lines)


def _linearity(result: OpResult) -> str:
    ours = [one for one in result.of(OURS) if one.timing]
    slots = [one.case.slots for one in ours]
    seconds = [one.timing.median for one in ours if one.timing]
    fit = linearity(slots, seconds)
    if fit is None:
        return ""
    lines = [
        [str(f), number(t * 1e3 / (f / 1024)), number((fit.constant + fit.slope * f) * 1e3)]
        for f, t in zip(slots, seconds, strict=True)
    ]
    text = (
        f"Least squares: {number(fit.constant * 1e3)} ms + {number(fit.slope * 1024e3)} ms per "
        f"1,024 slots; time grows as F to the power {number(fit.exponent)}."
    )
    head = ["F", "ms per 1,024 slots", "line, ms"]
    return "## Linear in F\n\n" + text + "\n\n" + table(head, lines)


def _lap(lap: LapResult | None) -> str:
    if lap is None:
        return ""
    lines = [
        [what, number(seconds * 1e3), number(seconds / lap.median)]
        for what, seconds in (
            ("median step", lap.median),
            ("99th percentile", lap.p99),
            ("median step into another block of the table", lap.crossing_median),
            ("slowest step", lap.slowest),
        )
        if seconds is not None
    ]
    where = "into another block" if lap.slowest_crosses else "within a block"
    text = (
        f"{len(lap.steps)} steps of a lap at F = {lap.case.slots}, {sum(lap.crossing)} of them "
        f"into another block; at each the fastest of {lap.laps} laps, so that what disturbs from "
        f"outside counts only if it did so in every lap. The slowest step was one {where}."
    )
    head = ["of one lap", "ms", "/ median"]
    return "## No step is slow\n\n" + text + "\n\n" + table(head, lines)


def _ceilings(result: OpResult) -> str:
    ours = result.of(OURS)
    if not ours:
        return ""
    largest = ours[-1]
    lines = [
        ["reading", name, number(rate / 1e9)] for name, rate in largest.ceilings.reading.items()
    ]
    lines += [
        ["multiplying", name, number(rate / 1e9)]
        for name, rate in largest.ceilings.multiplying.items()
    ]
    text = f"Best of all repetitions; reading at F = {largest.case.slots}. GB/s and GFLOP/s."
    return "## Ceilings\n\n" + text + "\n\n" + table(["ceiling", "method", "rate"], lines)
