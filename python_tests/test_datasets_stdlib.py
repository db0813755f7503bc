"""The set made of the standard library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from contaccum_ext.datasets import (
    DataError,
    load_dataset,
    load_stdlib,
)
from contaccum_ext.datasets.stdlib import module_of


@pytest.fixture(scope="module")
def stdlib():
    return load_dataset("stdlib")


def test_stdlib_is_large_enough_and_whole(stdlib):
    assert len(stdlib.train) > 1500
    assert len(stdlib.valid) > 50
    assert len(stdlib.test) > 300
    examples = [*stdlib.train, *stdlib.valid, *stdlib.test]
    assert {i for example in examples for i in example.positives} == set(stdlib.corpus)
    assert all(example.negatives == () for example in stdlib.train)


def test_stdlib_splits_share_no_module(stdlib):
    train, valid, test = (
        {module_of(example.id) for example in split}
        for split in (stdlib.train, stdlib.valid, stdlib.test)
    )
    assert not train & valid
    assert not train & test
    assert not valid & test
    assert "test" not in train | valid | test


def test_stdlib_passages_hold_no_docstring_and_repeat_nothing(stdlib):
    queries = {e.id: e.query for e in [*stdlib.train, *stdlib.valid, *stdlib.test]}
    assert len({query.casefold() for query in queries.values()}) == len(queries)
    assert len({passage.text for passage in stdlib.corpus.values()}) == len(queries)
    leaks = [i for i, query in queries.items() if query in " ".join(stdlib.corpus[i].text.split())]
    assert leaks == []


def test_stdlib_is_the_same_in_another_process(stdlib):
    """Python salts hash() anew in every process; the splits must not follow it."""
    code = (
        "from contaccum_ext.datasets import load_stdlib; d = load_stdlib(); "
        "print([[e.id for e in s] for s in (d.train, d.valid, d.test)])"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONHASHSEED": "123"},
    )
    splits = [[e.id for e in s] for s in (stdlib.train, stdlib.valid, stdlib.test)]
    assert other.stdout.strip() == str(splits)


MODULE = '''\
# a form feed on the next line is no line end\n\x0c
class Tree:
    """Not a function: no passage of its own."""

    @property
    def size(self):
        """Number of leaves in this tree.

        A second paragraph that no query holds.
        """
        def count(node):
            """Count the leaves below one node."""
            return sum(count(child) for child in node.children) or 1

        return count(self)  # cafés included: é

    def one_line(self): "Return every leaf from left to right."; return list(self.leaves())

    def short(self):
        """Too little below this docstring here."""
        return 1

    def vague(self):
        """Do it."""
        return [child.vague() for child in self.children if child.wanted]
'''


def test_stdlib_source_of_functions(tmp_path):
    (tmp_path / "trees.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "trees.py").write_text(MODULE.replace("leaves", "tests"))
    dataset = load_stdlib(tmp_path)
    examples = [*dataset.train, *dataset.valid, *dataset.test]
    found = {e.id: (e.query, dataset.corpus[e.id].text) for e in examples}
    assert found == {
        "trees:Tree.size:7": (
            "Number of leaves in this tree.",
            "@property\n"
            "def size(self):\n"
            "    def count(node):\n"
            "        return sum(count(child) for child in node.children) or 1\n"
            "    return count(self)  # cafés included: é",
        ),
        "trees:Tree.size.count:12": (
            "Count the leaves below one node.",
            "def count(node):\n    return sum(count(child) for child in node.children) or 1",
        ),
        "trees:Tree.one_line:18": (
            "Return every leaf from left to right.",
            "def one_line(self): return list(self.leaves())",
        ),
    }


def test_stdlib_directory_without_modules(tmp_path):
    with pytest.raises(DataError) as caught:
        load_stdlib(tmp_path)
    assert str(caught.value) == f"{tmp_path}: no documented Python functions found"
