"""The guide to sentence-transformers runs from top to bottom."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
pytest.importorskip("datasets", reason="the Trainer needs datasets")

from docs_page import run_page

PAGE = Path(__file__).resolve().parent.parent / "docs" / "sentence-transformers.md"


def test_the_guide_runs(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page(PAGE, replace={"microsoft/mpnet-base": str(start)})
    # The second run was resumed after step 4, its banks as the first run left them: 8 x 2 a step.
    assert names["wide"].memory.capacity == 4096
    assert (tmp_path / "output" / "checkpoint-6" / "contaccum_banks.pt").is_file()
    assert names["trainer"].loss.memory.filled() == {"16x1": 128}
    assert names["callback"].memories.keys() == {"loss.memory"}
