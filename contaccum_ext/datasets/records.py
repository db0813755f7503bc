"""Reading files record by record, with errors that name file, line and field."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from .base import DataError


def find_file(directory: Path, *names: str) -> Path | None:
    """The first of `names`, plain or with `.gz` appended, that is a file in `directory`."""
    for name in names:
        for candidate in (directory / name, directory / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    return None


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Opens a UTF-8 text file, decompressing `.gz`.

    Raises:
        DataError: the file is absent, not UTF-8, or not valid gzip; the last two also when they
            show only while the body reads.
    """
    if not path.is_file():
        raise DataError("no such file", path)
    try:
        # utf-8-sig: files saved on Windows start with a byte order mark.
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as stream:
                yield stream
        else:
            with open(path, encoding="utf-8-sig", newline="") as stream:
                yield stream
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text ({error.reason})", path) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"not a complete gzip file ({error})", path) from error


@dataclass(frozen=True)
class Record:
    """A JSON object and where it stands; its accessors check type and content."""

    values: dict[str, Any]
    path: Path
    line: int
    prefix: str = ""

    def error(self, field: str, problem: str) -> DataError:
        """A DataError at this record."""
        return DataError(problem, self.path, self.line, f"{self.prefix}{field}")

    def _get(self, field: str) -> Any:
        if field not in self.values:
            raise self.error(field, f"missing; the record has {sorted(self.values)}")
        return self.values[field]

    def string(self, field: str, default: str | None = None, empty: bool = False) -> str:
        """A string, stripped of surrounding white space; empty ones are refused unless `empty`."""
        if default is not None and self.values.get(field) is None:
            return default
        value = self._get(field)
        if not isinstance(value, str):
            raise self.error(field, f"expected a string, got {type(value).__name__}")
        value = value.strip()
        if not value and not empty:
            raise self.error(field, "expected text, got an empty string")
        return value

    def strings(self, field: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """A list of non-empty strings."""
        if default is not None and field not in self.values:
            return default
        value = self._get(field)
        if not isinstance(value, list):
            raise self.error(field, f"expected a list of strings, got {type(value).__name__}")
        for item in value:
            if not isinstance(item, str) or not item.strip():
                raise self.error(field, f"expected non-empty strings, got {item!r}")
        return tuple(value)

    def grades(self, field: str, count: int) -> tuple[int, ...]:
        """A list of `count` integers from 1 on; an absent field is an empty one."""
        if field not in self.values:
            return ()
        value = self.values[field]
        if not isinstance(value, list) or len(value) != count:
            raise self.error(field, f"expected a list of {count} integers, got {value!r:.60}")
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int) or item < 1:
                raise self.error(field, f"expected integers from 1 on, got {item!r:.60}")
        return tuple(value)

    def passage_ids(
        self, field: str, corpus: Collection[str], default: tuple[str, ...] | None = None
    ) -> tuple[str, ...]:
        """A list of ids, without repetition, that all name passages of `corpus`."""
        ids = self.strings(field, default)
        for index, passage_id in enumerate(ids):
            if passage_id not in corpus:
                raise self.error(field, f"passage id '{passage_id}' is not in the corpus")
            if passage_id in ids[:index]:
                raise self.error(field, f"passage id '{passage_id}' occurs twice")
        return ids

    def records(self, field: str) -> list[Record]:
        """A list of objects; an absent or null field is an empty list."""
        value = self.values.get(field)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(field, f"expected a list of objects, got {type(value).__name__}")
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                raise self.error(f"{field}[{index}]", f"expected an object, got {item!r:.60}")
        return [
            Record(item, self.path, self.line, f"{self.prefix}{field}[{index}].")
            for index, item in enumerate(value)
        ]


def read_jsonl(path: Path) -> Iterator[Record]:
    """One record per line; blank lines are passed over.

    Raises:
        DataError: a line is not a JSON object, or the file cannot be read.
    """
    with open_text(path) as stream:
        for line, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            try:
                values = json.loads(text.rstrip())
            except json.JSONDecodeError as error:
                raise DataError(
                    f"not valid JSON ({error.msg} at column {error.colno})", path, line
                ) from error
            if not isinstance(values, dict):
                raise DataError(f"expected a JSON object, got {type(values).__name__}", path, line)
            yield Record(values, path, line)


def read_tsv(path: Path, columns: int, quoted: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yields (line, cells) of a tab-separated file.

    Args:
        path: the file, plain or `.gz`.
        columns: how many cells every line must have.
        quoted: cells may be quoted as in CSV (and then hold tabs and line breaks).

    Raises:
        DataError: a line has another number of cells, or the file cannot be read.
    """
    with open_text(path) as stream:
        reader = csv.reader(
            stream, delimiter="\t", quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        )
        try:
            for cells in reader:
                if not any(cells):
                    continue
                if len(cells) != columns:
                    raise DataError(
                        f"expected {columns} tab-separated cells, got {len(cells)}",
                        path,
                        reader.line_num,
                    )
                yield reader.line_num, cells
        except csv.Error as error:
            raise DataError(f"not tab-separated text ({error})", path, reader.line_num) from error


def refuse_duplicate(record_id: str, seen: Iterable[str], path: Path, line: int) -> None:
    """Raises DataError where `record_id` is already among `seen` (a set or a dict's keys)."""
    if record_id in seen:
        raise DataError(f"id '{record_id}' occurs twice", path, line)
