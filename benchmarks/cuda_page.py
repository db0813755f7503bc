"""The result of ``python -m benchmarks op --device cuda``: rows, page and a summary."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import MIB
from benchmarks.cuda_op import CudaMeasured, CudaResult
from benchmarks.op import Target
from benchmarks.peers import OURS
from benchmarks.report import VERDICTS, number, table, what_is_compared

_METHOD = """\
`ms` is the median, p20 and p80 of eager steps (loss, both gradients, enqueue, called from Python):
CUDA events around bursts of up to 64 steps back to back, divided by their number, so whichever of
host and device is slower decides. `host ms` is the host's clock until the last call of a burst has
returned, divided likewise; where it equals `ms`, Python and launches are what is waited for. `ms,
backward in the calling thread` is `ms` within `torch.autograd.set_multithreading_enabled(False)`:
by default autograd runs the backward of CUDA tensors in a thread of its own, and the hand-over to
it and back is part of `ms`. What it costs on this host is under "The host's own floor".

`graph` is `ms` in a replayed CUDA graph of several steps, events around replays. Banks and batches
are rotated: 16 batches, and as many full banks as together have twice the bytes of the L2 cache, so
no step finds its bank there. Peers take turns.

TFLOP/s counts the 8nFmd operations and TB/s the one reading of both banks that the loss needs at
least, whatever a peer does besides; the floor is the longer of both at the ceilings below. `peak
MiB` is what the allocator had at the peak of a step beyond banks, table and batches (a library's
workspace, allocated once, is not in it). The errors are relative ones of loss, dq and dp against
float64 over three steps on 512 slots, checked before timing."""
_CALLING = "backward in the calling thread"


@dataclass(frozen=True)
class CudaRow:
    """One peer on one case. Empty where it was not measured; `note` says why."""

    label: str
    peer: str
    slots: int  # F
    n: int
    d: int
    m: int
    dtype: str  # of the peer's bank and batch
    drift: str
    banks_in_rotation: int
    steps: int | None
    ms_median: float | None
    ms_p20: float | None
    ms_p80: float | None
    host_ms: float | None
    calling_thread_ms: float | None  # eager too, with the backward in the calling thread
    calling_thread_ms_p20: float | None
    calling_thread_ms_p80: float | None
    calling_thread_host_ms: float | None
    graph_ms: float | None
    graph_ms_p20: float | None
    graph_ms_p80: float | None
    target_ms: float | None
    graph_target_ms: float | None
    tflops_per_s: float | None  # of the 8nFmd operations that are needed, whatever the peer does
    tbytes_per_s: float | None  # of reading both banks once, in the case's dtype
    floor_ms: float
    times_floor: float | None
    extra_mib: float | None  # peak beyond banks, table and batches
    bank_mib: float
    table_mib: float | None
    error_loss: float | None
    error_dq: float | None
    error_dp: float | None
    fill_s: float | None  # all banks in rotation and the first step
    note: str


def make_row(one: CudaMeasured, result: CudaResult) -> CudaRow:
    case, t, c, g, e = one.named.case, one.times, one.calling, one.graph, one.errors
    floor = result.ceilings.floor(case)
    own = one.peer.case(case)
    return CudaRow(
        label=one.named.label,
        peer=one.peer.name,
        slots=case.slots,
        n=case.n,
        d=case.d,
        m=case.m,
        dtype=own.dtype,
        drift=case.corrections,
        banks_in_rotation=one.banks,
        steps=t.steps if t else None,
        ms_median=t.median * 1e3 if t else None,
        ms_p20=t.p20 * 1e3 if t else None,
        ms_p80=t.p80 * 1e3 if t else None,
        host_ms=t.host * 1e3 if t else None,
        calling_thread_ms=c.median * 1e3 if c else None,
        calling_thread_ms_p20=c.p20 * 1e3 if c else None,
        calling_thread_ms_p80=c.p80 * 1e3 if c else None,
        calling_thread_host_ms=c.host * 1e3 if c else None,
        graph_ms=g.median * 1e3 if g else None,
        graph_ms_p20=g.p20 * 1e3 if g else None,
        graph_ms_p80=g.p80 * 1e3 if g else None,
        target_ms=one.named.target_ms if one.peer.name == OURS.name else None,
        graph_target_ms=one.named.graph_target_ms if one.peer.name == OURS.name else None,
        tflops_per_s=case.operations() / t.median / 1e12 if t else None,
        tbytes_per_s=case.bank_bytes() / t.median / 1e12 if t else None,
        floor_ms=floor * 1e3,
        times_floor=t.median / floor if t else None,
        extra_mib=None if one.extra_bytes is None else one.extra_bytes / MIB,
        bank_mib=own.bank_bytes() / MIB,
        table_mib=None if one.table_bytes is None else one.table_bytes / MIB,
        error_loss=e.loss if e else None,
        error_dq=e.dq if e else None,
        error_dp=e.dp if e else None,
        fill_s=one.fill_seconds,
        note=one.note,
    )


def targets(result: CudaResult) -> list[Target]:
    """What ours is to reach, in milliseconds, for each case with a target: eager, eager with the
    backward in the calling thread, and in a graph.
    """
    found = []
    for named in result.options.cases:
        one = result.find(named.label, OURS) or CudaMeasured(named, OURS, 0)
        for kind, wanted, times in (
            ("eager", named.target_ms, one.times),
            (f"eager, {_CALLING}", named.target_ms, one.calling),
            ("in a graph", named.graph_target_ms, one.graph),
        ):
            if wanted is None:
                continue
            value = None if times is None else times.median * 1e3
            text = f"{named.label}, {kind}: at most {wanted:g} ms"
            found.append(Target(text, value, None if value is None else value <= wanted))
    return found


def compose(header: dict[str, str], result: CudaResult) -> str:
    """Markdown: targets first, then every case, then what was compared and how."""
    parts = [
        "# Loss + backward + enqueue on a GPU",
        "\n".join(f"- {key}: {value}" for key, value in header.items()),
        "## Targets\n\n" + _targets(result),
        "## How it was measured\n\n" + _METHOD,
        _ceilings(result),
        "## The host's own floor\n\n" + _host_floor(result),
        *(_case(named.label, result) for named in result.options.cases),
        what_is_compared(result.options.peers),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(result: CudaResult) -> str:
    """Targets, and a line for each case: ours, and every peer as a multiple of ours."""
    peers = [peer for peer in result.options.peers if peer.name != OURS.name]
    lines = []
    for named in result.options.cases:
        ours = result.find(named.label, OURS)
        if ours is None:
            continue
        row = make_row(ours, result)
        line = [named.label, number(row.ms_median, 4), number(row.calling_thread_ms, 4)]
        line += [number(row.graph_ms, 4)]
        line += [number(row.floor_ms, 4), number(row.times_floor), number(row.extra_mib)]
        for peer in peers:
            line.append(_times_ours(result.find(named.label, peer), ours))
        lines.append(line)
    head = ["case", "ours ms", f"ours ms, {_CALLING}", "graph ms", "floor ms", "ours / floor"]
    head += ["peak MiB", *(peer.name for peer in peers)]
    return f"{_targets(result)}\n\n{_host_floor(result)}\n\n{table(head, lines)}"


def _times_ours(one: CudaMeasured | None, ours: CudaMeasured) -> str:
    if one is None or one.times is None or ours.times is None:
        return "-"
    return f"x{number(one.times.median / ours.times.median)}"


def _targets(result: CudaResult) -> str:
    lines = [
        [target.text, number(target.value), VERDICTS[target.passed]] for target in targets(result)
    ]
    return table(["target", "ms", "verdict"], lines) if lines else ""


def _ceilings(result: CudaResult) -> str:
    lines = [
        [name, f"{number(rate / 1e12)} {unit}"]
        for rates, unit in (
            (result.ceilings.reading, "TB/s"),
            (result.ceilings.multiplying, "TFLOP/s"),
        )
        for name, rate in rates.items()
    ]
    text = "Best bursts, at the start and at the end of this run."
    return "## Ceilings\n\n" + text + "\n\n" + table(["ceiling", "rate"], lines)


def _host_floor(result: CudaResult) -> str:
    floor = result.host_floor
    lines = [
        [name, number(times.median * 1e3, 4), number(times.host * 1e3, 4)]
        for name, times in (("eager", floor.times), (f"eager, {_CALLING}", floor.calling))
    ]
    return table(["(x * 2).sum().backward(), x one number", "ms", "host ms"], lines)


def _case(label: str, result: CudaResult) -> str:
    rows = [make_row(one, result) for one in result.measured if one.named.label == label]
    if not rows:
        return ""
    first = rows[0]
    lines = []
    for row in rows:
        errors = [f"{e:.0e}" for e in (row.error_loss, row.error_dq, row.error_dp) if e is not None]
        lines.append(
            [
                row.peer,
                number(row.ms_median, 4),
                f"{number(row.ms_p20, 4)} .. {number(row.ms_p80, 4)}" if row.steps else "-",
                number(row.host_ms),
                number(row.calling_thread_ms, 4),
                number(row.graph_ms, 4),
                number(row.tflops_per_s),
                number(row.tbytes_per_s),
                number(row.times_floor),
                number(row.extra_mib),
                number(row.table_mib),
                " / ".join(errors) or "-",
                row.note,
            ]
        )
    head = ["", "ms", "p20 .. p80", "host ms", f"ms, {_CALLING}", "graph", "TFLOP/s", "TB/s"]
    head += ["/ floor", "peak MiB", "table MiB", "errors", "note"]
    title = (
        f"## {label}: n={first.n}, m={first.m}, d={first.d}, F={first.slots:,}, drift={first.drift}"
    )
    banks = f"{first.banks_in_rotation} bank{'s' if first.banks_in_rotation > 1 else ''}"
    text = f"Floor {number(first.floor_ms, 4)} ms; in rotation {banks}"
    text += f" of {number(first.bank_mib)} MiB."
    return title + "\n\n" + text + "\n\n" + table(head, lines)
