"""A retrieval set that every Python carries: docstrings and the functions they describe."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .base import (
    DataError,
    EvalQuery,
    Passage,
    RetrievalDataset,
    Split,
    TrainExample,
)

_SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
)
# Below these a docstring ("Prepare for parsing.") fits many functions, or a body says nothing.
_MIN_QUERY_WORDS = 4
_MIN_BODY_WORDS = 5
_WORD = re.compile(r"[A-Za-z]{2,}")
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class _Pair:
    module: str
    passage_id: str
    query: str
    source: str


def load_stdlib(directory: str | Path | None = None) -> RetrievalDataset:
    """Pairs the first paragraph of each docstring with its function's source, docstrings removed.

    Read from the running interpreter's standard library, without tests: nothing is downloaded or
    written, and what comes out depends on that library alone. The passage keeps the `def`
    line and the comments; functions nested in it lose their docstrings too. Pairs whose query or
    source repeats an earlier one are left out, as are very short ones.

    Splits are by top-level module (a hash of its name decides: about a tenth of the modules for
    validation, a fifth for testing), so that no test module was trained on; the corpus holds the
    passages of all splits. There are no hard negatives: `retrieval.bm25.mine_negatives` adds them.

    Args:
        directory: the library to read; the running interpreter's by default.

    Raises:
        DataError: the directory holds no documented functions (an interpreter that ships its
            library only compiled, for one).
    """
    root = Path(directory or sysconfig.get_paths()["stdlib"])
    corpus: dict[str, Passage] = {}
    pairs: dict[Split, list[_Pair]] = {"train": [], "valid": [], "test": []}
    for pair in _unique(_pairs(root)):
        corpus[pair.passage_id] = Passage(pair.passage_id, "", pair.source)
        pairs[_split_of(pair.module)].append(pair)
    if not corpus:
        raise DataError("no documented Python functions found", root)
    return RetrievalDataset(
        name="stdlib",
        corpus=corpus,
        train=[TrainExample(p.passage_id, p.query, (p.passage_id,), ()) for p in pairs["train"]],
        valid=[EvalQuery(p.passage_id, p.query, (p.passage_id,)) for p in pairs["valid"]],
        test=[EvalQuery(p.passage_id, p.query, (p.passage_id,)) for p in pairs["test"]],
    )


def module_of(passage_id: str) -> str:
    """The top-level module of a passage: `"asyncio"` for `"asyncio.locks:Lock.acquire:93"`."""
    return passage_id.split(":")[0].split(".")[0]


def _split_of(module: str) -> Split:
    # Python's own hash() of a string differs from process to process.
    bucket = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "big") % 10
    if bucket < 7:
        return "train"
    return "valid" if bucket < 8 else "test"


def _pairs(root: Path) -> Iterator[_Pair]:
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if _SKIPPED_DIRECTORIES.intersection(parts) or parts[-1].startswith("test_"):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        try:
            with tokenize.open(file) as stream:
                text = stream.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # templates and deliberately broken files live among the modules
        # Not splitlines(): it also breaks at form feeds, which ast does not count as line ends.
        lines = [line.encode() for line in text.split("\n")]
        for name, function in _functions(tree, ""):
            pair = _pair(module, name, function, lines)
            if pair is not None:
                yield pair


def _functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, _Function]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, _Function):
            yield f"{prefix}{node.name}", node
        inner = f"{prefix}{node.name}." if isinstance(node, _Function | ast.ClassDef) else prefix
        yield from _functions(node, inner)


def _pair(module: str, name: str, function: _Function, lines: list[bytes]) -> _Pair | None:
    docstring = ast.get_docstring(function, clean=False)
    if not docstring:
        return None
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring))[0]
    query = " ".join(paragraph.split())
    if len(_WORD.findall(query)) < _MIN_QUERY_WORDS:
        return None
    source, body_words = _source_without_docstrings(function, lines)
    # A first paragraph that is the signature once more would be found by its letters alone.
    if body_words < _MIN_BODY_WORDS or query in " ".join(source.split()):
        return None
    passage_id = f"{module}:{name}:{function.lineno}"
    return _Pair(module_of(passage_id), passage_id, query, source)


def _source_without_docstrings(function: _Function, lines: list[bytes]) -> tuple[str, int]:
    """The source from the first decorator on, and the number of words below its signature."""
    first = min([function.lineno, *(d.lineno for d in function.decorator_list)]) - 1
    kept = lines[first : function.end_lineno]
    for node in ast.walk(function):
        if not isinstance(node, _Function | ast.ClassDef) or not ast.get_docstring(node, False):
            continue
        statement = node.body[0]
        begin, end = statement.lineno - 1 - first, (statement.end_lineno or 0) - 1 - first
        # Columns count UTF-8 bytes, hence lines as bytes. Lines are emptied, not removed, so that
        # the numbers of those below stay true.
        head = kept[begin][: statement.col_offset]
        tail = kept[end][statement.end_col_offset :]
        kept[begin : end + 1] = [b""] * (end - begin) + [head + tail.lstrip(b" \t;")]
    indent = function.col_offset
    body_begin = function.body[0].lineno - 1 - first
    texts = [line.decode() for line in kept]
    source = "\n".join(
        # A line of a multi-line string may start further left than the function does.
        (text[:indent].lstrip() + text[indent:]).rstrip()
        for text in texts
        if text.strip()
    )
    return source, len(_WORD.findall("\n".join(texts[body_begin:])))


def _unique(pairs: Iterator[_Pair]) -> Iterator[_Pair]:
    seen: set[str] = set()
    for pair in pairs:
        query, source = f"q:{pair.query.casefold()}", f"s:{pair.source}"
        if query not in seen and source not in seen:
            yield pair
            seen.update((query, source))
