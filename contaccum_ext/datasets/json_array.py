"""Streams the objects of one large JSON array: DPR's training files pass 7 GB."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from .base import DataError
from .records import Record, open_text

_CHUNK = 1 << 20  # characters
# An object this long is a missing quote or bracket, not a training example.
_LONGEST_OBJECT = 1 << 27
# An error this close to the end of what was read may vanish with more text: it has room for the
# longest token that is not a string (a number, a literal, an escape).
_TOKEN_MARGIN = 64


class _Window:
    """The unread rest of the text read so far, and the line it starts on."""

    def __init__(self, stream: TextIO, path: Path) -> None:
        self.stream = stream
        self.path = path
        self.text = ""
        self.start = 0
        self.line = 1
        self.ended = False

    def read(self, size: int) -> None:
        """Appends up to `size` characters, forgetting those already consumed."""
        more = self.stream.read(size)
        self.ended = not more
        self.text = self.text[self.start :] + more
        self.start = 0

    def consume(self, end: int) -> None:
        self.line += self.text.count("\n", self.start, end)
        self.start = end

    def next_char(self) -> str:
        """The next character that is not white space, left in place; "" at the end of file."""
        while True:
            rest = self.start
            while rest < len(self.text) and self.text[rest] in " \t\r\n":
                rest += 1
            self.consume(rest)
            if rest < len(self.text):
                return self.text[rest]
            if self.ended:
                return ""
            self.read(_CHUNK)

    def expect(self, characters: str) -> str:
        """Consumes and returns the next character, which must be one of `characters`."""
        found = self.next_char()
        if not found or found not in characters:
            wanted = " or ".join(f"'{c}'" for c in characters)
            what = f"'{found}'" if found else "the end of the file"
            raise DataError(
                f"not a JSON array: expected {wanted}, got {what}", self.path, self.line
            )
        self.consume(self.start + 1)
        return found

    def decode(self, decoder: json.JSONDecoder) -> object:
        """Decodes the value at the start of the window, reading on while it is incomplete."""
        size = _CHUNK
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.start)
            except json.JSONDecodeError as error:
                # An open string is reported where it starts, however far back that is.
                incomplete = error.msg.startswith("Unterminated string") or (
                    error.pos > len(self.text) - _TOKEN_MARGIN
                )
                too_long = len(self.text) - self.start > _LONGEST_OBJECT
                if self.ended or too_long or not incomplete:
                    line = self.line + self.text.count("\n", self.start, error.pos)
                    raise DataError(f"not valid JSON ({error.msg})", self.path, line) from error
                self.read(size)
                size *= 2  # keeps decoding the same object again linear in its length
            else:
                self.consume(end)
                return value


def read_json_array(path: Path) -> Iterator[Record]:
    """The objects of a JSON array, one at a time, holding about one megabyte of text.

    A record's `line` is the one its object starts on, its `prefix` is the index in the array.

    Raises:
        DataError: the text is not an array of objects, or the file cannot be read.
    """
    decoder = json.JSONDecoder()
    with open_text(path) as stream:
        window = _Window(stream, path)
        window.expect("[")
        if window.next_char() == "]":
            return
        index = 0
        while True:
            window.next_char()
            line = window.line
            value = window.decode(decoder)
            if not isinstance(value, dict):
                kind = type(value).__name__
                raise DataError(f"expected an object, got {kind}", path, line, f"[{index}]")
            yield Record(value, path, line, f"[{index}].")
            index += 1
            if window.expect(",]") == "]":
                return
