"""``python -m benchmarks end-to-end``: its arguments, and what becomes of the results."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import report
from benchmarks.arguments import add_out, names, positive
from benchmarks.device import open_device
from benchmarks.op import say


def add(commands) -> None:
    parser = commands.add_parser(
        "end-to-end",
        help="train and score with both integrations, with and without banks",
        description="Trains the same encoder on the same examples with contaccum train's trainer "
        "and with that of sentence-transformers, with and without banks and gradient caching, and "
        "tells NDCG@10, time and memory. Needs the extras train and sentence-transformers.",
    )
    parser.add_argument("--data", type=Path, required=True, help="a data set, as for training")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--layers", type=positive, help="keep only the first layers of the model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument(
        "--methods", type=names, help="a,b,...; default all; a wrong name tells them"
    )
    parser.add_argument("--updates", type=positive, help="default: one pass over the data")
    for name, default, what in (("n", 8, "queries"), ("accumulation", 16, "micro-batches")):
        says = f"{what} per {'update' if name != 'n' else 'micro-batch'}; default {default}"
        parser.add_argument(f"--{name}", type=positive, default=default, help=says)
    parser.add_argument(
        "--processes", type=positive, default=1, help="methods trained side by side; default 1"
    )
    parser.add_argument("--seed", type=int, default=1, help="default 1")
    add_out(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, command: list[str]) -> int:
    # They need transformers.
    from benchmarks import end_to_end, end_to_end_methods, end_to_end_page

    known = end_to_end_methods.METHODS
    methods = args.methods or tuple(known)
    unknown = [name for name in methods if name not in known]
    if unknown:
        raise SystemExit(f"--methods: expected some of {', '.join(known)}, got {unknown[0]}")
    shared = {
        name: getattr(args, name) for name in ("data", "model", "layers", "updates", "processes")
    }
    counts = {"n": args.n, "accumulation": args.accumulation, "seed": args.seed}
    options = end_to_end_methods.EndToEndOptions(methods=methods, **shared, **counts)
    device = open_device(args.device)
    # Only the directories' names: where they lie on this machine is of no use to others.
    told = [
        Path(part).name if part in map(str, (args.data, args.model)) else part for part in command
    ]
    header = report.environment(told, args.device) | device.describe()
    header |= report.installed("transformers", "sentence-transformers")
    path = report.result_path(args.out, device.label(), f"end-to-end-{args.data.name}")

    def write(outcomes: list[end_to_end_methods.Outcome]) -> None:
        rows = [end_to_end_page.make_row(outcome) for outcome in outcomes]
        report.write_csv(path.with_suffix(".csv"), header, rows, end_to_end_page.EndToEndRow)
        updates = max(outcome.queries for outcome in outcomes) // (args.n * args.accumulation)
        page = end_to_end_page.compose(header, options, updates, rows)
        path.with_suffix(".md").write_text(page, encoding="utf-8")

    outcomes = end_to_end.run(options, device, write)
    print(end_to_end_page.summary([end_to_end_page.make_row(outcome) for outcome in outcomes]))
    say(f"written: {path}.csv, .md")
    return 1 if any(outcome.trained is None for outcome in outcomes[1:]) else 0
