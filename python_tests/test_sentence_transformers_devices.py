"""The losses where they train: against banks on each device, in the Trainer, resumed."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
pytest.importorskip("datasets", reason="the Trainer needs datasets")


from sentence_transformers.sentence_transformer.losses import (
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from tiny_sentence_transformer import PAIRS, STEPS, batch, dataset, load, losses_of, memory, trainer
from transported_banks import learn

from contaccum_ext.integrations.sentence_transformers import (
    CachedContAccumLoss,
    ContAccumCallback,
    ContAccumLoss,
)

SETTINGS = {
    "mean": {"bank_size": 40, "drift": "mean"},
    "transport": {"bank_size": 40, "drift": "transport", "drift_probes": 8},
}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("drift", SETTINGS)
def test_training_against_banks_is_that_of_the_cpu(start, device, kind, drift):
    """In float64, without dropout: banks that fill, wrap and move, and steps in between."""
    found = {}
    for place in ("cpu", device):
        model = load(start, place).double().train()
        _, ours, options = PAIRS[kind]
        loss = ours(model, **SETTINGS[drift], **options)
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        values = []
        for first in range(0, 60, 6):
            value = loss(batch(model, 6, 1, first), None)
            value.backward()
            values.append(value.item())
            if first % 12:
                sgd.step()
                sgd.zero_grad()
        bank = loss.memory.banks["16x2"]
        assert bank.cursor.device.type == place
        found[place] = values, bank.queries().cpu(), bank.passages().cpu()
    torch.testing.assert_close(found[device], found["cpu"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("drift", SETTINGS)
@pytest.mark.parametrize("loss", [ContAccumLoss, CachedContAccumLoss])
def test_the_trainer_trains_in_bf16(two_layers, tmp_path, device, loss, drift):
    """With dropout. Loss and bank stay in single precision; evaluation has no bank."""
    options = SETTINGS[drift] | ({"mini_batch_size": 2} if loss is CachedContAccumLoss else {})
    run = trainer(
        two_layers,
        tmp_path,
        lambda m: loss(m, **options),
        data=dataset(80, 1),
        device=device,
        bf16=True,
        max_steps=2 * STEPS,
        save_strategy="no",
    )
    run.train()
    assert run.model.device.type == device
    lines = [line for line in run.state.log_history if "loss" in line]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    bank = memory(run).banks["16x2"]
    assert (bank.cursor.device.type, bank.dtype, len(bank)) == (device, torch.float32, 40)
    ones = torch.ones(40, device=device)
    close = {"rtol": 0, "atol": 1e-5 if drift == "mean" else 0.5}  # what has been moved is near
    torch.testing.assert_close(bank.queries().norm(dim=1), ones, **close)
    wanted = {"bank_filled", "bank_score_gap", "bank_score_spread"}
    wanted |= {"bank_window", "bank_staleness"} if drift == "transport" else set()
    assert {key for key in lines[-1] if key.startswith("bank_")} == wanted
    ours = run.evaluate(dataset(24, 1))["eval_loss"]
    run.loss = MultipleNegativesRankingLoss(run.model)
    # Theirs are products in bfloat16 of scores up to 20, under the Trainer's autocast.
    assert ours == pytest.approx(run.evaluate(dataset(24, 1))["eval_loss"], abs=2 * 20 * 2**-8)


@pytest.mark.parametrize("kind", ["plain", "cached", "matryoshka"])
def test_a_run_is_resumed_where_it_trains(two_layers, tmp_path, device, kind):
    """To the bit on a CPU. A GPU adds up gradients of embeddings in any order."""
    options = SETTINGS["transport"]
    make_loss = {
        "plain": lambda m: ContAccumLoss(m, **options),
        "cached": lambda m: CachedContAccumLoss(m, mini_batch_size=3, **options),
        "matryoshka": lambda m: MatryoshkaLoss(m, ContAccumLoss(m, **options), [16, 8]),
    }[kind]
    data = dataset(80, 1)
    settings = {"data": data, "device": device, "learning_rate": 1e-4}
    whole = trainer(two_layers, tmp_path / "whole", make_loss, **settings)
    whole.train()
    trainer(two_layers, tmp_path / "part", make_loss, max_steps=6, **settings).train()
    resumed = trainer(two_layers, tmp_path / "part", make_loss, **settings)
    resumed.train(resume_from_checkpoint=True)
    close = {"rel": 0, "abs": 0} if device == "cpu" else {"rel": 1e-3}
    assert losses_of(resumed) == pytest.approx(losses_of(whole), **close)
    ours, theirs = (ContAccumCallback(run.loss).memories for run in (resumed, whole))
    for name in theirs:
        assert ours[name].filled() == theirs[name].filled()
        for shape, slots in theirs[name].staleness.items():
            bank = ours[name].banks[shape]
            assert bank.cursor.device.type == device
            assert bank.window == theirs[name].banks[shape].window
            assert ours[name].staleness[shape].staleness == pytest.approx(slots.staleness, rel=0.05)


@pytest.mark.parametrize("drift", SETTINGS)
def test_the_trainer_trains_in_fp16(two_layers, tmp_path, device, drift):
    """On a GPU with a loss scale that is found by overflows; their batches are banked."""
    run = trainer(
        two_layers,
        tmp_path,
        lambda m: ContAccumLoss(m, **SETTINGS[drift]),
        data=dataset(80, 1),
        device=device,
        fp16=True,
        max_steps=3 * STEPS,
        save_strategy="no",
    )
    run.train()
    lines = [line for line in run.state.log_history if "loss" in line]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert 0 < lines[-1]["grad_norm"] < math.inf
    bank = memory(run).banks["16x2"]
    assert (bank.cursor.device.type, bank.dtype, len(bank)) == (device, torch.float32, 40)
    assert all(value.isfinite().all() for value in (bank.queries(), bank.passages()))
    assert all(value.isfinite().all() for value in run.model.parameters())


def test_banks_follow_a_model_to_another_device(start, device):
    model = load(start).double().train()
    loss = ContAccumLoss(model, **SETTINGS["transport"])
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    learn(loss, batch(model, 12), sgd)
    learn(loss, batch(model, 12, 0, 12), sgd)
    model.to(device)
    learn(loss, batch(model, 6, 0, 24))
    slots = loss.memory.staleness["16x1"]
    assert slots.bank.cursor.device.type == device
    assert len(slots.bank) == 30 and slots.staleness > 0
    loss.memory.load_state_dict(loss.memory.state_dict())  # and a checkpoint's too
    learn(loss, batch(model, 6, 0, 30))
    assert loss.memory.filled() == {"16x1": 36}
