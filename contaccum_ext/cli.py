"""The `contaccum` command."""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contaccum_ext.cli_help import (
    DATA_HELP,
    DEMO_HELP,
    ENCODE_HELP,
    EXAMPLES,
    METHODS_HELP,
    MINE_HELP,
    OVERVIEW,
    SEARCH_HELP,
    TRAIN_HELP,
)

DIVERGED = 1
BAD_INPUT = 2
INTERRUPTED = 130


class _CommandParser(argparse.ArgumentParser):
    """Lists the methods and all settings under the help of the commands that take them."""

    lists_settings = False
    shows_scratch = False

    def format_help(self) -> str:
        # Imported for the help that shows them only: they bring transformers along.
        if self.shows_scratch:
            from contaccum_ext.commands import SCRATCH_SETTINGS

            values = "\n".join(f"  {key}={value}" for key, value in SCRATCH_SETTINGS.items())
            self.description = f"{DEMO_HELP}\n{values}\n"
        if self.lists_settings:
            from contaccum_ext.training.config_text import field_help

            settings = "\n".join(f"  {line}" for line in field_help())
            self.epilog = f"{METHODS_HELP}\nsettings of --config and --set:\n{settings}\n"
        return super().format_help()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0; 2 for input that cannot be used."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    options = build_parser().parse_args(argv)
    options.command = "contaccum " + shlex.join(argv)

    from contaccum_ext import commands, search_commands
    from contaccum_ext.datasets import DataError
    from contaccum_ext.retrieval.vectors import VectorsError
    from contaccum_ext.training import (
        ConfigError,
        DivergedError,
        EncoderError,
        RunError,
        TrainingDataError,
    )

    bad_input = (
        commands.UsageError,
        ConfigError,
        DataError,
        EncoderError,
        RunError,
        TrainingDataError,
        VectorsError,
        OSError,
    )
    run = {
        "demo": commands.demo,
        "train": commands.train,
        "eval": commands.evaluate,
        "report": commands.report,
        "mine": search_commands.mine,
        "encode": search_commands.encode,
        "search": search_commands.search_corpus,
    }
    _quieten()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            run[options.name](options)
    except bad_input as error:
        print(f"contaccum: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except DivergedError as error:
        print(f"contaccum: stopped: {error}", file=sys.stderr)
        return DIVERGED
    except KeyboardInterrupt:
        print("contaccum: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The argument parser of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="contaccum", description=OVERVIEW, epilog=EXAMPLES, formatter_class=raw
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_CommandParser)

    demo = commands.add_parser(
        "demo",
        help="train with and without memory banks, compare, write a report",
        description=DEMO_HELP,
        formatter_class=raw,
    )
    demo.set_defaults(name="demo")
    demo.shows_scratch = True
    demo.add_argument("--data", default="stdlib", help=f"{DATA_HELP} (default: stdlib)")
    demo.add_argument("--encoder", help="Hugging Face model directory or name to start from")
    demo.add_argument("--methods", nargs="+", default=["gradaccum", "contaccum"], metavar="METHOD")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    _add_settings(demo)

    train = commands.add_parser(
        "train",
        help="train a dense retriever",
        description=TRAIN_HELP,
        formatter_class=raw,
    )
    train.set_defaults(name="train")
    train.add_argument("--data", required=True, help=DATA_HELP)
    train.add_argument("--encoder", required=True, help="Hugging Face model directory or name")
    train.add_argument("--method", help="see below (default: contaccum)")
    train.add_argument("--output", type=Path, required=True, help="directory of the run")
    train.add_argument(
        "--resume", action="store_true", help="go on where the run in OUTPUT was cut off"
    )
    _add_settings(train)

    evaluate = commands.add_parser(
        "eval",
        help="score a checkpoint over the whole corpus",
        description="Rank the whole corpus for each query with a trained model, and with BM25.",
    )
    evaluate.set_defaults(name="eval")
    _add_retriever(evaluate)
    evaluate.add_argument("--split", choices=("valid", "test"), default="test")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")

    report = commands.add_parser(
        "report",
        help="compare training runs on one page",
        description="Write one HTML page with the curves, the figures and the settings of training "
        "runs, finished or not. It needs no network and no other file.",
    )
    report.set_defaults(name="report")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="OUTPUT of a run")
    report.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="default: report.html",
    )

    mine = commands.add_parser(
        "mine",
        help="find hard negatives with a checkpoint",
        description=MINE_HELP,
        formatter_class=raw,
    )
    mine.set_defaults(name="mine")
    _add_retriever(mine)
    mine.add_argument("--output", type=Path, required=True, help="directory of the new data")
    mine.add_argument("--negatives", type=_count, default=1, metavar="N", help="default: 1")
    mine.add_argument(
        "--depth", type=_count, default=100, metavar="N", help="results looked at (default: 100)"
    )
    mine.add_argument("--margin", type=float, metavar="SCORE", help="see above (default: none)")
    _add_vectors(mine)

    encode = commands.add_parser(
        "encode",
        help="encode a corpus and keep the vectors",
        description=ENCODE_HELP,
        formatter_class=raw,
    )
    encode.set_defaults(name="encode")
    _add_retriever(encode)
    encode.add_argument("--output", type=Path, required=True, help="directory of the vectors")

    search = commands.add_parser(
        "search",
        help="ask a question, see passages",
        description=SEARCH_HELP,
        formatter_class=raw,
    )
    search.set_defaults(name="search")
    _add_retriever(search)
    search.add_argument("--query", action="append", metavar="TEXT", help="repeatable")
    search.add_argument(
        "--results", type=_count, default=5, metavar="N", help="per question (default: 5)"
    )
    search.add_argument("--json", action="store_true", help="a JSON object per question")
    _add_vectors(search)
    return parser


def _add_retriever(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="OUTPUT of a run, or one in it")
    parser.add_argument("--data", required=True, help=DATA_HELP)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _add_vectors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vectors", type=Path, metavar="DIR", help="OUTPUT of 'encode', instead of encoding now"
    )


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {count}")
    return count


def _add_settings(parser: _CommandParser) -> None:
    parser.lists_settings = True
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; repeatable"
    )
    parser.add_argument("--layers", type=int, help="keep only the first layers of the encoder")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--updates", type=int, dest="max_updates", help="optimizer updates")
    length.add_argument("--epochs", type=int, help="passes over the training queries")
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--mine-negatives", type=int, metavar="N", help="replace hard negatives by N from BM25"
    )


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"contaccum: warning: {message}", file=sys.stderr)


def _quieten() -> None:
    """Leave the terminal to this command: transformers reports every file it opens."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
