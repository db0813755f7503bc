"""``python -m benchmarks``: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import end_to_end_command, follow, op_command, step_command
from benchmarks.plot import scaling_plot

_DESCRIPTION = """\
Time and memory of one training step's loss (forward, backward and enqueue) against the size of the
bank, beside the ways to do it without this package and beside what the machine can do at best;
what a bank adds to a whole training step, and following the encoders to an update; and what all of
it comes to, from data to NDCG@10.
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
  python -m benchmarks op --device cuda --plot --budget 180 --out DIR
      on a GPU: all cases and the sweep of the plot, some minutes
  python -m benchmarks op --device cuda --cases A,C --peers ours,linear
      on a GPU: two cases, two peers
  python -m benchmarks step --device cuda --out DIR
      a training step of two BERT-base encoders with banks up to 64k
  python -m benchmarks step --layers 2 --hidden 64 --heads 2 --banks 0,256 --rounds 3
      the same, tiny, on the CPU
  python -m benchmarks follow
      moving a bank along with its encoders after an update, up to 64k slots, some minutes
  python -m benchmarks end-to-end --data DATA --model MODEL --layers 2 --device cuda
      both integrations, with and without banks, one pass over the data each
  python -m benchmarks end-to-end --data DATA --model MODEL --methods st-mnrl --updates 10
      a first look at one of them
  python -m benchmarks scaling-plot RESULT.csv
      draw what was measured

The published peers of a GPU run are optional: pip install "contaccum-ext[peers]".

Results go to benchmarks/results/ as CSV and as a page to read, named by date, device and what was
run. Numbers from a busy machine are worth little: look at the load average on top of the page, and
at whether p20 and p80 are near the median.
"""


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


# A kind of run is one entry here and its modules beside this one.
COMMANDS: tuple[Callable, ...] = (
    op_command.add,
    step_command.add,
    follow.add,
    end_to_end_command.add,
    _add_plot,
)


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
