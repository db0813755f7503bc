"""The file of results: a JSON line per finished run, only ever appended to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Rows in order of writing; a line that a killed run left half written is passed over."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def finished(path: Path) -> dict[str, Row]:
    """By key, the last row of each setting that did not fail."""
    return {row["key"]: row for row in read(path) if "error" not in row}


def append(path: Path, row: Row) -> None:
    """Write a row so that it survives whatever happens next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write((json.dumps(row) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
