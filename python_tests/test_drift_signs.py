"""The sign in the scores, against loops over pairs; and what is said of it, and when."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch

import contaccum_ext as ca
from contaccum_ext.drift_signs import LOOKS, SAMPLE, DriftWatch, ScoreShift, score_shift

D = 5


def filled(slots: int, capacity: int, m: int = 1, ids: bool = False, **options):
    """A bank of batches of four, whose vectors turn and grow from batch to batch."""
    torch.manual_seed(0)
    bank = ca.DualMemoryBank(capacity, D, m, torch.float64, **options)
    for step in range(slots // 4):
        shift = 0.2 * step * torch.arange(D)
        queries, passages = torch.randn(4, D) + shift, torch.randn(4, m, D) * (1 + step / 8)
        numbers = torch.randint(0, 6, (4, m)) if ids else None
        ca.contaccum_loss(queries.double(), (passages + shift).double(), bank, 1.0, numbers)
    return bank


def by_loops(bank, count: int) -> ScoreShift:
    """The definition."""
    window = min(len(bank), bank.window)
    queries, passages = bank.queries()[-window:], bank.passages()[-window:]
    aged, ids = (passages + bank.passage_offsets()[-window:])[:count], bank.passage_ids()[-window:]
    new, old = [], []
    numbers = range(window - count, window)
    for i in numbers:
        hidden = {ids[i, 0].item()} - {-1}
        for j, k in itertools.product(range(count), range(bank.passages_per_query)):
            if ids[j, k].item() not in hidden:
                old.append((queries[i] @ aged[j, k]).item())
            slot = numbers[j]
            if slot != i and ids[slot, k].item() not in hidden:
                new.append((queries[i] @ passages[slot, k]).item())
    deviation = statistics.stdev(new)
    gap = (statistics.fmean(old) - statistics.fmean(new)) / deviation
    return ScoreShift(gap, statistics.stdev(old) / deviation)


@pytest.mark.parametrize("drift", ["none", "mean"])
@pytest.mark.parametrize(
    ("slots", "window", "m", "ids"),
    [(24, None, 1, False), (24, 17, 2, True), (64, None, 2, True), (64, 25, 1, True)],
    ids=["partly filled", "its window", "wrapped", "wrapped, its window"],
)
def test_gap_and_spread_are_the_definition_s(drift, slots, window, m, ids):
    bank = filled(slots, 40, m, ids, drift=drift, layout=ca.BankLayout(4, 4, 4))
    bank.window = window
    found, wanted = score_shift(bank, 8), by_loops(bank, 8)
    assert (found.gap, found.spread) == pytest.approx((wanted.gap, wanted.spread), rel=1e-9)
    assert found.size == pytest.approx(math.sqrt(wanted.gap**2 + math.log(wanted.spread) ** 2))
    assert found.size > 0.1


def test_a_known_shift_is_found():
    """Old scores three higher and half as wide as those of new passages."""
    bank = ca.DualMemoryBank(400, 2, dtype=torch.float64)
    values = torch.linspace(-1, 1, 200, dtype=torch.float64)
    queries = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(200, 2)
    zeros = torch.zeros_like(values)
    bank.enqueue(queries, torch.stack([3 + values / 2, zeros], 1).unsqueeze(1))
    bank.enqueue(queries, torch.stack([values, zeros], 1).unsqueeze(1))
    # The first and the last 64: values -1 to -.37 and .37 to 1, each with the same deviation.
    shift, width = score_shift(bank, 200), (values[-64:].std(correction=0)).item()
    middle = values[-64:].mean().item()
    assert shift.spread == pytest.approx(0.5, rel=1e-3)
    assert shift.gap == pytest.approx((3 - middle / 2 - middle) / width, rel=1e-3)


def test_no_more_than_a_sample_is_looked_at():
    bank = filled(4 * SAMPLE, 4 * SAMPLE)
    assert score_shift(bank, 2 * SAMPLE) == score_shift(bank, SAMPLE) == by_loops_(bank)


def by_loops_(bank):
    found = by_loops(bank, SAMPLE)
    return ScoreShift(pytest.approx(found.gap), pytest.approx(found.spread))


def test_what_cannot_be_told_is_none():
    bank = filled(0, 40)
    assert score_shift(bank, 8) is None  # empty
    bank = filled(12, 40)
    assert score_shift(bank, 8) is None  # one end only
    assert score_shift(bank, 1) is None  # no others in the batch
    assert score_shift(bank, 6) is not None
    flat = ca.DualMemoryBank(8, D)
    flat.enqueue(torch.ones(8, D), torch.ones(8, 1, D))
    assert score_shift(flat, 4) is None  # nothing varies
    same = ca.DualMemoryBank(8, D)
    same.enqueue(torch.randn(8, D), torch.randn(8, 1, D), torch.zeros(8, 1, dtype=torch.int64))
    assert score_shift(same, 4) is None  # nothing is left


def test_looking_leaves_the_bank_as_it_is(device):
    bank = filled(24, 40, drift="mean").to(device)
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    assert score_shift(bank, 8) is not None
    assert all(torch.equal(value, before[name]) for name, value in bank.state_dict().items())


HIGH, LOW = ScoreShift(-0.6, 0.9), ScoreShift(-0.3, 0.9)


def test_a_sign_that_stays_is_told_once_and_one_that_passes_is_not():
    watch = DriftWatch()
    passing = [HIGH] * (LOOKS - 1) + [LOW] + [HIGH] * (LOOKS - 1) + [None] + [HIGH] * (LOOKS - 1)
    assert [watch.scores(shift, "mean") for shift in passing] == [[]] * len(passing)
    (said,) = watch.scores(HIGH, "mean")
    assert "gap -0.60 standard deviations, spread 0.90 times; together 0.61" in said
    assert said.endswith("lower learning_rate or bank_size, or set drift=transport")
    assert [watch.scores(HIGH, "mean") for _ in range(9)] == [[]] * 9


@pytest.mark.parametrize(
    ("drift", "end"), [("none", ", or set drift=auto"), ("transport", "or bank_size")]
)
def test_what_to_set_instead_is_what_goes_further(drift, end):
    watch = DriftWatch()
    said = [watch.scores(HIGH, drift) for _ in range(LOOKS)][-1]
    assert said[0].endswith(end)


def test_a_window_of_the_last_updates_alone_is_told_once():
    bank, watch = filled(24, 40, layout=ca.BankLayout(4, 4, 4)), DriftWatch()
    assert watch.window(bank, 7, 4) == []  # whole blocks: nothing has been left out yet
    bank.window = 7
    for fresh, update in ((None, 4), (9, 4), (7, 3)):
        assert watch.window(bank, fresh, update) == []
    (said,) = watch.window(bank, 7, 4)
    assert said.startswith("bank_size 40 is more than the model's speed allows")
    assert "only the newest 8 of 24 are used; lower learning_rate or bank_size" in said
    assert watch.window(bank, 7, 4) == []
