"""Types of command-line arguments, and those that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.report import RESULTS


def sizes(text: str) -> tuple[int, ...]:
    """'1k,4096' -> (1024, 4096)."""
    found = []
    for part in text.split(","):
        digits, unit = (part[:-1], 1024) if part[-1:] in ("k", "K") else (part, 1)
        if not digits.isdigit() or int(digits) < 1:
            raise argparse.ArgumentTypeError(f"expected slots such as 1k,4096, got {text!r}")
        found.append(int(digits) * unit)
    return tuple(found)


def banks(text: str) -> tuple[int, ...]:
    """Sizes, or 0 for no bank: '0,8k' -> (0, 8192)."""
    return tuple(0 if part == "0" else sizes(part)[0] for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """'ours,full' -> ('ours', 'full')."""
    return tuple(text.split(","))


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def add_out(parser) -> None:
    """--out, for a parser or a group of one."""
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        help="directory of the results; default benchmarks/results",
    )
