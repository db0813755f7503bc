"""The `contaccum` command: demo, train, eval."""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DIVERGED = 1
BAD_INPUT = 2
INTERRUPTED = 130

OVERVIEW = """\
Train dense retrievers by contrastive learning with memory banks (ContAccum, arXiv 2406.12356).

A dense retriever learns by telling a query's passage from the other passages of its batch: the
larger the batch, the better it learns, and the more memory it needs. Three numbers set this up:

  n      local_batch_size     queries encoded at once: what fits into memory
  K      accumulation_steps   micro-batches of n per optimizer update
  bank   bank_size            slots that remember the vectors of earlier micro-batches, so that
                              each query meets thousands of passages while only n are encoded
"""

EXAMPLES = """\
examples:
  contaccum demo                                  two to three minutes, nothing to download
  contaccum demo --data DIR --encoder MODEL       the same on your data and your model
  contaccum train --data DIR --encoder MODEL --output runs/first
  contaccum eval --checkpoint runs/first --data DIR

'contaccum COMMAND --help' explains each command.
"""

METHODS_HELP = """\
methods, all on the same examples in the same order:
  inbatch     one batch of n*K: what enough memory would allow (DPR)
  gradaccum   K micro-batches of n: the memory of n, and few negatives
  contaccum   K micro-batches of n against memory banks of queries and passages
  prebatch    as contaccum with the passage bank only
  gradcache   inbatch in the memory of n: K micro-batches of n, each encoded twice
  gradcache_contaccum   likewise, and the whole update meets both memory banks
"""

DEMO_HELP = """\
Train with 'gradaccum' and with 'contaccum' (same data, same updates, same seed), score both beside
BM25 and the untrained model, and write an HTML report.

Without --encoder, a small transformer starts from random initialisation, with a tokenizer trained
on the corpus; such a start needs settings of its own:
"""

TRAIN_HELP = """\
Train a query and a passage encoder. OUTPUT receives

  metrics.jsonl                 a line per optimizer update
  final/query_encoder/          opens with transformers' AutoModel.from_pretrained
  final/passage_encoder/        likewise
  checkpoint-NNNNNN/            the same every `checkpoint_every` updates, with what --resume needs
  run.json                      settings and data of the run

A run that was killed, at whatever moment, goes on with the same command and --resume, and ends with
the same bits as if it had not been. Settings and data must be the same; `checkpoint_every` and
`keep_checkpoints` may change. A run is never overwritten, and a finished one is left as it is.
"""

DATA_HELP = (
    "directory with corpus.jsonl and train|valid|test.jsonl (or BEIR's or DPR's files), "
    "or 'stdlib': docstrings and functions of Python's own library"
)


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
            from contaccum_ext.training.config import field_help

            settings = "\n".join(f"  {line}" for line in field_help())
            self.epilog = f"{METHODS_HELP}\nsettings of --config and --set:\n{settings}\n"
        return super().format_help()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0; 2 for input that cannot be used."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    options = build_parser().parse_args(argv)
    options.command = "contaccum " + shlex.join(argv)

    from contaccum_ext import commands
    from contaccum_ext.datasets import DataError
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
        OSError,
    )
    run = {
        "demo": commands.demo,
        "train": commands.train,
        "eval": commands.evaluate,
        "report": commands.report,
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
    evaluate.add_argument("--checkpoint", required=True, help="OUTPUT of a run, or one in it")
    evaluate.add_argument("--data", required=True, help=DATA_HELP)
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
    return parser


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
