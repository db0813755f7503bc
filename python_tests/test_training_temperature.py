"""The trainer with a learned temperature, and with the loss taken both ways."""

from __future__ import annotations

import math

import pytest
import torch
from test_training_gradcache import graph_of_all
from tiny_retriever import assert_same_weights, weights
from trainer_parts import assert_close_gradients, gradients, make_trainer

from contaccum_ext import reference
from contaccum_ext.bank_size import mean_decay
from contaccum_ext.training import ConfigError, TrainConfig, load_checkpoint
from contaccum_ext.training.methods import METHODS

LEARNING = {"learn_temperature": True, "bank_size": 20, "accumulation_steps": 3}


def parameter(trainer):
    (log_scale,) = trainer.method.scoring.parameters()
    return log_scale


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_it_gets_the_gradient_of_the_whole_update_once(
    start, tmp_path, method, symmetric, precision
):
    """Of each method, over three updates, against autograd on the full matrix; loss scaling too."""
    if method == "prebatch" and symmetric:
        pytest.skip("both directions need both banks")
    options = {"method": method, "symmetric": symmetric, "temperature": 0.2}
    trainer = make_trainer(start, tmp_path, **LEARNING, **options)
    at_once = "gradcache" in method or method == "inbatch"
    decay = mean_decay(1 if at_once else 3)
    bank = reference.DualMemoryBank(20, 16, 2, drift="mean", drift_decay=decay, anticipate=True)
    banked = trainer.method.bank is not None
    factor = 1024.0 if precision == "fp16" else 1.0
    for update in range(3):
        trainer.optimizer.zero_grad(set_to_none=True)
        batches = trainer._micro_batches(trainer.sampler.update(update))
        trainer.method.scoring.begin_update(update)
        trainer.method.accumulate(trainer._encode, batches, lambda loss: factor * loss)
        found, of_temperature = gradients(trainer.model), parameter(trainer).grad.clone()

        trainer.optimizer.zero_grad(set_to_none=True)
        bank.begin_update()
        groups = [batches] if at_once else [[batch] for batch in batches]
        examples = sum(batch.size for batch in batches)
        scale = parameter(trainer).detach().clone().requires_grad_()
        total = 0.0
        for group in groups:
            queries, passages, ids = graph_of_all(trainer, group)
            tau, against = torch.exp(-scale), bank if banked else None
            loss = reference.contaccum_loss(
                queries,
                passages,
                against,
                tau,
                ids,
                banks=trainer.method.banks(trainer.config) or "both",
                symmetric=symmetric,
                center_over=len(groups),
            )
            total = total + len(queries) / examples * loss
        (factor * total).backward()
        assert_close_gradients(found, gradients(trainer.model))
        torch.testing.assert_close(of_temperature, scale.grad, rtol=1e-4, atol=1e-4 * factor)
        with torch.no_grad():
            parameter(trainer).add_(0.1)  # another scale in the next update


@pytest.mark.parametrize("method", ["contaccum", "gradaccum", "gradcache"])
def test_it_is_trained_without_decay_and_can_be_watched(start, tmp_path, method):
    trainer = make_trainer(start, tmp_path, method=method, max_updates=4, **LEARNING)
    (group,) = [
        g
        for g in trainer.optimizer.param_groups
        if any(p is parameter(trainer) for p in g["params"])
    ]
    assert group["weight_decay"] == 0
    history = trainer.train(progress=False)
    seen = [metrics.temperature for metrics in history]
    assert seen[0] == pytest.approx(0.05) and len(set(seen)) == 4
    assert trainer.method.scoring.learned.value != seen[-1]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert all('"temperature": ' in line for line in lines)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", ["contaccum", "gradcache"])
def test_a_resumed_run_has_the_same_bits(start, tmp_path, method, symmetric):
    settings = {"method": method, "symmetric": symmetric, "max_updates": 6, **LEARNING}
    whole = make_trainer(start, tmp_path / "whole", **settings)
    whole.train(progress=False)
    options = {**settings, "checkpoint_every": 3}
    first = make_trainer(start, tmp_path / "run", **options)
    for _ in range(3):
        first.update()
    first.run.begin(first.config, first.data)
    first._save(first.run.checkpoint(3), first.state_dict())
    checkpoint = load_checkpoint(first.run.checkpoint(3))
    second = make_trainer(start, tmp_path / "run", **options)
    second.model.load_state_dict(checkpoint.model.state_dict())
    second.load_state_dict(checkpoint.training_state())
    assert torch.equal(parameter(second), parameter(first))
    while second.done < 6:
        second.update()
    assert_same_weights(weights(second.model), weights(whole.model))
    assert torch.equal(parameter(second), parameter(whole))


def test_a_skipped_update_leaves_it_as_it_was(start, tmp_path):
    trainer = make_trainer(start, tmp_path, on_nonfinite="skip", **LEARNING)
    trainer.update()
    before = parameter(trainer).detach().clone()
    parameter(trainer).register_hook(lambda gradient: gradient * math.nan)
    with pytest.warns(UserWarning, match="the gradient is not finite"):
        metrics = trainer.update()
    assert metrics.skipped == 1
    assert torch.equal(parameter(trainer), before)


def test_without_learning_the_temperature_is_the_settings(start, tmp_path):
    trainer = make_trainer(start, tmp_path)
    assert not trainer.method.scoring.parameters()
    assert trainer.update().temperature == 0.05
    assert trainer.state_dict()["scoring"]["temperature"] == {}


REFUSED = {
    "a temperature below the least": {"learn_temperature": True, "temperature": 0.005},
    "one bank, both ways": {"symmetric": True, "bank_query": False},
    "prebatch, both ways": {"symmetric": True, "method": "prebatch"},
    "positives banked alone, both ways": {"symmetric": True, "bank_hard_negatives": False},
    "positives banked alone, learning": {"learn_temperature": True, "bank_hard_negatives": False},
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_do_not_go_together_are_refused(name):
    with pytest.raises(ConfigError, match="expected"):
        TrainConfig.from_mapping(REFUSED[name])


def test_settings_without_a_bank_refuse_nothing():
    for method in ("gradaccum", "gradcache"):
        TrainConfig.from_mapping({"method": method, "symmetric": True, "bank_query": False})
