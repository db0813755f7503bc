"""The methods' gradients, the data order, the schedule, the encoders and the loop."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_retriever import (
    assert_same_weights,
    tiny_dataset,
    weights,
)
from torch import nn
from trainer_parts import assert_close_gradients, first_update, gradients, make_trainer

from contaccum_ext import reference
from contaccum_ext.bank_size import mean_decay
from contaccum_ext.training import (
    METHODS,
    DivergedError,
)

CPU = torch.device("cpu")


def in_batch_cross_entropy(model, batch, temperature: float) -> torch.Tensor:
    queries, passages = model(batch)
    n, m, d = passages.shape
    scores = queries @ passages.reshape(n * m, d).T / temperature
    return nn.functional.cross_entropy(scores, torch.arange(n) * m)


def test_gradaccum_is_the_mean_of_the_micro_batches_cross_entropies(start, tmp_path):
    trainer, batches, losses, found = first_update(
        start, tmp_path, method="gradaccum", accumulation_steps=3, mask_false_negatives=False
    )
    assert [batch.size for batch in batches] == [4, 4, 4]
    loss, in_batch = losses.loss, losses.in_batch_loss
    expected = [in_batch_cross_entropy(trainer.model, batch, 0.05) for batch in batches]
    (sum(expected) / 3).backward()
    assert loss == pytest.approx(sum(expected).item() / 3, rel=1e-5)
    assert in_batch == pytest.approx(loss, rel=1e-6)
    assert_close_gradients(found, gradients(trainer.model))


def test_inbatch_is_one_cross_entropy_over_all_of_the_update(start, tmp_path):
    trainer, batches, losses, found = first_update(
        start, tmp_path, method="inbatch", accumulation_steps=3, mask_false_negatives=False
    )
    assert [batch.size for batch in batches] == [12]
    loss, in_batch = losses.loss, losses.in_batch_loss
    expected = in_batch_cross_entropy(trainer.model, batches[0], 0.05)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert in_batch < loss  # groups of 4 have fewer negatives
    assert_close_gradients(found, gradients(trainer.model))


def test_a_smaller_last_micro_batch_weighs_by_its_examples(start, tmp_path):
    trainer, batches, losses, found = first_update(
        start,
        tmp_path,
        dataset=tiny_dataset(train=6),
        method="gradaccum",
        mask_false_negatives=False,
    )
    assert [batch.size for batch in batches] == [4, 2]
    each = [in_batch_cross_entropy(trainer.model, batch, 0.05) for batch in batches]
    expected = (4 * each[0] + 2 * each[1]) / 6
    expected.backward()
    assert losses.loss == pytest.approx(expected.item(), rel=1e-5)
    assert_close_gradients(found, gradients(trainer.model))


@pytest.mark.parametrize(("method", "banks"), [("contaccum", "both"), ("prebatch", "passages")])
@pytest.mark.parametrize("row_weighting", ["local", "all"])
@pytest.mark.parametrize("center", ["auto", False])
def test_bank_methods_are_the_reference_over_the_micro_batches(
    start, tmp_path, method, banks, row_weighting, center
):
    trainer, batches, losses, found = first_update(
        start,
        tmp_path,
        method=method,
        accumulation_steps=4,
        bank_size=8,
        row_weighting=row_weighting,
        drift="mean",
        center_gradients=center,
        temperature=0.2,
    )
    bank = reference.DualMemoryBank(
        8, 16, 2, drift="mean", drift_decay=mean_decay(4), anticipate=True
    )
    total = torch.zeros(())
    for batch in batches:
        queries, passages = trainer.model(batch)
        total = total + reference.contaccum_loss(
            queries,
            passages,
            bank,
            temperature=0.2,
            passage_ids=batch.passage_ids,
            row_weighting=row_weighting,
            banks=banks,
            center_over=4 if center else None,
        )
    (total / 4).backward()
    assert losses.loss == pytest.approx(total.item() / 4, rel=1e-4)
    assert losses.loss > losses.in_batch_loss
    assert_close_gradients(found, gradients(trainer.model))
    assert len(trainer.method.bank) == 8
    torch.testing.assert_close(trainer.method.bank.queries(), bank.queries())


def test_the_bank_outlives_the_update(start, tmp_path):
    trainer = make_trainer(start, tmp_path, bank_size=20)
    filled = [trainer.update().bank_filled for _ in range(4)]
    assert filled == [8, 16, 20, 20]


@pytest.mark.parametrize("method", METHODS)
def test_false_negatives_are_masked_unless_told_otherwise(start, tmp_path, method):
    one_passage = tiny_dataset()
    for index, example in enumerate(one_passage.train):
        one_passage.train[index] = type(example)(example.id, example.query, ("p0",), ())
    losses = {}
    for mask in (True, False):
        trainer = make_trainer(
            start,
            tmp_path,
            one_passage,
            method=method,
            hard_negatives=0,
            mask_false_negatives=mask,
        )
        losses[mask] = trainer.update().loss
    assert losses[True] == pytest.approx(0, abs=1e-5)
    assert losses[False] > 1


def test_two_encoders_start_alike_and_train_apart(start, tmp_path):
    trainer = make_trainer(start, tmp_path)
    assert_same_weights(weights(trainer.model.query), weights(trainer.model.passage))
    trainer.update()
    query, passage = weights(trainer.model.query), weights(trainer.model.passage)
    assert any(not torch.equal(query[name], passage[name]) for name in query)


def test_a_shared_encoder_has_no_gradient_ratio(start, tmp_path):
    trainer = make_trainer(start, tmp_path, shared_encoder=True)
    assert trainer.model.shared
    metrics = trainer.update()
    assert metrics.grad_norm_query > 0
    assert (metrics.grad_norm_passage, metrics.grad_norm_ratio) == (None, None)


def test_the_same_seed_gives_the_same_weights(two_layers, tmp_path):
    results = []
    for run, seed in enumerate((7, 7, 8)):
        trainer = make_trainer(two_layers, tmp_path / str(run), seed=seed, max_updates=3)
        trainer.train(progress=False)
        results.append(weights(trainer.model))
    assert_same_weights(results[0], results[1])
    assert any(not torch.equal(results[0][name], results[2][name]) for name in results[0])


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss(start, tmp_path, method):
    trainer = make_trainer(start, tmp_path, method=method, epochs=8, bank_size=16)
    history = trainer.train(progress=False)
    assert len(history) == 8 * 5
    first, last = history[0].in_batch_loss, history[-1].in_batch_loss
    assert last < 0.5 * first


def test_metrics_file_has_a_line_per_update(start, tmp_path):
    trainer = make_trainer(start, tmp_path, epochs=2, bank_size=12)
    history = trainer.train(progress=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [vars(metrics) for metrics in history]
    assert [line["update"] for line in lines] == list(range(1, 11))
    assert [line["learning_rate"] for line in lines] == [trainer.schedule.at(u) for u in range(10)]
    assert lines[0]["learning_rate"] == pytest.approx(5e-4)  # one update of warm-up: half the peak
    assert [line["bank_filled"] for line in lines] == [8] + [12] * 9
    for line in lines:
        ratio = line["grad_norm_passage"] / line["grad_norm_query"]
        assert line["grad_norm_ratio"] == pytest.approx(ratio)
        assert line["queries_per_second"] > 0


def test_bf16_trains_close_to_fp32(start, tmp_path):
    losses = [
        make_trainer(start, tmp_path, precision=precision).update().loss
        for precision in ("fp32", "bf16")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]


def test_a_wide_bank_warns_when_training_starts(start, tmp_path):
    with pytest.warns(UserWarning, match="bank_size 500 keeps vectors up to 62 updates old"):
        make_trainer(start, tmp_path, bank_size=500, drift="mean")


def test_training_stops_before_a_loss_that_is_no_number_reaches_the_weights(start, tmp_path):
    trainer = make_trainer(start, tmp_path)
    with torch.no_grad():
        next(trainer.model.passage.parameters()).fill_(float("nan"))
    before = weights(trainer.model.query)
    with pytest.raises(DivergedError, match=r"update 1, micro-batch 1 of 2: .* queries q"):
        trainer.train(progress=False)
    assert_same_weights(weights(trainer.model.query), before)
    assert not (tmp_path / "final").exists()
