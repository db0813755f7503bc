"""The result of ``python -m benchmarks step``: rows and page."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import MIB, TEMPERATURE
from benchmarks.report import VERDICTS, number, table
from benchmarks.step import OFFICIAL, OURS, StepOptions, StepResult, Variant, added, targets


@dataclass(frozen=True)
class StepRow:
    """One way to compute the loss with one bank. Empty where it was not measured."""

    loss: str
    bank: int  # slots
    n: int
    d: int
    m: int
    dtype: str
    drift: str
    steps: int | None
    ms_median: float | None
    ms_p20: float | None
    ms_p80: float | None
    host_ms: float | None
    adds_percent: float | None  # beyond the same loss without a bank
    adds_to_pytorch_percent: float | None  # beyond the in-batch loss in PyTorch
    graph_ms_median: float | None  # replayed from a graph, likewise
    graph_ms_p20: float | None
    graph_ms_p80: float | None
    graph_adds_percent: float | None
    graph_adds_to_pytorch_percent: float | None
    peak_mib: float | None  # of a step, beyond weights, gradients and all banks
    kept_mib: float  # its bank and table
    note: str


def make_row(one: Variant, result: StepResult) -> StepRow:
    t = one.times if one.times.elapsed else None
    g = one.graph if one.graph.elapsed else None
    own, pytorch, graph_own, graph_pytorch = (
        _hundredfold(added(one, result.find(name, 0), in_graph))
        for in_graph in (False, True)
        for name in (one.loss_name, OFFICIAL)
    )
    options = result.options
    return StepRow(
        loss=one.loss_name,
        bank=one.bank,
        n=options.n,
        d=options.hidden,
        m=options.m,
        dtype=options.dtype,
        drift=options.drift,
        steps=t.steps if t else None,
        ms_median=t.median * 1e3 if t else None,
        ms_p20=t.p20 * 1e3 if t else None,
        ms_p80=t.p80 * 1e3 if t else None,
        host_ms=t.host * 1e3 if t else None,
        adds_percent=own,
        adds_to_pytorch_percent=pytorch,
        graph_ms_median=g.median * 1e3 if g else None,
        graph_ms_p20=g.p20 * 1e3 if g else None,
        graph_ms_p80=g.p80 * 1e3 if g else None,
        graph_adds_percent=graph_own,
        graph_adds_to_pytorch_percent=graph_pytorch,
        peak_mib=None if one.peak_bytes is None else one.peak_bytes / MIB,
        kept_mib=one.kept_bytes / MIB,
        note=one.note,
    )


def _hundredfold(part: float | None) -> float | None:
    return None if part is None else 100 * part


def compose(header: dict[str, str], result: StepResult) -> str:
    """Markdown: targets, the table, and what was run."""
    lines = "\n".join(f"- {key}: {value}" for key, value in header.items())
    parts = ["# A training step of two encoders, with and without a bank", lines]
    parts += ["## What was run", _setup(result.options, result.parameters)]
    return "\n\n".join([*parts, "## Result", summary(result)]) + "\n"


def summary(result: StepResult) -> str:
    """Targets and the table."""
    verdicts = [
        [target.text, _percent(target.value), VERDICTS[target.passed]] for target in targets(result)
    ]
    rows = [make_row(one, result) for one in result.variants]
    lines = [
        [
            row.loss,
            str(row.bank),
            number(row.ms_median, 4),
            f"{number(row.ms_p20, 4)} .. {number(row.ms_p80, 4)}" if row.steps else "-",
            number(row.host_ms, 4),
            _percent(row.adds_percent),
            _percent(row.adds_to_pytorch_percent),
            number(row.graph_ms_median, 4),
            f"{number(row.graph_ms_p20, 4)} .. {number(row.graph_ms_p80, 4)}"
            if row.graph_ms_median
            else "-",
            _percent(row.graph_adds_percent),
            _percent(row.graph_adds_to_pytorch_percent),
            number(row.peak_mib, 5),
            number(row.kept_mib),
            row.note,
        ]
        for row in rows
    ]
    head = ["loss", "bank", "ms", "p20 .. p80", "host ms", "adds", "adds to PyTorch's"]
    head += ["graph ms", "p20 .. p80", "adds", "adds to PyTorch's"]
    head += ["peak MiB", "bank + table MiB", "note"]
    return table(["target", "adds", "verdict"], verdicts) + "\n\n" + table(head, lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}%"


def _setup(options: StepOptions, parameters: int) -> str:
    hard = options.m - 1
    return (
        "Two separate BERT encoders (query and passage, as ContAccum and DPR have them), random "
        f"weights, {options.layers} layers, hidden size {options.hidden}, together "
        f"{parameters / 1e6:.0f} M parameters, bf16 autocast, dropout on, no padding. A micro-step "
        f"encodes {options.n} queries of {options.query_length} tokens and {options.n} x (1 "
        f"positive + {hard} hard negative{'' if hard == 1 else 's'}) passages of "
        f"{options.passage_length} tokens, takes unit vectors of the first tokens, computes the "
        f"loss at temperature {TEMPERATURE:g} and goes backward through everything; gradients are "
        f"accumulated, no optimizer step. Banks are full and {options.dtype}, drift="
        f"{options.drift} for {OURS}.\n\n"
        f"`{OFFICIAL}` is the official algorithm in PyTorch, products in {options.dtype}; with "
        "bank 0 it is the usual in-batch loss. `ms` is the device's time of a micro-step in bursts "
        f"of {options.steps}, median, p20 and p80 over {options.rounds} rounds; in a round every "
        "variant has a turn, the order moving on by one. `host ms` is the host's time for the same "
        "steps until the last call has returned: where it equals `ms`, the host is what is waited "
        "for. `adds` compares with the same loss without a bank, `adds to PyTorch's` with "
        f"`{OFFICIAL}` without a bank, each as the median over rounds of the ratio within the "
        f"round. `graph ms` is the same for {options.steps} steps replayed from a CUDA graph, "
        "where the host plays no part, and what is added there. `peak MiB` is what a step "
        "allocates beyond weights, gradients and banks."
    )
