"""The helper that runs the pages, on pages made for it."""

from __future__ import annotations

import traceback

import pytest
from docs_page import python_blocks, run_page

PAGE = """# Page

```python
first = given + 1
```

```bash
rm -rf /
```

~~~
text
~~~

```python
second = [first,
          "big"]
```
"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE, encoding="utf-8")
    return path


def test_blocks_run_in_order_as_one_program(page):
    names = run_page(page, {"given": 1}, {"big": "small"})
    assert names["second"] == [2, "small"]


def test_only_python_is_taken_and_keeps_its_line(page):
    blocks = python_blocks(page)
    assert [block.strip().splitlines()[0] for block in blocks] == [
        "first = given + 1",
        "second = [first,",
    ]
    lines = PAGE.splitlines()
    for block in blocks:
        number = next(i for i, line in enumerate(block.splitlines()) if line)
        assert lines[number] == block.splitlines()[number]


def test_a_failure_names_the_line_of_the_page(page):
    with pytest.raises(NameError) as failure:
        run_page(page)
    frame = traceback.extract_tb(failure.tb)[-1]
    assert (frame.filename, frame.lineno) == (str(page), 4)


def test_what_is_to_be_replaced_must_occur(page):
    with pytest.raises(ValueError, match="expected 'huge' in a block, found it in none"):
        run_page(page, replace={"huge": "small"})


def test_a_page_without_python_is_an_error(tmp_path):
    (tmp_path / "empty.md").write_text("# Nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="found none"):
        run_page(tmp_path / "empty.md")
