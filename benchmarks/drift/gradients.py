"""How far a bank's gradient is from that of one large batch, and what of it is a common shift.

The model is trained in-batch for some updates; then all gradients are taken at the same weights,
without dropout, with a bank that holds what these weights make of the updates before: no vector is
stale. The gradient that all of them estimate is the mean over in-batch updates to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.drift.centre import CENTRES
from benchmarks.drift.data import DataSet, load
from benchmarks.drift.report import markdown
from benchmarks.drift.run import Run
from benchmarks.drift.settings import Setting


def gradients(
    data: str,
    directory: Path,
    *,
    learning_rate: float,
    updates: int,
    banks: Sequence[int] = (128, 1024),
    averaged: int = 12,
    **changes: Any,
) -> str:
    """A table in Markdown.

    Args:
        data: name of a prepared set.
        directory: what `prepare` wrote.
        learning_rate: of the updates before.
        updates: their number, at least the largest bank's.
        banks: slots.
        averaged: in-batch updates whose mean gradient is compared with.
        changes: of the central setting.
    """
    device = torch.device("cpu")
    central = Setting(data, method="gradaccum", bf16=False, dropout=0.0, epochs=1)
    setting = replace(central, method="inbatch", learning_rate=learning_rate, **changes)
    loaded = load(directory, setting, device)
    one = _Probe(setting, loaded, directory, device)
    for update in range(updates):
        one.run.update(update)
    weights = one.run.towers.state_dict()
    same, sums = one.gradient(updates)
    aim = torch.stack([one.gradient(updates + i)[0] for i in range(averaged)]).mean(0)

    lines = [_line("in-batch", "", same, same, aim, one.queries, sums)]
    for bank in banks:
        for centre in (None, *CENTRES):
            banked = replace(setting, method="bank", bank=bank, correction="none")
            probe = _Probe(banked, loaded, directory, device)
            probe.run.towers.load_state_dict(weights)
            probe.fill(updates)
            assert probe.run.correction is not None
            probe.run.correction.centre = centre
            found, sums = probe.gradient(updates)
            lines.append(
                _line(f"bank {bank:,}", centre or "as is", found, same, aim, one.queries, sums)
            )
    head = [
        "",
        "centered over",
        "in-batch",
        "mean",
        "query tower",
        "passage tower",
        "sum, passages",
    ]
    return markdown(head, lines)


class _Probe:
    """A run at whose weights gradients are taken."""

    def __init__(
        self, setting: Setting, data: DataSet, directory: Path, device: torch.device
    ) -> None:
        self.run = Run(setting, data, directory / "model", device)
        towers = self.run.towers
        self.queries = sum(p.numel() for p in towers.query.parameters())
        self.parameters = [*towers.query.parameters(), *towers.passage.parameters()]

    def gradient(self, update: int) -> tuple[Tensor, float]:
        """(parameters) of an update; norm of the sum of passages' gradients, by theirs."""
        for parameter in self.parameters:
            parameter.grad = None
        queries, passages = self.run._encode(update)
        _, of_vectors = self.run._loss(update, queries.detach(), passages.detach())
        torch.autograd.backward([queries, passages], of_vectors)
        flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        share = of_vectors[1].flatten(0, -2).sum(0).norm() / of_vectors[1].norm()
        return torch.cat([x.flatten() for x in flat]), float(share)

    @torch.no_grad()
    def fill(self, update: int) -> None:
        """Put all of the bank before an update into the history, as the weights are now."""
        assert self.run.correction is not None
        history = self.run.correction.history
        size = history.update_size
        for earlier in range(history.bank(update).start // size, update):
            slots = slice(earlier * size, (earlier + 1) * size)
            queries, passages = self.run._encode(earlier)
            history.queries[slots] = queries.flatten(0, 1)
            history.passages[slots] = passages.flatten(0, 1)


def _line(
    name: str, centre: str, found: Tensor, same: Tensor, aim: Tensor, queries: int, share: float
) -> list[str]:
    cells = [_cosine(found, same), _cosine(found, aim)]
    cells += [_cosine(found[part], aim[part]) for part in (slice(queries), slice(queries, None))]
    return [name, centre, *(f"{x:.3f}" for x in cells), f"{share:.3f}"]


def _cosine(a: Tensor, b: Tensor) -> float:
    # float64: of so many numbers float32 gets the third digit wrong.
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))
