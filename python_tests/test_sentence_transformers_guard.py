"""The window over slots that probes cannot follow, and what a run's log says of drift."""

from __future__ import annotations

import copy
import itertools
import json
import logging

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
pytest.importorskip("datasets", reason="the Trainer needs datasets")


from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from tiny_sentence_transformer import (
    BATCH,
    PAIRS,
    assert_same_bits,
    batch,
    dataset,
    load,
    losses_of,
    memory,
    trainer,
    weights,
)
from transported_banks import encode, learn, make, optimizer, probe_columns

from contaccum_ext.displacement import Displacement
from contaccum_ext.drift_signs import ScoreShift
from contaccum_ext.integrations.sentence_transformers import ContAccumLoss, readings

UPDATE = 2 * BATCH
OPTIONS = {"drift": "transport", "drift_probes": 8, "drift_ridge": 0.2}


@pytest.fixture
def model(two_layers, device):
    return load(two_layers, device).double().train()


def error_of(loss, before, after) -> float:
    """The larger error of the two sides' maps, of embeddings brought to length 1."""
    sides = []
    for columns in (before, after):
        queries, *passages = (torch.nn.functional.normalize(v, dim=-1) for v in columns)
        sides.append((queries, torch.cat(passages)))
    ridge = loss.memory.settings.drift_ridge
    return max(float(Displacement.fit(*pair, ridge).error) for pair in zip(*sides, strict=True))


@pytest.mark.parametrize("kind", PAIRS)
def test_slots_beyond_the_limit_are_left_out_of_the_loss(model, kind):
    """Two updates of 48 rows; the bank's blocks have 40 slots, and 16 are in that being filled."""
    loss = make(kind, model, bank_size=200, drift_limit=None)
    places = [encode(model, probe_columns(model))]
    for first in (0, 48):
        learn(loss, batch(model, 48, 1, first), optimizer(model))
        places.append(encode(model, probe_columns(model)))
    first, second = (error_of(loss, *pair) for pair in itertools.pairwise(places))
    for limit, fresh, window in (
        (None, None, 200),
        (1.01 * (first + second), None, 200),
        (0.99 * (first + second), 48, 56),
        (0.99 * second, 48, 56),  # what was written last, however stale
    ):
        guarded, unguarded = copy.deepcopy(loss), copy.deepcopy(loss)
        slots = guarded.memory.staleness["16x2"]
        slots.limit = limit
        for each in (guarded, unguarded):
            each._follow(batch(each.model, 6, 1, 96))
        assert (slots.within_limit(), slots.bank.window) == (fresh, window)
        assert slots.staleness == pytest.approx(first + second)  # 8 of the 56 are older
        unguarded.memory.banks["16x2"].window = window - 16
        losses = []
        for each in (guarded, unguarded):
            torch.manual_seed(0)
            losses.append(each(batch(each.model, 6, 1, 96), None))
        torch.testing.assert_close(*losses, rtol=1e-9, atol=0)


@pytest.mark.parametrize("drift", ["transport", "mean"])
def test_a_large_bank_is_used_in_part_from_an_epoch_on(start, tmp_path, drift):
    """An epoch of 40 rows is 5 updates of 8; an automatic bank has 8 updates of them, here 64."""

    def make(m):
        chosen = {"drift": drift, "drift_probes": 8, "drift_limit": None}
        return ContAccumLoss(m, bank_size=200, wide_epochs=2, **chosen)

    options = {"num_train_epochs": 6, "max_steps": -1, "save_strategy": "no", "logging_steps": 1}
    run = trainer(start, tmp_path, make, data=dataset(40), **options)
    run.train()
    lines = [line for line in run.state.log_history if "bank_filled" in line]
    assert len(lines) == 30
    used = [memory(run).banks["16x1"].used]
    if drift == "transport":
        used = [line["bank_window"] for line in lines]
        assert used[:10] == [8 * update for update in range(1, 11)]
    assert used[-1] <= 64 if drift == "transport" else 64 <= used[-1] < 200
    assert lines[-1]["bank_filled"] == 200


def test_each_size_of_embedding_has_a_window_of_its_own(model):
    loss = MatryoshkaLoss(model, make("plain", model, bank_size=200, drift_limit=1e-9), [16, 4])
    for first in (0, 12, 24):
        learn(loss, batch(model, 12, 1, first), optimizer(model))
    learn(loss, batch(model, 3, 1, 36))
    staleness = loss.loss.memory.staleness
    assert staleness.keys() == {"16x2", "4x2"}
    assert [slots.within_limit() for slots in staleness.values()] == [12, 12]
    assert staleness["16x2"].staleness != staleness["4x2"].staleness


def test_a_bank_that_nothing_was_written_to_ages_with_the_others(model):
    """A data set of pairs, then batches of triplets alone."""
    loss = make("plain", model, bank_size=36)
    learn(loss, batch(model, 12, 0))
    found = []
    for first in (0, 12, 24, 12, 0):
        learn(loss, batch(model, 12, 1, first), optimizer(model))
        found.append(loss.memory.staleness["16x1"].staleness)
    resting = loss.memory.staleness["16x1"]
    assert found[0] == 0
    assert all(later > earlier for earlier, later in itertools.pairwise(found))
    assert len(resting.bank) == 12 and resting.within_limit() == 12


def test_a_resumed_run_has_the_window_of_the_uninterrupted_one(two_layers, tmp_path):
    """At such a rate slots leave the window before the checkpoint and after it."""
    make_loss = lambda m: MatryoshkaLoss(  # noqa: E731
        m, ContAccumLoss(m, bank_size=400, drift_limit=0.2, **OPTIONS), [16, 8]
    )
    data, options = dataset(200, 1), {"learning_rate": 0.02, "logging_steps": 1, "save_steps": 12}
    whole = trainer(two_layers, tmp_path / "whole", make_loss, data=data, max_steps=24, **options)
    whole.train()
    for steps in (12, 24):
        run = trainer(
            two_layers, tmp_path / "broken", make_loss, data=data, max_steps=steps, **options
        )
        run.train(resume_from_checkpoint=steps > 12)
    assert losses_of(run) == losses_of(whole)
    assert_same_bits(weights(run), weights(whole))
    ours, theirs = (r.loss.loss.memory for r in (run, whole))
    for name, slots in theirs.staleness.items():
        mine, wanted = ours.staleness[name].state_dict(), slots.state_dict()
        assert torch.equal(mine.pop("newest"), wanted.pop("newest"))
        assert mine == wanted
        assert ours.banks[name].window == theirs.banks[name].window < 8 * 24
        assert_same_bits(ours.banks[name].state_dict(), theirs.banks[name].state_dict())
    log = [[line for line in r.state.log_history if "loss" in line] for r in (run, whole)]
    names = [key for key in log[1][-1] if key.startswith("bank_")]
    assert len(names) == 2 * 5
    assert [[line.get(n) for n in names] for line in log[0]] == [
        [line.get(n) for n in names] for line in log[1]
    ]


def test_a_checkpoint_without_staleness_is_refused(start, tmp_path):
    make_loss = lambda m: ContAccumLoss(m, bank_size=24, **OPTIONS)  # noqa: E731
    trainer(start, tmp_path, make_loss, max_steps=3).train()
    file = tmp_path / "checkpoint-3" / "contaccum_banks.pt"
    content = torch.load(file, weights_only=True)
    assert content["banks"]["memory"]["_extra_state"].pop("staleness").keys() == {"16x1"}
    torch.save(content, file)
    with pytest.raises(RuntimeError, match="staleness: expected those of drift='transport', got"):
        trainer(start, tmp_path, make_loss).train(resume_from_checkpoint=True)


def test_the_log_shows_window_staleness_gap_and_spread(start, tmp_path):
    make_loss = lambda m: ContAccumLoss(m, bank_size=100, **OPTIONS)  # noqa: E731
    run = trainer(start, tmp_path, make_loss, data=dataset(100), learning_rate=1e-5)
    run.train()
    lines = [line for line in run.state.log_history if "loss" in line]
    filled = [line["bank_filled"] for line in lines]
    assert filled == [UPDATE * i for i in range(1, 9)]
    assert [line["bank_window"] for line in lines] == filled  # slow enough
    stale = [line["bank_staleness"] for line in lines]
    assert stale[0] == 0 and sorted(stale) == stale and stale[-1] > 0
    assert ["bank_score_gap" in line for line in lines] == [False] + [True] * 7
    shift = readings.score_shift(memory(run).banks["16x1"], UPDATE)
    assert (lines[-1]["bank_score_gap"], lines[-1]["bank_score_spread"]) == (
        shift.gap,
        shift.spread,
    )
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert saved["log_history"][5]["bank_window"] == filled[5]


def test_other_corrections_have_the_sign_in_the_log_and_no_window(start, tmp_path):
    make_loss = lambda m: ContAccumLoss(m, bank_size=100, drift="mean")  # noqa: E731
    run = trainer(start, tmp_path, make_loss, max_steps=3)
    run.train()
    line = [line for line in run.state.log_history if "loss" in line][-1]
    assert {key for key in line if key.startswith("bank_")} == {
        "bank_filled",
        "bank_score_gap",
        "bank_score_spread",
    }


def test_a_model_too_fast_for_its_bank_is_warned_of_once_in_words(start, tmp_path, caplog):
    make_loss = lambda m: ContAccumLoss(m, bank_size=100, drift_limit=0.01, **OPTIONS)  # noqa: E731
    options = {"learning_rate": 0.05, "max_steps": 16}
    with caplog.at_level(logging.WARNING, logger="contaccum_ext"):
        run = trainer(start, tmp_path, make_loss, data=dataset(100), **options)
        run.train()
    (said,) = [message for message in caplog.messages if "speed" in message]
    assert said.startswith("bank_size 100 is more than the model's speed allows")
    assert said.endswith("lower learning_rate or bank_size")
    assert run.state.log_history[-2]["bank_window"] < run.state.log_history[-2]["bank_filled"]


def test_a_sign_that_stays_is_warned_of_once(start, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(readings, "score_shift", lambda *_: ScoreShift(-1.0, 1.0))
    with caplog.at_level(logging.WARNING, logger="contaccum_ext"):
        make_loss = lambda m: ContAccumLoss(m, bank_size=64, drift="mean")  # noqa: E731
        trainer(start, tmp_path, make_loss).train()
    (said,) = [message for message in caplog.messages if "looks in a row" in message]
    assert said.endswith("lower learning_rate or bank_size, or set drift=transport")


@pytest.mark.parametrize(
    ("logging", "steps", "looks", "said"),
    [(500, 29, 2, 0), (500, 30, 3, 1), (10, 30, 3, 1), (15, 30, 4, 1)],
)
def test_a_log_that_is_seldom_written_is_not_waited_for(
    start, tmp_path, caplog, monkeypatch, logging, steps, looks, said
):
    """Every tenth update is looked at, and no moment twice; by default the log has every 500th."""
    found = []
    monkeypatch.setattr(
        readings, "score_shift", lambda *_: found.append(1) or ScoreShift(-1.0, 1.0)
    )
    make_loss = lambda m: ContAccumLoss(m, bank_size=64)  # noqa: E731
    options = {"logging_steps": logging, "max_steps": steps, "save_strategy": "no"}
    trainer(start, tmp_path, make_loss, **options).train()
    assert len(found) == looks
    assert sum("looks in a row" in message for message in caplog.messages) == said


@pytest.mark.parametrize("limit", [0, -0.5, "0.3"])
def test_a_limit_that_is_none_is_refused_by_name(model, limit):
    with pytest.raises((ValueError, TypeError), match="drift_limit: expected"):
        make("plain", model, drift_limit=limit)


def test_settings_have_the_limit(model):
    assert make("cached", model).get_config_dict()["drift_limit"] == 0.3
    assert make("plain", model, drift_limit=None).get_config_dict()["drift_limit"] is None
