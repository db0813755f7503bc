"""The decay of the banks' running means: given, or chosen by the batches in an update."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
pytest.importorskip("datasets", reason="the Trainer needs datasets")

from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from tiny_sentence_transformer import (
    EPS,
    PAIRS,
    arguments,
    assert_same_bits,
    bank_state,
    dataset,
    embed,
    identities,
    load,
    losses_of,
    memory,
    oracle,
    recorded,
    trainer,
    weights,
)

from contaccum_ext import mean_decay, reference
from contaccum_ext.integrations.sentence_transformers import ContAccumCallback, ContAccumLoss

TRANSPORT = {"drift": "transport", "drift_probes": 4}


def decays(kept) -> set[float]:
    assert len(kept.banks)
    return {bank.drift_decay for bank in kept.banks.values()}


@pytest.mark.parametrize("accumulation", [1, 2, 16])
@pytest.mark.parametrize("options", [{"drift": "mean"}, TRANSPORT])
def test_the_callback_chooses_it_by_the_batches_in_an_update(
    start, tmp_path, accumulation, options
):
    make = lambda m: ContAccumLoss(m, bank_size=24, **options)  # noqa: E731
    settings = {
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "save_strategy": "no",
    }
    run = trainer(start, tmp_path, make, data=dataset(64), **settings)
    run.train()
    assert decays(memory(run)) == {mean_decay(accumulation, predicted="drift_probes" in options)}
    without = trainer(start, tmp_path, make, callback=False, data=dataset(64), **settings)
    without.train()
    assert decays(memory(without)) == {0.9 if "drift_probes" in options else 0.5}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize(
    ("accumulation", "callback", "anticipates"),
    [(1, True, True), (2, True, True), (8, True, False), (8, False, True)],
)
def test_means_see_a_batch_before_its_loss_where_updates_have_few(
    start, tmp_path, kind, accumulation, callback, anticipates
):
    """16 batches of a run, each by the full matrix over those before it; weights as they were."""
    make = lambda m: recorded(kind)(m.double(), bank_size=20, drift="mean")  # noqa: E731
    settings = {
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 0.0,
        "max_steps": 16 // accumulation,
        "save_strategy": "no",
    }
    run = trainer(start, tmp_path, make, callback, data=dataset(64, 1), **settings)
    run.train()
    decay = mean_decay(accumulation) if callback else 0.5
    banks = {a: reference.DualMemoryBank(20, 16, 2, torch.float64, "mean", decay) for a in (0, 1)}
    assert len(run.loss.seen) == 16
    for i, (columns, value) in enumerate(run.loss.seen):
        vectors, ids = embed(run.model, columns), identities(columns[1:])
        ours, other = (
            oracle(banks[a], vectors, ids, a).item() for a in (anticipates, not anticipates)
        )
        assert value == pytest.approx(ours, rel=1e5 * EPS)
        assert i == 0 or abs(other - ours) > 1e-4 * ours
    offsets = memory(run).banks["16x2"].passage_offsets()
    expected = banks[anticipates].passage_offsets()
    torch.testing.assert_close(offsets, expected, rtol=0, atol=32 * EPS)


@pytest.mark.parametrize("options", [{"drift": "mean"}, TRANSPORT])
@pytest.mark.parametrize("callback", [True, False])
def test_one_that_was_given_stays(start, tmp_path, options, callback):
    make = lambda m: ContAccumLoss(m, bank_size=24, drift_decay=0.25, **options)  # noqa: E731
    run = trainer(start, tmp_path, make, callback, max_steps=1, save_strategy="no")
    run.train()
    assert decays(memory(run)) == {0.25}


def test_it_is_set_before_anything_enters_a_bank(start, tmp_path):
    """A loss that has been used already, then trained; and a run after another with a larger K."""
    runs = []
    for accumulation in (2, 8):
        options = {"gradient_accumulation_steps": accumulation, "save_strategy": "no"}
        run = trainer(start, tmp_path, lambda m: ContAccumLoss(m, bank_size=80), **options)
        columns = [run.model.preprocess(texts) for texts in (["one"], ["two"])]
        run.loss(columns, None)
        assert decays(memory(run)) == {0.9}
        run.train()
        runs.append(run)
    # 80 slots are ten updates of 2 x 4 rows, which are transported, and not three of 8 x 4.
    expected = [{mean_decay(2, predicted=True)}, {mean_decay(8)}]
    assert [decays(memory(run)) for run in runs] == expected
    runs[0].args.gradient_accumulation_steps = 8
    runs[0].train()
    assert decays(memory(runs[0])) == {mean_decay(8)}


@pytest.mark.parametrize(("drawn", "batches"), [(-1, 6), (3, 6), (2, 4), (1, 2)])
def test_sizes_drawn_by_lot_see_fewer_batches(start, tmp_path, drawn, batches):
    make = lambda m: MatryoshkaLoss(  # noqa: E731
        m, ContAccumLoss(m, bank_size=24, drift="mean"), [16, 8, 4], n_dims_per_step=drawn
    )
    options = {"gradient_accumulation_steps": 6, "max_steps": 1, "save_strategy": "no"}
    run = trainer(start, tmp_path, make, **options)
    run.train()
    assert decays(run.loss.loss.memory) == {mean_decay(batches)}


def test_each_of_several_data_sets_has_a_part_of_the_batches(start, tmp_path):
    model = load(start)
    losses = {
        name: ContAccumLoss(model, bank_size=16, drift="mean") for name in ("pairs", "triplets")
    }
    run = SentenceTransformerTrainer(
        model=model,
        args=arguments(tmp_path, gradient_accumulation_steps=7, max_steps=1, save_strategy="no"),
        train_dataset={"pairs": dataset(40), "triplets": dataset(40, 1)},
        loss=losses,
        callbacks=[ContAccumCallback(losses)],
    )
    run.train()
    for loss in losses.values():
        assert decays(loss.memory) == {mean_decay(3)}


@pytest.mark.parametrize("options", [{"drift": "mean"}, TRANSPORT])
def test_a_resumed_run_goes_on_with_it_to_the_bit(two_layers, tmp_path, options):
    make = lambda m: ContAccumLoss(m, bank_size=24, **options)  # noqa: E731
    settings = {"gradient_accumulation_steps": 3, "save_steps": 2}
    whole = trainer(two_layers, tmp_path / "whole", make, max_steps=5, **settings)
    whole.train()
    trainer(two_layers, tmp_path / "part", make, max_steps=2, **settings).train()
    resumed = trainer(two_layers, tmp_path / "part", make, max_steps=5, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert losses_of(resumed) == losses_of(whole)
    assert_same_bits(weights(resumed), weights(whole))
    assert_same_bits(bank_state(resumed), bank_state(whole))
    assert decays(memory(resumed)) == {mean_decay(3, predicted="drift_probes" in options)}


def test_another_number_of_batches_in_an_update_is_refused_or_the_old_decay_given(start, tmp_path):
    make = lambda m, **options: ContAccumLoss(m, bank_size=24, drift="mean", **options)  # noqa: E731
    trainer(start, tmp_path, make, max_steps=3).train()
    changed = {"gradient_accumulation_steps": 4, "save_strategy": "no", "max_steps": 4}
    says = r"drift_decay: expected 0\.69\d+, got 0\.52\d+; None is settled when ContAccumCallback"
    with pytest.raises(RuntimeError, match=says):
        trainer(start, tmp_path, make, **changed).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3")
        )
    old = torch.load(tmp_path / "checkpoint-3" / "contaccum_banks.pt", weights_only=True)
    decay = old["banks"]["memory"]["_extra_state"]["drift_decay"]
    assert decay == mean_decay(2)
    run = trainer(start, tmp_path, lambda m: make(m, drift_decay=decay), **changed)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert decays(memory(run)) == {decay}


def test_without_a_correction_it_makes_no_difference(start, tmp_path):
    make = lambda m: ContAccumLoss(m, bank_size=24, drift="none")  # noqa: E731
    trainer(start, tmp_path, make, max_steps=3).train()
    changed = {"gradient_accumulation_steps": 4, "save_strategy": "no", "max_steps": 4}
    run = trainer(start, tmp_path, make, **changed)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert memory(run).filled() == {"16x1": 24}
