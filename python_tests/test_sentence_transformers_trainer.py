"""The losses in SentenceTransformerTrainer: sizes, evaluation, log, model card."""

from __future__ import annotations

import json
import logging

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
pytest.importorskip("datasets", reason="the Trainer needs datasets")


from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tiny_sentence_transformer import (
    ACCUMULATION,
    BATCH,
    STEPS,
    arguments,
    assert_same_bits,
    bank_state,
    dataset,
    load,
    losses_of,
    memory,
    trainer,
    weights,
)

from contaccum_ext.integrations.sentence_transformers import (
    CachedContAccumLoss,
    ContAccumCallback,
    ContAccumLoss,
)


@pytest.mark.parametrize("negatives", [0, 2])
def test_eval_loss_is_that_of_the_replaced_loss_and_leaves_the_bank(start, tmp_path, negatives):
    data = dataset(24, negatives)
    # A duplicate in the evaluation set: masked in training, not in this number.
    texts = data.to_dict()
    texts["positive"][1] = texts["positive"][0]
    evaluation = Dataset.from_dict(texts)
    # In float64: scores up to 20 in single precision would be off by more than a small loss shows.
    run = trainer(start, tmp_path, lambda m: ContAccumLoss(m.double()), data=data)
    run.train()
    before = {name: value.clone() for name, value in bank_state(run).items()}
    ours = run.evaluate(evaluation)["eval_loss"]
    assert_same_bits(bank_state(run), before)
    run.loss = MultipleNegativesRankingLoss(run.model)
    theirs = run.evaluate(evaluation)["eval_loss"]
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_evaluating_during_training_changes_nothing(start, tmp_path):
    quiet = trainer(start, tmp_path / "quiet", ContAccumLoss)
    model = load(start)
    loss = ContAccumLoss(model)
    watched = SentenceTransformerTrainer(
        model=model,
        args=arguments(tmp_path / "watched", eval_strategy="steps", eval_steps=2),
        train_dataset=dataset(),
        eval_dataset=dataset(12),
        loss=loss,
        callbacks=[ContAccumCallback(loss)],
    )
    for run in (quiet, watched):
        run.train()
    assert sum("eval_loss" in line for line in watched.state.log_history) == STEPS // 2
    assert_same_bits(weights(watched), weights(quiet))
    assert_same_bits(bank_state(watched), bank_state(quiet))


def test_banks_outlive_the_optimizer_step_and_count_slots(start, tmp_path):
    run = trainer(start, tmp_path, lambda m: ContAccumLoss(m, bank_size=30))
    run.train()
    filled = [line["bank_filled"] for line in run.state.log_history if "loss" in line]
    assert filled == [8, 16, 24, 30, 30, 30, 30, 30]
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert [line["bank_filled"] for line in saved["log_history"]] == filled[:6]


@pytest.mark.parametrize(
    ("count", "callback", "accumulation", "capacity"),
    [
        (300, True, 16, 4 * BATCH * 16),
        (100, True, 16, 100),
        (200, True, 2, 8 * BATCH * 2),  # where updates are small
        (40, True, 2, 40),
        (40, False, 2, 1024),
    ],
)
def test_an_automatic_bank_is_four_updates_or_eight_at_most_the_training_set(
    start, tmp_path, count, callback, accumulation, capacity
):
    options = {
        "max_steps": 1,
        "save_strategy": "no",
        "gradient_accumulation_steps": accumulation,
    }
    run = trainer(start, tmp_path, ContAccumLoss, callback, dataset(count), **options)
    run.train()
    assert memory(run).banks["16x1"].capacity == capacity


def test_a_streamed_training_set_has_no_size(start, tmp_path):
    data = dataset(40).to_iterable_dataset()
    options = {"max_steps": 1, "save_strategy": "no"}
    run = trainer(start, tmp_path, ContAccumLoss, data=data, **options)
    run.train()
    assert memory(run).banks["16x1"].capacity == 8 * BATCH * ACCUMULATION


def test_a_batch_size_found_by_trial_counts(start, tmp_path):
    run = trainer(start, tmp_path, ContAccumLoss, auto_find_batch_size=True)
    run.state.train_batch_size = 1  # four had been too many
    ContAccumCallback(run.loss).on_train_begin(run.args, run.state, run.control, model=run.model)
    assert memory(run).capacity == 8 * 1 * ACCUMULATION


def test_a_new_run_begins_with_empty_banks(start, tmp_path):
    run = trainer(start, tmp_path, ContAccumLoss, max_steps=1, save_strategy="no")
    for _ in range(2):
        run.train()
        assert memory(run).filled() == {"16x1": BATCH * ACCUMULATION}


def test_banks_too_wide_are_warned_of_in_words(start, tmp_path, caplog):
    update = BATCH * ACCUMULATION
    options = {"max_steps": 1, "save_strategy": "no"}
    with caplog.at_level(logging.WARNING, logger="contaccum_ext"):
        widest = {"mean": 8 * update, "none": 2 * update, "transport": 128 * update}
        for drift, size in widest.items():
            make = lambda m: ContAccumLoss(m, bank_size=size, drift=drift)  # noqa: B023, E731
            trainer(start, tmp_path, make, **options).train()
        assert caplog.messages == []
        for drift in widest:
            size = widest[drift] + 1
            make = lambda m: ContAccumLoss(m, bank_size=size, drift=drift)  # noqa: B023, E731
            trainer(start, tmp_path, make, **options).train()
    mean, plain, transported = caplog.messages
    assert "drift=mean corrects the shift of the mean only" in mean
    assert f"set drift=transport, or bank_size to at most {8 * update}, or lower" in mean
    assert f"set drift=auto, or bank_size to at most {2 * update}" in plain
    assert "drift=transport has not been tried over so many updates" in transported
    assert f"at most {128 * update}" in transported


@pytest.mark.parametrize(
    ("accumulation", "updates", "drift"),
    [
        (16, 2, "mean"),
        (16, 3, "transport"),
        (16, "auto", "transport"),
        (2, 8, "mean"),
        (2, 9, "transport"),
        (2, "auto", "mean"),
    ],
)
def test_the_automatic_correction_goes_by_the_age_of_the_bank(
    start, tmp_path, accumulation, updates, drift
):
    """Updates of 16 x 4 rows, and of fewer than 64."""
    size = updates if updates == "auto" else updates * BATCH * accumulation
    make = lambda m: ContAccumLoss(m, bank_size=size)  # noqa: E731
    options = {
        "max_steps": 1,
        "save_strategy": "no",
        "gradient_accumulation_steps": accumulation,
    }
    run = trainer(start, tmp_path, make, data=dataset(300), **options)
    assert memory(run).drift == "transport"  # before anybody knows how large an update is
    run.train()
    assert memory(run).drift == drift
    assert (memory(run).probes is not None) == (drift == "transport")
    assert memory(run).banks["16x1"].drift == "mean"


def test_a_dict_of_losses(start, tmp_path):
    model = load(start)
    losses = {name: ContAccumLoss(model, bank_size=16) for name in ("pairs", "triplets")}
    losses["plain"] = MultipleNegativesRankingLoss(model)
    run = SentenceTransformerTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=6, save_steps=6),
        train_dataset={"pairs": dataset(40), "triplets": dataset(40, 1), "plain": dataset(40)},
        loss=losses,
        callbacks=[ContAccumCallback(losses)],
    )
    run.train()
    content = torch.load(tmp_path / "checkpoint-6" / "contaccum_banks.pt", weights_only=True)
    assert content["banks"].keys() == {"pairs.memory", "triplets.memory"}
    line = next(line for line in reversed(run.state.log_history) if "loss" in line)
    assert line["bank_filled_pairs.memory.16x1"] == losses["pairs"].memory.filled()["16x1"] > 0
    assert line["bank_filled_triplets.memory.16x2"] > 0


def test_a_loss_without_banks_is_refused(start):
    model = load(start)
    with pytest.raises(ValueError, match=r"loss: expected a ContAccumLoss.*got MultipleNeg"):
        ContAccumCallback(MultipleNegativesRankingLoss(model))


def test_mixed_precision_keeps_the_banks_in_single_precision(start, tmp_path):
    runs = [
        trainer(start, tmp_path, ContAccumLoss, bf16=bf16, save_strategy="no")
        for bf16 in (False, True)
    ]
    for run in runs:
        run.train()
    exact, rounded = map(losses_of, runs)
    assert exact[0] != rounded[0]
    # Embeddings of relative error 2**-8 move scores up to 20, the target's and the others', by
    # twice that; the second of the two batches has twice as many rows for its n.
    assert rounded[0] == pytest.approx(exact[0], abs=1.5 * 2 * 2 * 20 * 2**-8)
    bank = memory(runs[1]).banks["16x1"]
    assert bank.dtype == torch.float32
    torch.testing.assert_close(
        bank.queries().norm(dim=1), torch.ones(len(bank)), rtol=0, atol=16 * 2**-24
    )
    assert not torch.equal(bank.queries(), bank.queries().bfloat16().float())


def test_mixed_precision_is_that_of_the_probes_too(start, tmp_path):
    make = lambda m: ContAccumLoss(m, drift="transport", drift_probes=8)  # noqa: E731
    options = {"learning_rate": 0.0, "max_steps": 2, "save_strategy": "no"}
    last, model = {}, load(start).eval()
    for bf16 in (False, True):
        run = trainer(start, tmp_path, make, bf16=bf16, seed=3, **options)
        run.train()
        probes = memory(run).probes.sets[1]
        last[bf16] = probes.last[0]
        (anchors,) = probes.batches[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(dict(anchors))["sentence_embedding"].float()
    assert torch.equal(last[True], expected)
    assert not torch.equal(last[False], expected)


def test_the_model_card_has_settings_and_citation(start, tmp_path):
    make = lambda m: CachedContAccumLoss(m, bank_size=24, mini_batch_size=2)  # noqa: E731
    run = trainer(start, tmp_path, make, max_steps=1, save_strategy="no")
    run.train()
    run.model.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert '"bank_size": 24' in card
    assert '"similarity_fct": "cos_sim"' in card
    assert '"mini_batch_size": 2' in card
    assert "2406.12356" in card
    assert "2101.06983" in card
    assert "loss:CachedContAccumLoss" in card
