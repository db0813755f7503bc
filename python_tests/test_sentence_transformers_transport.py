"""drift="transport" in the losses: banks go where the probes have gone, nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")


from sentence_transformers.util import cos_sim, dot_score
from tiny_sentence_transformer import PAIRS, assert_same, batch, load, step
from torch.nn.functional import normalize
from transported_banks import (
    PROBES,
    assert_followed,
    encode,
    learn,
    make,
    moved,
    optimizer,
    probe_columns,
)

from contaccum_ext.integrations.sentence_transformers import ContAccumLoss


@pytest.fixture
def model(two_layers, device):
    """With dropout, in float64: what then differs is the method, not the rounding."""
    return load(two_layers, device).double().train()


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("similarity", [cos_sim, dot_score])
def test_banks_go_where_the_step_has_taken_the_probes(model, kind, similarity):
    loss = make(kind, model, similarity_fct=similarity)
    sgd = optimizer(model)
    learn(loss, batch(model, 6, 1), sgd)  # probes are not complete: nothing moves
    unmoved = copy.deepcopy(loss.memory.banks["16x2"])
    learn(loss, batch(model, 6, 1, 6))
    assert_followed(loss.memory.banks["16x2"], unmoved, newer=6)
    before, bank = encode(model, probe_columns(model)), loss.memory.banks["16x2"]
    learn(loss, batch(model, 6, 1, 12), sgd)
    bank = copy.deepcopy(bank)
    expected = moved(bank, before, encode(model, probe_columns(model)), similarity is cos_sim)
    learn(loss, batch(model, 3, 1, 18))
    assert_followed(loss.memory.banks["16x2"], expected, newer=3)
    assert (expected.queries() - bank.queries()).norm() > 1e-3 * bank.queries().norm()


def test_old_vectors_come_closer_to_what_the_weights_would_give_now(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    errors = {}
    for drift in ("none", "transport"):
        encoder = copy.deepcopy(model)
        loss = make("plain", encoder, drift=drift)
        # Large steps: with small ones the means of four rows each say more than the drift.
        sgd = torch.optim.SGD(encoder.parameters(), lr=2.0)
        for first in range(0, 32, 4):
            learn(loss, batch(encoder, 4, 0, first), sgd)
        learn(loss, batch(encoder, 4, 0, 32))
        # Twelve rows after the probes were complete, and none of them: rows 12 to 24 of 36.
        now = normalize(encode(encoder, batch(encoder, 12, 0, 12))[1], dim=-1)
        bank = loss.memory.banks["16x1"]
        away = (bank.passages() + bank.passage_offsets())[12:24, 0] - now
        # What they have in common is the running mean's, an average over few rows here.
        errors[drift] = (away - away.mean(0)).norm()
    assert errors["transport"] < 0.5 * errors["none"]


def write_data(model) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data.sub_(0.01 * parameter.grad)


STEPS = {
    "foreach": lambda m: torch.optim.AdamW(m.parameters(), foreach=True).step(),
    "for-loop": lambda m: torch.optim.AdamW(m.parameters(), foreach=False).step(),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), fused=True).step(),
    "data": write_data,
}


@pytest.mark.parametrize("how", STEPS)
def test_probes_are_encoded_once_for_each_change_of_the_weights(model, how):
    loss = make("plain", model)
    learn(loss, batch(model, 12))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(model[0].training))
    learn(loss, batch(model, 6))
    assert calls == [True, True]
    loss(batch(model, 6), None).backward()
    STEPS[how](model)
    model.zero_grad()
    calls.clear()
    learn(loss, batch(model, 6))
    learn(loss, batch(model, 6))
    assert calls == [False] * 2 + [True] * 4


def test_a_step_that_changes_nothing_moves_nothing(model):
    loss = make("plain", model)
    learn(loss, batch(model, 12), torch.optim.SGD(model.parameters(), lr=0.0))
    bank = copy.deepcopy(loss.memory.banks["16x1"])
    learn(loss, batch(model, 6))
    torch.testing.assert_close(
        loss.memory.banks["16x1"].queries()[:-6], bank.queries(), rtol=0, atol=0
    )


def test_training_does_not_notice(model):
    """Modes, random numbers and frozen parts; the batch's own encoding is that of drift="none"."""
    model[0].auto_model.embeddings.eval().requires_grad_(False)
    modes = [module.training for module in model.modules()]
    found = []
    for drift in ("none", "transport"):
        torch.manual_seed(5)
        encoder = copy.deepcopy(model)
        loss = make("plain", encoder, drift=drift)
        learn(loss, batch(encoder, 12), optimizer(encoder))
        columns = batch(encoder, 6)
        loss.memory.banks.clear()  # what differs
        found.append((step(loss, columns), torch.get_rng_state()))
        assert [module.training for module in encoder.modules()] == modes
    (ours, state), (theirs, expected_state) = found
    assert_same(ours, theirs)
    assert torch.equal(state, expected_state)


def test_weights_that_no_vector_depends_on_leave_the_banks_and_their_tables(model):
    loss = make("plain", model)
    learn(loss, batch(model, 12))
    before = copy.deepcopy(loss.memory.banks.state_dict())
    model[0].auto_model.pooler.dense.bias.data.add_(1)
    loss._follow(batch(model, 6))
    for name, value in loss.memory.banks.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_modules_that_change_what_they_are_given_do_not_change_probes(model):
    loss = make("plain", model)

    def change(_, given) -> None:
        given[0]["input_ids"].fill_(5)

    model[0].register_forward_pre_hook(change)
    learn(loss, batch(model, 12), optimizer(model))
    learn(loss, batch(model, 6))
    (texts,) = loss.memory.probes.sets[1].batches[0]
    assert torch.equal(texts["input_ids"], probe_columns(model, 0)[0]["input_ids"])


def test_a_new_run_begins_with_new_probes(model):
    loss = make("plain", model)
    learn(loss, batch(model, 12))
    loss.memory.begin_run(update_size=12, training_queries=None)
    assert loss.memory.probes.sets == {}


@pytest.mark.parametrize("why", ["eval", "no_grad"])
def test_evaluation_neither_takes_probes_nor_moves_banks(model, why):
    loss = make("plain", model)
    learn(loss, batch(model, 12), optimizer(model))
    before = copy.deepcopy(loss.memory.state_dict())
    model.train(why != "eval")
    with torch.set_grad_enabled(why != "no_grad"):
        loss(batch(model, 6), None)
        loss(batch(model, 6, 1), None)
    after = loss.memory.state_dict()
    assert torch.equal(after["banks.16x1.bank_queries"], before["banks.16x1.bank_queries"])
    assert after["_extra_state"]["probes"].keys() == {1}


def test_data_sets_with_other_columns_have_probes_of_their_own(model):
    loss = make("plain", model)
    learn(loss, batch(model, 12, 0))
    learn(loss, batch(model, 6, 1), optimizer(model))
    before = {name: bank.queries() for name, bank in loss.memory.banks.items()}
    learn(loss, batch(model, 6, 1))
    after = {name: bank.queries() for name, bank in loss.memory.banks.items()}
    assert not torch.equal(after["16x1"], before["16x1"])
    assert torch.equal(after["16x2"][:6], before["16x2"])  # 6 of 10 probes then


def test_probes_that_overflow_move_nothing(model, caplog):
    loss = make("plain", model)
    learn(loss, batch(model, 12))
    last, before = loss.memory.probes.sets[1].last, loss.memory.banks["16x1"].queries()
    with torch.no_grad():
        model[0].auto_model.encoder.layer[1].output.LayerNorm.bias[0] = torch.inf
    loss(batch(model, 6), None)
    assert torch.equal(loss.memory.banks["16x1"].queries()[:12], before)
    assert loss.memory.probes.sets[1].last is last
    assert "embeddings that are not finite: the banks are not moved" in caplog.text


def test_without_a_bank_there_are_no_probes(model):
    loss = ContAccumLoss(model, bank_size=0, **PROBES)
    learn(loss, batch(model, 12))
    assert loss.memory.probes is None


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"drift_probes": 0}, ValueError, "drift_probes: expected at least 1, got 0"),
        ({"drift_probes": 2.5}, TypeError, "drift_probes: expected an int, got float"),
        ({"drift_ridge": 0}, ValueError, "drift_ridge: expected a positive finite number"),
        ({"drift_rigde": 1}, TypeError, "drift_rigde"),
    ],
)
def test_refusals_and_settings_name_the_argument(model, options, error, says):
    with pytest.raises(error, match=says):
        make("plain", model, **options)
    config = make("cached", model).get_config_dict()
    assert config["drift"] == "transport"
    assert (config["drift_probes"], config["drift_ridge"]) == (10, 0.2)
