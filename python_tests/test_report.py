"""Tables, curves, the paired difference and the page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from tiny_retriever import tiny_config, tiny_dataset

from contaccum_ext.datasets import EvalQuery, RetrievalDataset
from contaccum_ext.reporting import metric_table, trained_verdicts, write_report
from contaccum_ext.reporting.plots import gradient_ratio_plot, loss_plot, smooth
from contaccum_ext.training.comparison import Comparison, Row, paired_difference
from contaccum_ext.training.metrics import UpdateMetrics


def history(losses, ratio=1.0):
    return [
        UpdateMetrics(
            update=update,
            loss=9.0,
            in_batch_loss=loss,
            learning_rate=1e-3,
            grad_norm_query=1.0,
            grad_norm_passage=ratio,
            grad_norm_ratio=ratio,
            queries_per_second=100.0,
            bank_filled=8,
            skipped=0,
        )
        for update, loss in enumerate(losses, 1)
    ]


def row(name, values, **trained) -> Row:
    run = {f"q{i}": [(f"p{(i + 1) % 48}", 0.9), (f"p{i}", 0.8)] for i in range(48, 56)}
    per_query = dict(zip((f"q{i}" for i in range(48, 56)), values, strict=True))
    return Row(name, {"NDCG@10": sum(values) / len(values)}, {"NDCG@10": per_query}, run, **trained)


@pytest.fixture
def comparison() -> Comparison:
    dataset = tiny_dataset()
    odd = EvalQuery("q48", "who <b>crosses</b> & river?", ("p48",))
    dataset = RetrievalDataset("tiny", dataset.corpus, dataset.train, [], [odd, *dataset.test[1:]])
    rows = [
        row("BM25", [0.5] * 8),
        row("untrained", [0.0, 0.25] * 4),
        row("gradaccum", [0.25, 0.5] * 4, history=history([2.0, 1.0]), train_seconds=61.4),
        row("contaccum", [0.5, 0.75] * 4, history=history([2.0, 0.5], 3.0), train_seconds=70.0),
    ]
    return Comparison(dataset, tiny_config(), rows)


def test_table(comparison):
    assert metric_table(comparison) == (
        "           NDCG@10  training\n"
        "----------------------------\n"
        "BM25         0.500         -\n"
        "untrained    0.125         -\n"
        "gradaccum    0.375      61 s\n"
        "contaccum    0.625      70 s"
    )


def test_a_constant_gap_has_no_width_and_equal_rows_no_gap(comparison):
    ours, theirs = comparison.row("contaccum"), comparison.row("gradaccum")
    gap = paired_difference(ours, theirs, "NDCG@10")
    assert (gap.mean, gap.low, gap.high) == pytest.approx((0.25, 0.25, 0.25))
    none = paired_difference(ours, ours, "NDCG@10")
    assert (none.mean, none.low, none.high) == (0, 0, 0)


def test_the_interval_is_the_bootstrap_of_the_mean():
    # 400 queries, half gain 1 and half nothing: the mean's standard error is 0.5 / 20.
    def of(values):
        per_query = {f"q{i}": value for i, value in enumerate(values)}
        return Row("x", {}, {"M": per_query}, {})

    gap = paired_difference(of([1.0, 0.0] * 200), of([0.0] * 400), "M")
    assert gap.mean == 0.5
    assert gap.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005)
    assert gap.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)


def test_verdicts_compare_later_methods_with_the_first(comparison):
    assert trained_verdicts(comparison) == [
        "contaccum - gradaccum: +0.250 NDCG@10 (95% interval +0.250 to +0.250 over the test "
        "queries)"
    ]
    comparison.rows[3] = row("contaccum", [0.5, 0.25] * 4, history=history([1.0]))
    assert trained_verdicts(comparison)[0].endswith(": no clear difference)")


def test_smoothing_is_a_running_mean():
    assert smooth([4.0, 2.0, 0.0, 2.0], 2) == pytest.approx([4, 3, 1, 1])
    assert smooth([1.0, 5.0], 1) == [1, 5]


def test_plots_show_the_trained_methods_and_repeat_exactly(comparison):
    svg = loss_plot(comparison.histories())
    assert svg.startswith("<svg")
    assert ">gradaccum<" in svg
    assert ">contaccum<" in svg
    assert ">BM25<" not in svg
    assert loss_plot(comparison.histories()) == svg
    assert ">gradient norm, passage / query encoder<" in gradient_ratio_plot(comparison.histories())


class Page(HTMLParser):
    """Collects what a browser would fetch, and checks that elements close."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: dict[str, int] = {}

    def handle_starttag(self, tag, attrs):
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.fetched += [
            value for name, value in attrs if name in ("src", "href", "xlink:href", "data")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(comparison, tmp_path):
    file = tmp_path / "new" / "report.html"
    write_report(comparison, file, "contaccum demo --data 'a b'")
    text = file.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert all(reference.startswith("#") for reference in page.fetched)
    assert not re.search(r"@import|url\((?!#)", text)
    assert page.seen["svg"] == 3
    assert "script" not in page.seen
    assert "who &lt;b&gt;crosses&lt;/b&gt; &amp; river?" in text
    assert "<td>contaccum</td><td>0.625</td><td>70 s</td>" in text
    assert "contaccum - gradaccum: +0.250 NDCG@10" in text
    assert "contaccum demo --data &#x27;a b&#x27;" in text
    assert "<td>learning_rate</td><td>0.001</td>" in text


def test_samples_mark_the_right_answers(comparison, tmp_path):
    file = tmp_path / "report.html"
    write_report(comparison, file, "contaccum demo")
    text = file.read_text(encoding="utf-8")
    assert text.count("<details") == 8
    # Eight queries, each with its right answer, which three dense rows then have second.
    assert text.count('class="hit right"') == 8 + 24
    assert text.count("right answer at rank 2<") == 24
    assert text.count('class="hit"') == 24


def test_a_shared_encoder_has_no_ratio_plot(comparison, tmp_path):
    shared = Comparison(comparison.dataset, tiny_config(shared_encoder=True), comparison.rows)
    write_report(shared, tmp_path / "report.html", "contaccum demo")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 2
    assert "gradient norm, passage" not in text
