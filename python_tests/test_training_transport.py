"""The trainer lets its bank follow the encoders: the probes, the state, what is left alone."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tiny_retriever import assert_same_weights, weights
from trainer_parts import make_trainer as make_resting_trainer

import contaccum_ext as ca
from contaccum_ext.bank_size import auto_drift, width_warnings

SETTINGS = {"drift": "transport", "drift_probes": 10, "bank_size": 24, "drift_ridge": 0.2}


@pytest.fixture
def two_towers(tmp_path_factory):
    from tiny_retriever import write_tiny_encoder

    return write_tiny_encoder(tmp_path_factory.mktemp("model"), dropout=0.1)


def make_trainer(start, output, **settings):
    trainer = make_resting_trainer(start, output, **settings)
    trainer.model.train()  # dropout on
    return trainer


def vectors(trainer) -> tuple[torch.Tensor, torch.Tensor]:
    return trainer.probes.encode(trainer.model)


def test_the_bank_is_moved_as_the_probes_have_been_by_the_step(two_towers, tmp_path, monkeypatch):
    trainer = make_trainer(two_towers, tmp_path, **SETTINGS)
    trainer.update()
    before = vectors(trainer)
    at_step = {}

    def step():
        at_step["bank"] = copy.deepcopy(trainer.method.bank)
        return type(trainer)._step(trainer)

    monkeypatch.setattr(trainer, "_step", step)
    trainer.update()
    now, bank = vectors(trainer), at_step["bank"]
    ca.transport(bank, before[0], now[0], before[1], now[1], ridge=0.2, normalize=True)
    moved = trainer.method.bank
    torch.testing.assert_close(moved.queries(), bank.queries(), rtol=0, atol=0)
    torch.testing.assert_close(moved.passages(), bank.passages(), rtol=0, atol=0)
    assert not torch.equal(before[0], now[0])


@pytest.mark.parametrize("drift", ["transport", "mean"])
def test_a_large_bank_is_used_in_part_from_an_epoch_on(two_towers, tmp_path, drift):
    """An automatic bank has 8 updates of 4 queries here, and an epoch 10 of them."""
    settings = {"local_batch_size": 2, "accumulation_steps": 2, "bank_size": 200, "drift": drift}
    settings |= {"wide_epochs": 2, "epochs": 3, "drift_limit": 1e9}
    trainer = make_trainer(two_towers, tmp_path, **settings)
    assert trainer.sampler.updates_per_epoch == 10 and trainer.total == 30
    windows = [trainer.update().bank_window for _ in range(30)]
    assert windows[:20] == [4 * update for update in range(1, 21)]
    # 32 slots in whole blocks: one, and that which is being filled.
    block = trainer.method.bank.layout.block
    assert block == 40
    assert all(block <= window < 2 * block for window in windows[21:]), windows


def test_probes_are_as_many_passages_as_queries_without_dropout(two_towers, tmp_path):
    trainer = make_trainer(two_towers, tmp_path, **SETTINGS)
    state = torch.get_rng_state()
    queries, passages = vectors(trainer)
    assert (len(queries), len(passages)) == (10, 10)
    torch.testing.assert_close((queries, passages), vectors(trainer), rtol=0, atol=0)
    assert trainer.model.training and torch.equal(torch.get_rng_state(), state)


def test_following_spends_no_random_numbers(two_towers, tmp_path):
    states = []
    for drift in ("transport", "none"):
        trainer = make_trainer(two_towers, tmp_path / drift, **SETTINGS | {"drift": drift})
        trainer.update()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def assert_resumed_ends_like(whole, start, directory, settings, before: int, after: int) -> None:
    """A run of so many updates, and another that goes on from its state, end with whole's bits."""
    first = make_trainer(start, directory / "part", **settings)
    for _ in range(before):
        first.update()
    state = copy.deepcopy(first.state_dict())  # before another trainer seeds
    second = make_trainer(start, directory / "part", **settings)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(state)
    for _ in range(after):
        second.update()
    assert_same_weights(weights(second.model), weights(whole.model))
    ours, theirs = second.method.bank.state_dict(), whole.method.bank.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("more", [{}, {"symmetric": True, "learn_temperature": True}])
def test_a_resumed_run_ends_with_the_same_bits(two_towers, tmp_path, more):
    settings = SETTINGS | {"max_updates": 4, "drift_limit": 0.05, "bank_size": 40} | more
    whole = make_trainer(two_towers, tmp_path / "whole", **settings)
    whole.train(progress=False)
    assert_resumed_ends_like(whole, two_towers, tmp_path, settings, 2, 2)


@pytest.mark.parametrize("more", [{}, {"symmetric": True}])
def test_a_run_that_is_resumed_between_two_rebuilds_ends_with_the_same_bits(
    two_towers, tmp_path, more
):
    """Beyond 32 updates of slots the table is rebuilt in every other update."""
    settings = SETTINGS | {"local_batch_size": 2, "accumulation_steps": 1, "epochs": 10} | more
    settings |= {"bank_size": 90, "max_updates": 41, "drift_limit": 1e9, "wide_epochs": 100}
    whole = make_trainer(two_towers, tmp_path / "whole", **settings)
    rebuilt = []
    for _ in range(41):
        whole.update()
        rebuilt.append(whole.method.bank.pending_rebuild(1 / 0.05, -1) != 0)
    assert rebuilt[31:] == [True, *[False, True] * 4, False], rebuilt
    # The 38th has moved the bank and left the table as it was.
    assert_resumed_ends_like(whole, two_towers, tmp_path, settings, 38, 3)


def test_a_skipped_update_moves_nothing(two_towers, tmp_path):
    trainer = make_trainer(two_towers, tmp_path, on_nonfinite="skip", **SETTINGS)
    trainer.update()
    before = trainer.method.bank.queries()
    broken = trainer.method.accumulate
    trainer.method.accumulate = lambda *a: type(broken(*a))(float("nan"), 0.0, (0,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.update()
    torch.testing.assert_close(trainer.method.bank.queries(), before, rtol=0, atol=0)


def test_a_run_whose_first_update_is_skipped_moves_what_the_second_has_banked(two_towers, tmp_path):
    trainer = make_trainer(two_towers, tmp_path, on_nonfinite="skip", **SETTINGS)
    sound = trainer.method.accumulate
    trainer.method.accumulate = lambda *a: type(sound(*a))(float("nan"), 0.0, (0,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.update()
    assert not trainer.method.scoring.transport.started
    trainer.method.accumulate = sound
    assert trainer.update().bank_staleness > 0


def test_the_window_and_the_staleness_are_in_the_metrics(two_towers, tmp_path):
    settings = SETTINGS | {"learning_rate": 0.3, "bank_size": 200, "drift_limit": 0.05}
    trainer = make_trainer(two_towers, tmp_path, epochs=5, **settings)
    metrics = [trainer.update() for _ in range(12)]
    assert [m.bank_filled for m in metrics] == [8 * i for i in range(1, 13)]
    assert metrics[-1].bank_window < metrics[-1].bank_filled == 96
    assert metrics[-1].bank_window == trainer.method.bank.window
    assert all(m.bank_staleness > 0.05 for m in metrics)  # at such a rate no map is good enough
    resting = make_trainer(two_towers, tmp_path / "none", **SETTINGS | {"drift": "mean"})
    assert resting.update().bank_staleness is None


def test_an_automatic_correction_follows_only_a_bank_of_many_updates(two_towers, tmp_path):
    """An update is 8 slots here, eight are 64; large updates are followed beyond two."""
    plain = make_trainer(two_towers, tmp_path / "plain", drift="auto", bank_size=8)
    assert plain.probes is None and plain.method.bank.drift == "none"
    assert plain.method.scoring.center_over is not None
    assert [auto_drift(slots, 128) for slots in (128, 129, 256, 257)] == [
        *("none", "mean", "mean", "transport")
    ]
    assert not width_warnings(8, 8, "mean", centered=True)
    near = make_trainer(two_towers, tmp_path / "near", drift="auto", bank_size=64)
    far = make_trainer(two_towers, tmp_path / "far", drift="auto", bank_size=65)
    assert near.probes is None and near.method.bank.drift == "mean"
    assert far.probes is not None and far.method.bank.drift == "mean"
    assert far.update().bank_staleness > 0
    assert near.update().bank_staleness is None


@pytest.mark.parametrize(
    ("method", "decay"), [("contaccum", 9 / 17), ("gradcache_contaccum", 9 / 25)]
)
def test_means_lag_by_updates_not_by_micro_batches(two_towers, tmp_path, method, decay):
    trainer = make_trainer(two_towers, tmp_path, method=method, drift="mean")
    assert trainer.method.bank.drift_decay == pytest.approx(decay)  # K = 2, or all at once


def test_a_bank_that_is_cleared_holds_nothing_older_than_its_update(two_towers, tmp_path):
    settings = SETTINGS | {"learning_rate": 0.05, "bank_size": 200, "drift_limit": 1e3}
    cleared, kept = (
        make_trainer(two_towers, tmp_path, epochs=3, clear_bank_every_update=clear, **settings)
        for clear in (True, False)
    )
    # 40 queries in updates of 8; the learning rate falls to nothing.
    ours, theirs = ([t.update().bank_staleness for _ in range(15)] for t in (cleared, kept))
    assert ours[-1] < 0.1 * max(ours)
    assert theirs == sorted(theirs)


def test_a_window_of_the_last_updates_is_warned_of_once_in_words(two_towers, tmp_path):
    settings = SETTINGS | {"learning_rate": 0.3, "bank_size": 200, "drift_limit": 0.05}
    trainer = make_trainer(two_towers, tmp_path, epochs=5, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(15):
            trainer.update()
    (said,) = [str(w.message) for w in caught if "model's speed" in str(w.message)]
    # Blocks have 40 slots: with 80 the bank has one that may be left out.
    assert said.startswith("update 10: bank_size 200 is more than the model's speed allows")
    assert "only the newest 40 of 80 are used" in said
