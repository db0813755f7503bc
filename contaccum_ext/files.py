"""Files that are at every moment the old one or the new one, complete, also after a kill."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def flush(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let a file take the place of another, or of none, when it is complete and on the disk.

    After a failure the old one is in place and the temporary one is gone; what a killed writer left
    behind is overwritten by the next one. One writer at a time.

    Args:
        path: file to create or replace.
        write: writes the content.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)  # the new name, too, survives a power failure
