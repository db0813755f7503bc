"""The `contaccum` command: demo, train, eval."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# torch, transformers and the rest are imported where they are needed: --help answers at once.

BAD_INPUT = 2

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
  contaccum demo                                      two minutes, nothing to download
  contaccum demo --data DIR --encoder MODEL           the same on your data and your model
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
"""

DATA_HELP = "directory or file (see docs), or 'stdlib': Python's own docstrings and functions"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for input that cannot be used."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(argv)
    try:
        _quieten()
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            options.run(options, "contaccum " + shlex.join(argv))
    except ValueError as error:  # DataError, ConfigError, EncoderError, TrainingDataError
        if not _is_input_error(error):
            raise
        print(f"contaccum: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("contaccum: interrupted", file=sys.stderr)
        return 130
    return 0


def _is_input_error(error: ValueError) -> bool:
    from contaccum_ext.datasets import DataError
    from contaccum_ext.training import ConfigError, EncoderError, TrainingDataError

    return isinstance(error, (DataError, ConfigError, EncoderError, TrainingDataError, UsageError))


class UsageError(ValueError):
    """Options that do not go together."""


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="contaccum", description=OVERVIEW, epilog=EXAMPLES, formatter_class=raw
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    return parser
