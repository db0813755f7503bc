"""Runs the snippets of a documentation page, so that a page cannot promise what does not work."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contaccum_ext.cli import main

_FENCE = re.compile(r"^```([a-z]+)[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_SHELL = ("bash", "sh", "shell", "console")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    source: str
    line: int  # of the page where the source begins, counted from 1


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks marked with one of these languages, in the order of the page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found.group(1), found.group(2), 1 + text.count("\n", 0, found.start(2)))
        for found in _FENCE.finditer(text)
        if found.group(1) in languages
    ]


def run_page(
    page: Path,
    names: Mapping[str, Any] | None = None,
    replace: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run a page's Python and shell blocks one after the other, as one session.

    The lines of a shell block are calls of the `contaccum` command, which is run in this process,
    in the current directory. Nothing else is ever run.

    Args:
        page: a Markdown file.
        names: what its Python may use without defining it.
        replace: texts to be replaced in the blocks, such as the name of a model that would be
            downloaded. Each must occur.

    Returns:
        The names that the Python has defined.

    Raises:
        ValueError: the page has no such blocks, or not a text to be replaced, or another command.
        AssertionError: a call of `contaccum` did not end with 0.
    """
    found = blocks(page, "python", *_SHELL)
    if not found:
        raise ValueError(f"{page}: expected fenced blocks marked python or bash, found none")
    for old, new in (replace or {}).items():
        if not any(old in block.source for block in found):
            raise ValueError(f"{page}: expected {old!r} in a block, found it in none")
        found = [
            dataclasses.replace(block, source=block.source.replace(old, new)) for block in found
        ]
    program: dict[str, Any] = {"__name__": "__main__", **(names or {})}
    commands = {block: _commands(page, block) for block in found if block.language in _SHELL}
    for block in found:
        if block.language == "python":
            # The empty lines make a traceback name the line of the page.
            source = "\n" * (block.line - 1) + block.source
            exec(compile(source, str(page), "exec"), program)
        for line, arguments in commands.get(block, []):
            code = main(arguments)
            assert code == 0, f"{page}:{line}: expected the command to end with 0, got {code}"
    return program


def _commands(page: Path, block: Block) -> list[tuple[int, list[str]]]:
    """Line and arguments of each call; a backslash at its end continues a line."""
    calls, begun, pending = [], 0, ""
    for number, line in enumerate(block.source.splitlines(), block.line):
        begun = begun if pending else number
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        words = shlex.split(pending, comments=True)
        pending = ""
        if not words:
            continue
        if words[0] != "contaccum":
            raise ValueError(f"{page}:{begun}: expected a call of contaccum, got {words[0]}")
        calls.append((begun, words[1:]))
    return calls
