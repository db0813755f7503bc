"""Runs the Python of a documentation page, so that a page cannot promise what does not work."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def python_blocks(page: Path) -> list[str]:
    """The fenced blocks marked `python`, each preceded by empty lines up to its place in the page.

    A traceback then names the line of the page.
    """
    text = page.read_text(encoding="utf-8")
    return [
        "\n" * text.count("\n", 0, found.start(1)) + found.group(1)
        for found in _BLOCK.finditer(text)
    ]


def run_page(
    page: Path, names: Mapping[str, Any] | None = None, replace: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a page's blocks one after the other, as one program.

    Args:
        page: a Markdown file.
        names: what its blocks may use without defining it.
        replace: texts to be replaced in the blocks, such as the name of a model that would be
            downloaded. Each must occur.

    Returns:
        The program's names.

    Raises:
        ValueError: the page has no such blocks, or does not have a text to be replaced.
    """
    blocks = python_blocks(page)
    if not blocks:
        raise ValueError(f"{page}: expected fenced blocks marked python, found none")
    for old, new in (replace or {}).items():
        if not any(old in block for block in blocks):
            raise ValueError(f"{page}: expected {old!r} in a block, found it in none")
        blocks = [block.replace(old, new) for block in blocks]
    program: dict[str, Any] = {"__name__": "__main__", **(names or {})}
    for block in blocks:
        exec(compile(block, str(page), "exec"), program)
    return program
