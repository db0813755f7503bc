"""Bank ages, masked pairs, similarity mass, memory, and where they are written."""

from __future__ import annotations

import sys
import types
import warnings
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_retriever import tiny_dataset
from trainer_parts import make_trainer

from contaccum_ext import BankLayout, DualMemoryBank, contaccum_loss
from contaccum_ext.drift_signs import ScoreShift, score_shift
from contaccum_ext.training import ConfigError, scoring
from contaccum_ext.training.diagnostics import BankAges, look


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 15)), max_size=20),
)
def test_ages_are_those_of_a_list_of_slots(capacity, history):
    ages, slots, update = BankAges(capacity), [], 0
    for step, count in history:
        update += step
        ages.enqueue(update, count)
        slots = (slots + [update] * count)[-capacity:]
        expected = [update - entered for entered in slots]
        assert ages.of_slots(update).tolist() == expected
        assert ages.oldest(update) == expected[0]
        again = BankAges(capacity)
        again.set_state(ages.state())
        assert again.of_slots(update + 3).tolist() == [age + 3 for age in expected]
    ages.clear()
    assert ages.oldest(update) is None
    assert ages.of_slots(update).tolist() == []


@pytest.mark.parametrize("drift", ["none", "mean"])
def test_mass_and_masks_are_those_of_the_loss(drift):
    torch.manual_seed(0)
    bank = DualMemoryBank(7, 5, passages_per_query=2, drift=drift)
    ages = BankAges(7)
    for update, size in enumerate((4, 3, 2)):
        ids = torch.randint(0, 9, (size, 2))
        q, p = torch.randn(size, 5) + update, torch.randn(size, 2, 5) + update
        contaccum_loss(q, p, bank, 0.5, ids)
        ages.enqueue(update, size)
    queries, passages = torch.randn(3, 5), torch.randn(3, 2, 5)
    ids = torch.randint(0, 9, (3, 2))
    seen = look(queries, passages, ids, bank, ages.of_slots(3), 0.5, "both")

    # Gradients of the loss of local rows say what mass each passage has: with w = 1/n,
    # d loss / d score = mass - [target], so that scores moved by one constant change nothing, and
    # those of one age move the loss by that age's mass.
    banked = (bank.passages() + bank.passage_offsets()).requires_grad_()
    local = passages.reshape(6, 5)
    shift = torch.zeros(4, requires_grad=True)  # by age: none, 1, 2, 3
    slot_ages = ages.of_slots(3)
    masses, masked = torch.zeros(4), 0
    rows = []
    for i in range(3):
        scores = []
        for j in range(6):
            hidden = ids.reshape(-1)[j] == ids[i, 0] and j != 2 * i
            masked += int(hidden)
            if not hidden:
                scores.append(queries[i] @ local[j] / 0.5 + shift[0])
        for j in range(7):
            for k in range(2):
                hidden = bank.passage_ids()[j, k] == ids[i, 0]
                masked += int(hidden)
                if not hidden:
                    scores.append(queries[i] @ banked[j, k] / 0.5 + shift[slot_ages[j]])
        rows.append(torch.stack(scores).logsumexp(0))
    (masses,) = torch.autograd.grad(torch.stack(rows).mean(), shift)
    masked += sum(
        int(bank.passage_ids()[j, 0] == ids.reshape(-1)[c]) for j in range(7) for c in range(6)
    )
    assert seen.masked_pairs == masked > 0
    assert seen.mass_local == pytest.approx(masses[0].item(), rel=1e-5)
    assert seen.mass_by_age[0] == 0  # nothing of this update is banked yet
    assert seen.mass_by_age[1:] == pytest.approx(masses[1:].tolist(), rel=1e-5)


def test_slots_outside_of_the_window_have_no_mass():
    torch.manual_seed(0)
    bank, ages = DualMemoryBank(8, 5, layout=BankLayout(1, 1, 1)), BankAges(8)
    for update in range(4):
        contaccum_loss(torch.randn(2, 5), torch.randn(2, 1, 5), bank, 0.5)
        ages.enqueue(update, 2)
    batch = torch.randn(3, 5), torch.randn(3, 1, 5), None
    whole = look(*batch, bank, ages.of_slots(4), 0.5, "both")
    bank.window = 3  # both of the last update and one of that before
    seen = look(*batch, bank, ages.of_slots(4), 0.5, "both")
    newest = DualMemoryBank(3, 5)
    newest.enqueue(bank.queries()[-3:], bank.passages()[-3:])
    assert seen == look(*batch, newest, ages.of_slots(4)[-3:], 0.5, "both")
    assert len(whole.mass_by_age) == 5 and len(seen.mass_by_age) == 3


@pytest.mark.parametrize("method", ["contaccum", "gradcache_contaccum"])
def test_metrics_tell_them_at_the_wanted_updates(start, tmp_path, method):
    trainer = make_trainer(start, tmp_path, method=method, bank_size=20, diagnostics_every=2)
    history = [trainer.update() for _ in range(4)]
    # Updates of 8: 20 slots reach back to the update before the last one.
    assert [metrics.bank_oldest for metrics in history] == [0, 1, 2, 2]
    assert [metrics.mass_by_age is None for metrics in history] == [True, False, True, False]
    last = history[3]
    # The last micro-batch meets the one before it, of its own update, unless all are one batch.
    assert (last.mass_by_age[0] > 0) == (method == "contaccum")
    assert last.mass_local + sum(last.mass_by_age) == pytest.approx(1, abs=1e-5)
    assert min(last.mass_by_age[1:]) > 0
    assert all(metrics.peak_memory > 10 for metrics in history)


@pytest.mark.parametrize("method", ["contaccum", "gradcache_contaccum"])
def test_metrics_tell_how_old_slots_are_scored_beside_new_ones(start, tmp_path, method):
    settings = {"method": method, "bank_size": 20, "diagnostics_every": 2, "drift": "mean"}
    trainer = make_trainer(start, tmp_path, **settings)
    history = [trainer.update() for _ in range(4)]
    # Behind the update, before the step: two updates of 8, then 20 slots.
    shift = score_shift(trainer.method.bank, 8)
    assert (history[3].bank_score_gap, history[3].bank_score_spread) == (shift.gap, shift.spread)
    assert [metrics.bank_score_gap is None for metrics in history] == [True, False, True, False]
    queries_alone = make_trainer(start, tmp_path, bank_passage=False, **settings)
    assert [queries_alone.update().bank_score_gap for _ in range(2)] == [None, None]


def test_the_sign_is_looked_for_in_every_tenth_update_by_itself(start, tmp_path):
    trainer = make_trainer(start, tmp_path, bank_size=20, epochs=8)
    history = [trainer.update() for _ in range(20)]
    told = [metrics.update for metrics in history if metrics.bank_score_gap is not None]
    assert told == [10, 20]
    assert all(metrics.mass_local is None for metrics in history)


def test_a_sign_that_stays_is_warned_of_once(start, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "score_shift", lambda *_: ScoreShift(1.0, 1.0))
    trainer = make_trainer(start, tmp_path, drift="mean", diagnostics_every=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(10):
            trainer.update()
    (said,) = [str(w.message) for w in caught if "looks in a row" in str(w.message)]
    assert said.startswith("update 6: 3 looks in a row have found old banked passages scored")


def test_what_the_loss_does_not_see_is_not_counted(start, tmp_path):
    one_passage = tiny_dataset()
    for index, example in enumerate(one_passage.train):
        one_passage.train[index] = type(example)(example.id, example.query, ("p0",), ())
    for option, pairs in (
        ({"bank_query": False}, 4 * 12 - 4),  # no banked rows
        ({"bank_passage": False}, 4 * 4 - 4 + 8 * 4),  # no banked columns
    ):
        trainer = make_trainer(
            start,
            tmp_path,
            one_passage,
            hard_negatives=0,
            bank_size=8,
            diagnostics_every=1,
            **option,
        )
        trainer.update()
        seen = trainer.update()
        assert seen.masked_pairs == pairs
        assert seen.mass_by_age == ([0.0, 0.0] if "bank_query" in option else [])
    waiting = make_trainer(start, tmp_path, bank_warmup_updates=1, diagnostics_every=1)
    assert [waiting.update().mass_by_age is None for _ in range(2)] == [True, False]


def test_looking_changes_nothing(start, tmp_path):
    blind, looking = (
        make_trainer(start, tmp_path / str(every), bank_size=20, diagnostics_every=every)
        for every in (0, 1)
    )
    for _ in range(3):
        assert blind.update().loss == looking.update().loss


def test_one_passage_for_all_masks_every_pair(start, tmp_path):
    dataset = tiny_dataset()
    for index, example in enumerate(dataset.train):
        dataset.train[index] = type(example)(example.id, example.query, ("p0",), ())
    settings = {"hard_negatives": 0, "bank_size": 8, "diagnostics_every": 1}
    trainer = make_trainer(start, tmp_path, dataset, **settings)
    trainer.update()
    # 4 local rows and columns, 8 slots: all but the 4 targets, and banked rows x local columns.
    assert trainer.update().masked_pairs == 4 * 12 - 4 + 8 * 4


def test_a_bank_cleared_or_skipped_has_no_age(start, tmp_path):
    trainer = make_trainer(start, tmp_path, bank_size=20, clear_bank_every_update=True)
    assert [trainer.update().bank_oldest for _ in range(3)] == [0, 0, 0]
    trainer = make_trainer(start, tmp_path, method="gradaccum")
    assert trainer.update().bank_oldest is None


class Writer:
    """Stands for TensorBoard's, which is not needed to test."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, directory, purge_step) -> None:
        self.directory, self.purge_step = directory, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False
        self.made.append(self)

    def add_scalar(self, name, value, step) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_what_the_file_gets(start, tmp_path, monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    settings = {"tensorboard": True, "max_updates": 2, "diagnostics_every": 2}
    trainer = make_trainer(start, tmp_path, **settings)
    history = trainer.train(progress=False)
    (writer,) = Writer.made
    assert (writer.directory, writer.purge_step) == (str(tmp_path / "tensorboard"), 1)
    assert writer.closed
    assert ("loss", history[0].loss, 1) in writer.scalars
    assert ("mass_by_age/1", history[1].mass_by_age[1], 2) in writer.scalars
    assert not any(name in ("update", "loss_scale") for name, _, _ in writer.scalars)


def test_tensorboard_that_is_not_installed_is_said_before_training(start, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trainer = make_trainer(start, tmp_path, tensorboard=True)
    with pytest.raises(ConfigError, match=r"pip install \"contaccum-ext\[tensorboard\]\""):
        trainer.train(progress=False)
    assert trainer.done == 0
