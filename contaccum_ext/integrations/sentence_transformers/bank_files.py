"""Where a checkpoint keeps the banks: a file for each process, which it alone reads again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from contaccum_ext.files import replace_file
from contaccum_ext.processes import several_processes

_FORMAT = 1
_NAME = re.compile(r"contaccum_banks(?:_\d+_of_(\d+))?\.pt")


class BankFile:
    """The banks of one process.

    Args:
        process: its number.
        count: of processes. Banks of one process are its own rows' and cannot be divided anew.
    """

    def __init__(self, process: int, count: int) -> None:
        self.count = count
        part = f"_{process}_of_{count}" if count > 1 else ""
        self.name = f"contaccum_banks{part}.pt"

    def write(self, checkpoint: Path, weights: int, banks: dict[str, Any]) -> None:
        """Put it into a checkpoint, complete or not at all.

        Args:
            checkpoint: a directory that is there.
            weights: fingerprint of those that belong to the banks.
            banks: their states.
        """
        content = {"format": _FORMAT, "weights": weights, "banks": banks}
        replace_file(checkpoint / self.name, lambda file: torch.save(content, file))

    def read(self, checkpoint: Path, weights: int) -> dict[str, Any] | str:
        """The banks in a checkpoint, or why they are not to be had; it never raises.

        Args:
            checkpoint: a directory, there or not.
            weights: fingerprint of those that training goes on from.
        """
        path = checkpoint / self.name
        try:
            return self._read(checkpoint, path, weights)
        except Exception as error:  # of many kinds, by what is wrong with the file
            return f"{path}: cannot be read as a file of banks ({summarize(error)})"

    def _read(self, checkpoint: Path, path: Path, weights: int) -> dict[str, Any] | str:
        if not path.is_file():
            counts = {
                int(found[1] or 1) for found in map(_NAME.fullmatch, _names(checkpoint)) if found
            }
            if not counts or self.count in counts:
                return f"{path}: no such file"
            return (
                f"{checkpoint}: saved by {' or '.join(map(str, sorted(counts)))} process(es), each "
                f"with its own rows in its banks, and this run has {self.count}"
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            return f"{path}: expected a dict with banks, got {type(content).__name__}"
        if content.get("format") != _FORMAT:
            return f"{path}: expected format {_FORMAT}, got {content.get('format')}"
        banks = content.get("banks")
        if "weights" not in content or not isinstance(banks, dict):
            return f"{path}: expected weights and a dict of banks, got {sorted(content)}"
        if content["weights"] != weights:
            return f"{path}: saved with other weights than those resumed from"
        return banks


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()] if directory.is_dir() else []


def summarize(error: Exception) -> str:
    """An error's kind and the first sentence of what it says: torch goes on with advice."""
    said = str(error).strip().split("\n")[0].split(". ")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def raise_together(problem: str | None) -> None:
    """Raise in all processes what went wrong in any: the others would wait for it for ever.

    Args:
        problem: of this process, None if it has none.

    Raises:
        RuntimeError: some process has one.
    """
    problems = [problem]
    if several_processes():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    said: dict[str, list[int]] = {}
    for process, text in enumerate(problems):
        if text is not None:
            said.setdefault(text, []).append(process)
    if len(problems) == 1:
        where = {text: "" for text in said}
    else:
        where = {text: f"process {', '.join(map(str, them))}: " for text, them in said.items()}
    if said:
        raise RuntimeError("; ".join(where[text] + text for text in said))
