"""What tests of drift="transport" in sentence-transformers share: losses, probes, the answer."""

from __future__ import annotations

import copy

import torch
from tiny_sentence_transformer import EPS, PAIRS, features, rows
from torch.nn.functional import normalize

import contaccum_ext as ca

# Sums of a few hundred terms, behind a ridge that bounds how much the solution magnifies errors.
CLOSE = {"rtol": 0, "atol": 1e4 * EPS}

PROBES = {"drift": "transport", "drift_probes": 10, "drift_ridge": 0.2}  # complete with 12 rows


def make(kind, model, **changes):
    _, ours, options = PAIRS[kind]
    return ours(model, **({"bank_size": 40} | PROBES | options | changes))


def optimizer(model) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5)


def learn(loss, columns, optimizer=None) -> None:
    loss(columns, None).backward()
    if optimizer is not None:
        optimizer.step()
    loss.zero_grad()


def probe_columns(model, negatives: int = 1) -> list[dict]:
    """The 10 anchors and 5 (m = 2) or 10 (m = 1) of each column's passages that are probes."""
    each = 10 // (1 + negatives)
    columns = rows(10, negatives)
    return features(model, {k: v if k == "anchor" else v[:each] for k, v in columns.items()})


@torch.no_grad()
def encode(model, columns) -> list[torch.Tensor]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    vectors = [model(dict(column))["sentence_embedding"] for column in columns]
    for module, mode in modes:
        module.training = mode
    return vectors


def moved(bank, old, new, unit=True):
    """A bank after transport by full embeddings, one per column."""
    bank = copy.deepcopy(bank)
    (old_queries, *old), (new_queries, *new) = (
        [normalize(v[:, : bank.dim], dim=-1) if unit else v[:, : bank.dim] for v in columns]
        for columns in (old, new)
    )
    old, new = torch.cat(old), torch.cat(new)
    ca.transport(bank, old_queries, new_queries, old, new, ridge=0.2, normalize=unit)
    return bank


def assert_followed(bank, expected, newer: int) -> None:
    """The bank is the expected one, apart from what was enqueued since."""
    torch.testing.assert_close(bank.queries()[:-newer], expected.queries(), **CLOSE)
    torch.testing.assert_close(bank.passages()[:-newer], expected.passages(), **CLOSE)
