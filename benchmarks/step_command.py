"""``python -m benchmarks step``: its arguments, and what becomes of the results."""

from __future__ import annotations

import argparse

from benchmarks import report, step, step_page
from benchmarks.arguments import add_out, banks, positive
from benchmarks.cases import DTYPES
from benchmarks.device import open_device
from benchmarks.op import say

_DEFAULT = step.StepOptions()


def add(commands) -> None:
    parser = commands.add_parser(
        "step",
        help="a whole training step of two encoders, with and without a bank",
        description="Times a micro-step of two separate BERT encoders with random weights (encode, "
        "loss, backward; no optimizer), without a bank and with banks of several sizes, ours and "
        "the official algorithm in turns, and its peak memory. Needs transformers.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument(
        "--banks",
        type=banks,
        default=_DEFAULT.banks,
        help="slots, 0 for none; default " + ",".join(str(size) for size in _DEFAULT.banks),
    )
    for name, what in (
        ("n", "queries"),
        ("m", "passages per query: one positive, the others hard negatives"),
        ("query-length", "tokens"),
        ("passage-length", "tokens"),
        ("layers", "of each encoder"),
        ("hidden", "size of the encoders and of the vectors"),
        ("heads", "of attention"),
        ("vocabulary", "tokens known"),
        ("rounds", "in each, every loss and bank has a turn"),
        ("steps", "of a turn"),
    ):
        default = getattr(_DEFAULT, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}", type=positive, default=default, help=f"{what}; default {default}"
        )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="bf16", help="of the banks; default bf16"
    )
    parser.add_argument(
        "--drift", choices=("none", "mean"), default="none", help="ours only; default none"
    )
    add_out(parser)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the target is not met")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, command: list[str]) -> int:
    wanted = {name: getattr(args, name) for name in step.StepOptions.__dataclass_fields__}
    device = open_device(args.device)
    header = report.environment(command, args.device) | device.describe()
    header |= report.installed("transformers")
    result = step.run(step.StepOptions(**wanted), device)
    path = report.result_path(args.out, device.label(), "step")
    rows = [step_page.make_row(one, result) for one in result.variants]
    report.write_csv(path.with_suffix(".csv"), header, rows, step_page.StepRow)
    path.with_suffix(".md").write_text(step_page.compose(header, result), encoding="utf-8")
    print(step_page.summary(result))
    say(f"written: {path}.csv, .md")
    failed = any(target.passed is False for target in step.targets(result))
    return 1 if args.check and failed else 0
