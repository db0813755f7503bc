"""``python -m benchmarks.drift``: the command line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import benchmarks.drift
from benchmarks.drift import rows
from benchmarks.drift.families import DATA
from benchmarks.drift.grid import Grid, run_grid
from benchmarks.drift.harm import harm
from benchmarks.drift.report import brief, table
from benchmarks.drift.settings import Setting
from benchmarks.drift.side_tables import alike, any_size, both_ways, rebuilt, unmasked
from benchmarks.drift.summary import amounts, shared, summary
from benchmarks.drift.tables import BASELINE, TABLES, settings


def _prepare(args: argparse.Namespace) -> int:
    from benchmarks.drift.prepare import prepare

    prepare(args.model, args.source, args.out, args.layers)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {size / 2**20:.1f} MiB")
    return 0


def _grid(args: argparse.Namespace) -> int:
    chosen = [
        setting
        for setting in settings(args.tables)
        if (not args.only or args.only in f"{setting.data} {setting.label}")
        and (not args.seeds or setting.seed in args.seeds)
    ]
    if args.seeds:
        chosen.sort(key=lambda setting: args.seeds.index(setting.seed))
    grid = Grid(args.data, args.out, args.gpus, args.workers, args.deadline)
    return 1 if run_grid(chosen, grid) else 0


def _one(args: argparse.Namespace) -> int:
    import torch

    from benchmarks.drift.run import run, set_up

    set_up()
    setting = Setting(**json.loads(args.setting))
    row = run(setting, args.data, torch.device(args.device), {})
    if args.out:
        rows.append(args.out, row)
    print(json.dumps(row, indent=1))
    return 0


def _table(args: argparse.Namespace) -> int:
    done = _read(args.rows)
    for name in args.tables:
        told = (brief if args.brief else table)(settings([name]), done, args.baseline)
        print(f"### {name}\n\n{told}\n")
    return 0


def _summary(args: argparse.Namespace) -> int:
    done = list(_read(args.rows).values())
    kinds = (summary, amounts, any_size, unmasked, shared, rebuilt, alike, both_ways)
    print("\n\n".join(table(done, data) for table in kinds for data in DATA))
    return 0


def _figure(args: argparse.Namespace) -> int:
    from benchmarks.drift.figure import figure

    figure(list(_read(args.rows).values()), args.out)
    return 0


def _gradients(args: argparse.Namespace) -> int:
    from benchmarks.drift.gradients import gradients

    print(gradients(args.set, args.data, learning_rate=args.learning_rate, updates=args.updates))
    return 0


def _harm(args: argparse.Namespace) -> int:
    print(harm(list(_read(args.rows).values())))
    return 0


def _read(paths: list[Path]) -> dict[str, rows.Row]:
    done: dict[str, rows.Row] = {}
    for path in paths:
        done |= rows.finished(path)
    return done


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.drift",
        description=benchmarks.drift.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("prepare", help="tokenise data sets and cut the model down")
    one.add_argument("--model", type=Path, required=True, help="directory of a BERT")
    one.add_argument("--source", type=Path, required=True, nargs="+", help="data sets")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--layers", type=int, default=2)
    one.set_defaults(run=_prepare)

    one = commands.add_parser("grid", help="run the settings of tables side by side")
    one.add_argument("tables", nargs="+", choices=TABLES, metavar="NAME", help=", ".join(TABLES))
    one.add_argument("--data", type=Path, required=True, help="what prepare wrote")
    one.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    one.add_argument("--gpus", type=int, default=1, help="0: on the CPU")
    one.add_argument("--workers", type=int, default=6, help="processes in all")
    one.add_argument("--deadline", type=float, default=1e9, help="seconds from now")
    one.add_argument("--only", help="settings whose 'set label' contains this")
    one.add_argument("--seeds", type=int, nargs="+", help="these alone, one after the other")
    one.set_defaults(run=_grid)

    one = commands.add_parser("one", help="run one setting here and print its row")
    one.add_argument("setting", help="JSON: what differs from the central setting, and data")
    one.add_argument("--data", type=Path, required=True, help="what prepare wrote")
    one.add_argument("--device", default="cuda")
    one.add_argument("--out", type=Path, help="JSON lines, appended to")
    one.set_defaults(run=_one)

    one = commands.add_parser("table", help="print tables from rows")
    one.add_argument("tables", nargs="+", choices=TABLES, metavar="NAME", help=", ".join(TABLES))
    one.add_argument("--rows", type=Path, required=True, nargs="+")
    one.add_argument("--baseline", default=BASELINE, help="label; default %(default)s")
    one.add_argument("--brief", action="store_true", help="NDCG@10 alone, sets side by side")
    one.set_defaults(run=_table)

    one = commands.add_parser("summary", help="print a line for every setting from rows")
    one.add_argument("--rows", type=Path, required=True, nargs="+")
    one.set_defaults(run=_summary)

    one = commands.add_parser("harm", help="which sign of staleness tells harm")
    one.add_argument("--rows", type=Path, required=True, nargs="+")
    one.set_defaults(run=_harm)

    one = commands.add_parser("gradients", help="compare a bank's gradient with a large batch's")
    one.add_argument("set", help="data set")
    one.add_argument("--data", type=Path, required=True, help="what prepare wrote")
    one.add_argument("--updates", type=int, default=10, help="before, in-batch; default 10")
    one.add_argument("--learning-rate", type=float, default=2e-5, help="of these; default 2e-5")
    one.set_defaults(run=_gradients)

    one = commands.add_parser("figure", help="draw how the shortcut forms")
    one.add_argument("--rows", type=Path, required=True, nargs="+")
    one.add_argument("--out", type=Path, required=True, help="PNG")
    one.set_defaults(run=_figure)

    args = parser.parse_args(arguments)
    return args.run(args)
