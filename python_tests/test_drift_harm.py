"""What is made of rows beyond tables: rank correlations, and the figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.drift import cli, harm, rows, tables
from benchmarks.drift.bank_tables import CHOSEN
from benchmarks.drift.centre_tables import SPREAD
from benchmarks.drift.default_bank import (
    AUTO_UPDATES,
    PARTS,
    WIDE_EPOCHS,
    by_default,
    is_default,
)
from benchmarks.drift.report import brief
from benchmarks.drift.settings import Setting, from_row
from benchmarks.drift.side_tables import alike, any_size, both_ways, rebuilt, unmasked
from benchmarks.drift.summary import amounts, shared, summary
from contaccum_ext import bank_size, staleness

ROOT = Path(__file__).parents[1]


def line(update: int, spread: float, window: float = 9.0) -> dict:
    """A line of a trace with one sign that varies; the last age is out of a window below 4."""
    by_age = {name: [0.0, 0.0, 0.0] for name in (
        "residual_query", "residual_passage", "systematic_query", "systematic_passage",
        "shift_query", "shift_passage", "score_gap", "hardness")}  # fmt: skip
    return {"update": update, "ages": [0, 2, 4], "window": window, **by_age, "mass": [1.0] * 3,
            "score_spread": [1.0, 1.0, spread]}  # fmt: skip


def row(setting: Setting, ndcg: float, trace: list[dict]) -> rows.Row:
    return {"key": setting.key, "label": setting.label, "setting": vars(setting),
            "test_ndcg10": ndcg, "trace": trace}  # fmt: skip


def bank(size: int, correction: str = "none", **changes) -> Setting:
    return Setting("squad_sent", bank=size, correction=correction, **changes)


def test_harm_is_counted_against_the_plain_bank_of_an_update():
    done = [
        row(bank(128), 0.70, []),
        row(bank(128, seed=2), 0.68, []),
        row(bank(1024, "mean"), 0.69, [line(40, 1.0)]),
        row(bank(4096, "mean"), 0.68, [line(40, 0.9), line(80, 1.0)]),
        row(bank(8192, "mean"), 0.60, [line(4, 0.01), line(40, 0.5)]),  # too early to count
        row(bank(8192, "guard"), 0.60, [line(40, 0.5, window=3.0)]),  # not in its window
        row(bank(1024, learning_rate=1e-3), 0.1, [line(40, 0.5)]),  # nothing to compare with
    ]
    lines = harm.harm(done).splitlines()
    assert "central (4 runs)" in lines[0] and "all (4 runs)" in lines[0]
    # Harms 0, .01, .09, .09 and signs 0, .1, .7, 0: ranks 0 1 2.5 2.5 and .5 2 3 .5.
    assert lines[2].split("|")[2].strip() == "0.39"  # 1.75 / 4.5
    fixed = next(x for x in lines if "fixed bank, central" in x).split("|")
    assert [x.strip() for x in fixed[2:7]] == ["1 of 2", "-", "-", "1 of 1", "-"]
    assert "1 of 1" in next(x for x in lines if "guarded" in x)


def test_the_commands_print_and_draw(tmp_path, capsys):
    settings = [bank(128), bank(1024), bank(1024, "mean")]
    for setting, spread in zip(settings, (1.0, 0.3, 0.9), strict=True):
        rows.append(tmp_path / "rows.jsonl", row(setting, 0.5, [line(40, spread), line(80, 1.0)]))
    assert cli.main(["harm", "--rows", str(tmp_path / "rows.jsonl")]) == 0
    assert "softmax mass" in capsys.readouterr().out
    picture = tmp_path / "drift.png"
    assert cli.main(["figure", "--rows", str(tmp_path / "rows.jsonl"), "--out", str(picture)]) == 0
    assert picture.read_bytes()[1:4] == b"PNG"


def test_what_has_not_been_run_yet_is_left_out():
    plain, corrected = (
        row(bank(*kind, epochs=1), ndcg, [])
        for kind, ndcg in (((128,), 0.6), ((256, "mean"), 0.625))
    )
    default = row(bank(512, "follow-mean", epochs=1, options=CHOSEN | SPREAD), 0.65, [])
    for table in (summary, amounts):
        assert len(table([], "squad_sent").splitlines()) == 2
        alone = table([corrected, default], "squad_sent")  # with nothing to compare with
        assert len(alone.splitlines()) == 2
        assert "epochs=1 " in table([plain, corrected, default], "squad_sent")
    assert "| +0.0250 (1) |" in amounts([plain, corrected], "squad_sent")
    assert "+0.0500 (1) |" in summary([plain, default], "squad_sent")
    assert len(summary([plain, corrected], "squad_sent").splitlines()) == 2


def test_shared_means_are_compared_with_those_of_micro_batches():
    done = [
        row(bank(4096, "mean", seed=seed, options=options), ndcg, [])
        for seed, options, ndcg in ((1, {}, 0.5), (2, {}, 0.6), (1, {"block": 256}, 0.525))
    ]
    lines = shared(done, "squad_sent").splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["central", "4,096", "`mean`", "0.5500 ± 0.0500", "-", "+0.0250 (1)", "-"]
    assert len(lines) == 3
    assert len(shared(done[:2], "squad_sent").splitlines()) == 2  # nothing to compare


def test_the_default_of_a_size_is_what_the_library_has_there():
    def made(size: int, **change) -> dict:
        return by_default(bank(size, **change)).options

    assert AUTO_UPDATES == bank_size.AUTO_UPDATES and WIDE_EPOCHS == bank_size.WIDE_EPOCHS
    assert PARTS == staleness.REBUILD_PARTS
    assert made(512) == CHOSEN | SPREAD == made(512, row_weighting="all", epochs=10)
    assert made(4096, epochs=3) == CHOSEN | SPREAD
    assert made(4096, epochs=10) == CHOSEN | SPREAD | {"narrow": 0.3}
    assert made(16384, row_weighting="all", epochs=10) == CHOSEN | SPREAD | {
        "narrow": 0.0,
        "parts": 32,
    }
    one = by_default(bank(16384, seed=2, epochs=10, mask=False))
    assert is_default(one, 16384) and not is_default(one, 4096)
    assert not is_default(replace(one, options=CHOSEN | SPREAD), 16384)


def test_what_masking_is_worth_is_told_by_setting():
    def default(size: int, ndcg: float, **change) -> rows.Row:
        return row(by_default(bank(size, **change)), ndcg, [])

    done = [
        row(bank(128, epochs=10), 0.5, []),
        row(bank(128, epochs=10, mask=False), 0.475, []),
        default(512, 0.6, epochs=10),
        default(512, 0.55, epochs=10, mask=False),
        default(16384, 0.65, epochs=10),
    ]
    lines = unmasked(done, "squad_sent").splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    told = ["-", "-0.0250 (1)", "-0.0500 (1)", "-", "-", "+0.0750 (1)", "-", "-"]
    assert cells == ["epochs=10", *told] and len(lines) == 3
    lines = any_size(done, "squad_sent").splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["epochs=10", "0.5000", "+0.1000 (1)", "-", "+0.1500 (1)"] and len(lines) == 3
    assert len(unmasked(done[:1], "squad_sent").splitlines()) == 2


def test_equal_values_share_a_rank():
    assert harm._ranks([3.0, 1.0, 3.0, 2.0]).tolist() == pytest.approx([2.5, 0, 2.5, 1])


def test_the_page_holds_what_the_rows_give():
    done = rows.finished(ROOT / "benchmarks/results/drift/rows.jsonl")
    assert all(from_row(found["setting"]).key == key for key, found in done.items())
    page = (ROOT / "docs/drift.md").read_text()
    for name in ("central", "ideas", "guards", "safe", "means", "few", "whole", "centred-updates"):
        assert brief(tables.settings([name]), done, tables.BASELINE) in page, name
    for data in ("squad_sent", "medquad"):
        assert summary(done.values(), data) in page
        assert amounts(done.values(), data) in page
        assert shared(done.values(), data) in page
        for table in (any_size, unmasked, rebuilt, alike, both_ways):
            assert table(done.values(), data) in page, table.__name__
    assert all(part in page for part in harm.harm(list(done.values())).split("\n\n"))
