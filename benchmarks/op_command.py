"""``python -m benchmarks op``: its arguments, and what becomes of the results."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import cuda_cases, cuda_op, cuda_page, op, op_page, report
from benchmarks.arguments import add_out, names, positive, sizes
from benchmarks.cases import DTYPES, Case
from benchmarks.cuda_peers import CUDA_PEERS, PACKAGES
from benchmarks.device import open_device
from benchmarks.peers import OURS, PEERS, Peer
from benchmarks.plot import scaling_plot

_SHAPES = {"cpu": Case(0), "cuda": cuda_cases.SWEEP_CASE}
_DESCRIPTION = """\
On the CPU: times loss + backward + enqueue for each bank size, ours and its peers in turns and the
ceilings between; then the peak memory of each in a process of its own; then a whole lap around the
ring step by step. On a GPU: the named cases, and with --sizes or --plot a sweep over bank sizes
besides, each with eager times, ours also in a CUDA graph, peak memory, errors against float64 and
the floor. What cannot be run is told in the table, with the reason.
"""


def add(commands) -> None:
    parser = commands.add_parser(
        "op",
        help="the op and its peers: time, memory, floor, targets",
        description=_DESCRIPTION,
    )
    case = parser.add_argument_group("the case")
    case.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    case.add_argument(
        "--cases",
        type=names,
        default=None,
        metavar="LABELS",
        help="cuda: of " + ",".join(one.label for one in cuda_cases.CASES) + ", or none; "
        "default all. E, a million slots, takes the longest by far",
    )
    case.add_argument(
        "--sizes",
        type=sizes,
        default=None,
        help="filled slots F, such as 1k,4096; default 1k to 64k in powers of 2 (cuda: only with "
        "--plot)",
    )
    case.add_argument("--n", type=positive, help="local queries; default 8, cuda 128")
    case.add_argument("--d", type=positive, help="embedding size; default 384, cuda 768")
    case.add_argument("--m", type=positive, help="passages per query; default 1")
    case.add_argument(
        "--dtype", choices=tuple(DTYPES), help="of bank and batch; default fp32, cuda bf16"
    )
    case.add_argument(
        "--drift", choices=("none", "mean"), help="ours only: mean-shift correction; default none"
    )
    case.add_argument("--threads", type=positive, default=None, help="cpu; default: all cores")
    _add_how(parser)
    out = parser.add_argument_group("results")
    add_out(out)
    out.add_argument("--plot", action="store_true", help="also draw the sweep (needs matplotlib)")
    out.add_argument("--check", action="store_true", help="exit with 1 if a target is not met")
    parser.set_defaults(run=_run, error=parser.error)


def _add_how(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("how it is measured")
    how.add_argument(
        "--peers",
        type=names,
        default=None,
        metavar="NAMES",
        help="ours and any others, by the first letters of their names, with - for a space: "
        "full,linear,cce,liger,inf-cl,full-matrix-bf16; default all",
    )
    how.add_argument(
        "--seconds", type=float, help="for each peer and size or case; default 3, cuda 0.5"
    )
    how.add_argument(
        "--rounds", type=positive, help="turns these seconds are spent in; default 3, cuda 2"
    )
    how.add_argument(
        "--step-limit",
        type=float,
        help="skip a step expected to take more seconds; default 120, cuda 1",
    )
    how.add_argument(
        "--budget",
        type=float,
        default=float("inf"),
        help="cuda: after so many seconds measure only ours; default no limit",
    )
    how.add_argument("--no-graph", action="store_true", help="cuda: leave out the CUDA graphs")
    how.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    how.add_argument(
        "--lap",
        type=sizes,
        default=None,
        help="cpu: slots of the lap; default: the largest size up to 32k",
    )
    how.add_argument("--laps", type=positive, default=2, help="cpu: laps timed; default 2")
    how.add_argument("--no-lap", action="store_true", help="cpu: leave out the lap")


def choose_peers(wanted: Sequence[str] | None, known: tuple[Peer, ...]) -> tuple[Peer, ...]:
    """Those whose names start so; ValueError if one is unknown or ours is not among them."""
    if wanted is None:
        return known
    hyphened = {peer.name.lower().replace(" ", "-"): peer for peer in known}
    chosen = [peer for name, peer in hyphened.items() if name.startswith(tuple(wanted))]
    unknown = [w for w in wanted if not w or not any(name.startswith(w) for name in hyphened)]
    if unknown or OURS not in chosen:
        raise ValueError(
            f"peers: expected ours and any of {', '.join(hyphened)}, got {','.join(wanted)}"
        )
    return tuple(chosen)


def _run(args: argparse.Namespace, command: list[str]) -> int:
    try:
        return _run_cuda(args, command) if args.device == "cuda" else _run_cpu(args, command)
    except ValueError as error:
        args.error(str(error))
        raise


def _given(args: argparse.Namespace, **defaults):
    """What was given of these arguments, or the device's default."""
    return {
        name: default if getattr(args, name) is None else getattr(args, name)
        for name, default in defaults.items()
    }


def _shape(args: argparse.Namespace, slots: int) -> Case:
    base = _SHAPES[args.device]
    changes = _given(args, n=base.n, d=base.d, m=base.m, dtype=base.dtype, drift=base.drift)
    return Case(slots, **changes)


def _run_cpu(args: argparse.Namespace, command: list[str]) -> int:
    torch.set_num_threads(args.threads or _cores())
    bank_sizes = args.sizes or op.SIZES
    case = _shape(args, max(bank_sizes))
    up_to_target = [slots for slots in bank_sizes if slots <= op.TARGET_CASE.slots]
    lap_slots = args.lap or (max(up_to_target or bank_sizes),)
    options = op.OpOptions(
        case=case,
        sizes=bank_sizes,
        peers=choose_peers(args.peers, PEERS),
        threads=torch.get_num_threads(),
        **_given(args, seconds=3.0, rounds=3, step_limit=120.0),
        memory=not args.no_memory,
        lap_slots=None if args.no_lap else lap_slots[0],
        laps=args.laps,
    )
    header = report.environment(command, args.device)
    result = op.run(options)
    path = report.result_path(args.out, args.device, report.what_was_run(case))
    rows = [report.make_row(one) for one in result.measured]
    report.write_csv(path.with_suffix(".csv"), header, rows)
    text = op_page.compose(header, result)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    if args.plot:
        scaling_plot(path.with_suffix(".csv"), path.with_suffix(".png"))
    print(text)
    op.say(f"written: {path}.csv, .md" + (", .png" if args.plot else ""))
    failed = any(target.passed is False for target in op.targets(result))
    return 1 if args.check and failed else 0


def _run_cuda(args: argparse.Namespace, command: list[str]) -> int:
    labels = [one.label for one in cuda_cases.CASES] if args.cases is None else args.cases
    named = cuda_cases.find_cases([label for label in labels if label != "none"])
    sweep = args.sizes or (cuda_cases.SWEEP_SIZES if args.plot else ())
    options = cuda_op.CudaOptions(
        cases=cuda_cases.with_sweep(named, _shape(args, 0), sweep),
        peers=choose_peers(args.peers, CUDA_PEERS),
        **_given(args, seconds=0.5, rounds=2, step_limit=1.0),
        budget=args.budget,
        memory=not args.no_memory,
        graph=not args.no_graph,
    )
    device = open_device(args.device)
    header = report.environment(command, args.device) | device.describe()
    header |= report.installed("triton", *PACKAGES)
    path = report.result_path(args.out, device.label(), "op")

    def write(result: cuda_op.CudaResult) -> None:
        rows = [cuda_page.make_row(one, result) for one in result.measured]
        report.write_csv(path.with_suffix(".csv"), header, rows, cuda_page.CudaRow)
        text = cuda_page.compose(header, result)
        path.with_suffix(".md").write_text(text, encoding="utf-8")

    result = cuda_op.run(options, device, write)
    drawn = args.plot and _draw(path)
    print(cuda_page.summary(result))
    op.say(f"written: {path}.csv, .md" + (", .png" if drawn else ""))
    failed = any(target.passed is False for target in cuda_page.targets(result))
    return 1 if args.check and failed else 0


def _draw(path: Path) -> bool:
    """A GPU machine may lack matplotlib: the results can be drawn on another one."""
    try:
        scaling_plot(path.with_suffix(".csv"), path.with_suffix(".png"))
    except SystemExit as error:
        op.say(f"not drawn: {error}; draw it elsewhere with: scaling-plot {path.name}.csv")
        return False
    return True


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
