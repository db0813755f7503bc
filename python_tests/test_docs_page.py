"""The helper that runs the pages, on pages made for it."""

from __future__ import annotations

import traceback

import docs_page
import pytest
from docs_page import blocks, run_page

PAGE = """# Page

```python
first = given + 1
```

```bash
contaccum eval --data "two words" \\
    --checkpoint big   # the newest

contaccum report one
```

~~~
text
~~~

```python
second = [first, "big", list(calls)]
```
"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE, encoding="utf-8")
    return path


@pytest.fixture
def calls(monkeypatch):
    """Arguments of the calls of the command, each of which ends with 0."""
    made: list[list[str]] = []
    monkeypatch.setattr(docs_page, "main", lambda arguments: made.append(arguments) or 0)
    return made


def test_blocks_run_in_order_as_one_session(page, calls):
    names = run_page(page, {"given": 1, "calls": calls}, {"big": "small"})
    expected = [["eval", "--data", "two words", "--checkpoint", "small"], ["report", "one"]]
    assert names["second"] == [2, "small", expected]


def test_blocks_know_their_language_and_line(page):
    lines = PAGE.splitlines()
    found = blocks(page, "python", "bash")
    assert [block.language for block in found] == ["python", "bash", "python"]
    for block in found:
        assert lines[block.line - 1] == block.source.splitlines()[0]
    assert [block.source.split()[0] for block in blocks(page, "python")] == ["first", "second"]


def test_a_failure_names_the_line_of_the_page(page, monkeypatch):
    with pytest.raises(NameError) as failure:
        run_page(page)
    frame = traceback.extract_tb(failure.tb)[-1]
    assert (frame.filename, frame.lineno) == (str(page), 4)
    monkeypatch.setattr(docs_page, "main", lambda arguments: int(arguments[0] == "report"))
    with pytest.raises(AssertionError, match=r"page\.md:11: .* end with 0, got 1"):
        run_page(page, {"given": 1})


def test_nothing_but_the_command_is_run_nor_anything_before_it(tmp_path, calls):
    path = tmp_path / "page.md"
    path.write_text("```sh\ncontaccum demo\nrm -rf /\n```\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.md:3: expected a call of contaccum, got rm"):
        run_page(path)
    assert calls == []


def test_what_is_to_be_replaced_must_occur(page):
    with pytest.raises(ValueError, match="expected 'huge' in a block, found it in none"):
        run_page(page, replace={"huge": "small"})


def test_a_page_without_snippets_is_an_error(tmp_path):
    (tmp_path / "empty.md").write_text("# Nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="found none"):
        run_page(tmp_path / "empty.md")
