"""``python -m benchmarks``: the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import op, op_page, report
from benchmarks.cases import DTYPES, Case
from benchmarks.peers import PEERS
from benchmarks.plot import scaling_plot

_DESCRIPTION = """\
Time and memory of one training step's loss (forward, backward and enqueue) against the size of the
bank, beside the ways to do it without this package and beside what the machine can do at best.
"""
_EXAMPLES = """\
examples:
  python -m benchmarks op --plot
      the whole table, 1k ... 64k slots, some ten minutes; the full matrix wants 13 GiB free at 32k
  python -m benchmarks op --sizes 1k,4k --seconds 1
      a first look
  python -m benchmarks op --sizes 32k --peers ours --dtype bf16 --no-memory
      one case of ours alone
  python -m benchmarks op --n 128 --m 2 --drift mean
      another shape
  python -m benchmarks scaling-plot RESULT.csv
      draw what was measured

Results go to benchmarks/results/ as CSV and as a page to read, named by date, device and what was
run. Numbers from a busy machine are worth little: look at the load average on top of the page, and
at whether p20 and p80 are near the median.
"""


def sizes(text: str) -> tuple[int, ...]:
    """'1k,4096' -> (1024, 4096)."""
    found = []
    for part in text.split(","):
        digits, unit = (part[:-1], 1024) if part[-1:] in ("k", "K") else (part, 1)
        if not digits.isdigit() or int(digits) < 1:
            raise argparse.ArgumentTypeError(f"expected slots such as 1k,4096, got {text!r}")
        found.append(int(digits) * unit)
    return tuple(found)


def _peers(text: str) -> tuple:
    by_name = {peer.name.split()[0]: peer for peer in PEERS}
    names = text.split(",")
    unknown = [name for name in names if name not in by_name]
    if unknown or "ours" not in names:
        raise argparse.ArgumentTypeError(f"expected ours and any of {', '.join(by_name)}: {text!r}")
    return tuple(by_name[name] for name in names)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _add_op(commands) -> None:
    parser = commands.add_parser(
        "op",
        help="the op over bank sizes: time, memory, floor, targets, the slowest step of a lap",
        description="Times loss + backward + enqueue for each bank size, ours and its peers in "
        "turns and the ceilings between; then the peak memory of each in a process of its own; "
        "then a whole lap around the ring step by step.",
    )
    case = parser.add_argument_group("the case")
    case.add_argument("--device", choices=("cpu",), default="cpu", help="default cpu")
    case.add_argument(
        "--sizes",
        type=sizes,
        default=",".join(str(s) for s in op.SIZES),
        help="filled slots F, such as 1k,4096; default 1k to 64k in powers of 2",
    )
    case.add_argument("--n", type=_positive, default=8, help="local queries; default 8")
    case.add_argument("--d", type=_positive, default=384, help="embedding size; default 384")
    case.add_argument("--m", type=_positive, default=1, help="passages per query; default 1")
    case.add_argument(
        "--dtype", choices=tuple(DTYPES), default="fp32", help="of bank and batch; default fp32"
    )
    case.add_argument(
        "--drift",
        choices=("none", "mean"),
        default="none",
        help="ours only: mean-shift correction; default none",
    )
    case.add_argument("--threads", type=_positive, default=None, help="default: all cores")
    how = parser.add_argument_group("how it is measured")
    how.add_argument(
        "--peers",
        type=_peers,
        default=PEERS,
        metavar="NAMES",
        help="of ours,full,linear; default all",
    )
    how.add_argument("--seconds", type=float, default=3.0, help="for each peer and size; default 3")
    how.add_argument(
        "--rounds", type=_positive, default=3, help="turns these seconds are spent in; default 3"
    )
    how.add_argument(
        "--step-limit",
        type=float,
        default=120.0,
        help="skip a step expected to take more seconds; default 120",
    )
    how.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    how.add_argument(
        "--lap",
        type=sizes,
        default=None,
        help="slots of the lap; default: the largest size up to 32k",
    )
    how.add_argument("--laps", type=_positive, default=2, help="laps timed; default 2")
    how.add_argument("--no-lap", action="store_true", help="leave out the lap")
    out = parser.add_argument_group("results")
    out.add_argument(
        "--out",
        type=Path,
        default=report.RESULTS,
        help="directory of the results; default benchmarks/results",
    )
    out.add_argument("--plot", action="store_true", help="also draw them (needs matplotlib)")
    out.add_argument("--check", action="store_true", help="exit with 1 if a target is not met")
    parser.set_defaults(run=_run_op)


def _run_op(args: argparse.Namespace, command: list[str]) -> int:
    torch.set_num_threads(args.threads or _cores())
    case = Case(max(args.sizes), args.n, args.d, args.m, args.dtype, args.drift)
    up_to_target = [slots for slots in args.sizes if slots <= op.TARGET_CASE.slots]
    lap_slots = args.lap or (max(up_to_target or args.sizes),)
    options = op.OpOptions(
        case=case,
        sizes=args.sizes,
        peers=args.peers,
        threads=torch.get_num_threads(),
        seconds=args.seconds,
        rounds=args.rounds,
        step_limit=args.step_limit,
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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _add_plot(commands) -> None:
    parser = commands.add_parser(
        "scaling-plot",
        help="time and memory against F, as .png or .svg",
        description="Draws the CSV of an earlier 'op' run. Needs matplotlib.",
    )
    parser.add_argument("results", type=Path, help="the CSV")
    parser.add_argument("--out", type=Path, help="default: beside the CSV, .png")
    parser.set_defaults(run=_run_plot)


def _run_plot(args: argparse.Namespace, _command: list[str]) -> int:
    out = args.out or args.results.with_suffix(".png")
    scaling_plot(args.results, out)
    print(out)
    return 0


# A kind of run is one entry here and one module beside this one.
COMMANDS: tuple[Callable, ...] = (_add_op, _add_plot)


def recorded(arguments: list[str]) -> list[str]:
    """The command as the results tell it: without where they went on this machine."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith("--out="):
            skip = False
        elif argument == "--out":
            skip = True
        else:
            kept.append(argument)
    return kept


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    args = parser.parse_args(arguments)
    return args.run(args, recorded(arguments))
