"""Gradient caching: the gradients of the whole update, whatever is dropped out."""

from __future__ import annotations

import pytest
import torch
from tiny_retriever import tiny_dataset
from trainer_parts import assert_close_gradients, first_update, gradients, make_trainer

from contaccum_ext import reference
from contaccum_ext.bank_size import mean_decay


@pytest.mark.parametrize("train", [40, 10])  # ten: a last micro-batch of two
def test_it_has_the_gradients_of_inbatch(start, tmp_path, train):
    settings = {"accumulation_steps": 3, "dataset": tiny_dataset(train=train)}
    _, whole, wanted, expected = first_update(start, tmp_path, method="inbatch", **settings)
    _, batches, losses, found = first_update(start, tmp_path, method="gradcache", **settings)
    sizes = [4, 4, min(4, train - 8)]
    assert ([batch.size for batch in batches], whole[0].size) == (sizes, sum(sizes))
    # To the rounding of fp32: other padding, other order of summation.
    assert losses.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert losses.in_batch_loss == pytest.approx(wanted.in_batch_loss, rel=1e-5)
    assert_close_gradients(found, expected)


def graph_of_all(trainer, batches):
    """Vectors of all micro-batches with their graphs: what memory does not allow."""
    encoded = [trainer.model(batch) for batch in batches]
    queries, passages = (torch.cat(side) for side in zip(*encoded, strict=True))
    return queries, passages, torch.cat([batch.passage_ids for batch in batches])


@pytest.mark.parametrize("method", ["gradcache", "gradcache_contaccum"])
def test_both_encodings_of_a_micro_batch_drop_out_the_same(two_layers, tmp_path, method):
    settings = {"method": method, "accumulation_steps": 3, "bank_size": 20}
    trainer = make_trainer(two_layers, tmp_path, **settings)
    trainer.model.train()
    batches = trainer._micro_batches(trainer.sampler.update(0))
    torch.manual_seed(5)
    losses = trainer.method.accumulate(trainer._encode, batches)
    drawn_next = torch.rand(())
    found = gradients(trainer.model)

    trainer.optimizer.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    queries, passages, ids = graph_of_all(trainer, batches)
    # As if encoded once: a run's random numbers do not depend on how often it encodes.
    assert torch.equal(torch.rand(()), drawn_next)
    expected = reference.contaccum_loss(queries, passages, None, 0.05, ids)
    expected.backward()
    assert losses.loss == pytest.approx(expected.item(), rel=1e-5)
    assert_close_gradients(found, gradients(trainer.model))

    torch.manual_seed(6)  # the gradients do depend on what is dropped out
    other = first_update(two_layers, tmp_path, **settings)[3]
    name = max(found, key=lambda name: found[name].abs().max())
    assert not torch.allclose(other[name], found[name], rtol=1e-2)


def test_with_banks_the_whole_update_meets_them_at_once(start, tmp_path):
    trainer = make_trainer(
        start,
        tmp_path,
        method="gradcache_contaccum",
        accumulation_steps=3,
        bank_size=20,
        drift="mean",
        temperature=0.2,
    )
    bank = reference.DualMemoryBank(
        20, 16, 2, drift="mean", drift_decay=mean_decay(1), anticipate=True
    )
    for update in range(3):
        batches = trainer._micro_batches(trainer.sampler.update(update))
        trainer.optimizer.zero_grad(set_to_none=True)
        losses = trainer.method.accumulate(trainer._encode, batches)
        found = gradients(trainer.model)
        trainer.optimizer.zero_grad(set_to_none=True)
        queries, passages, ids = graph_of_all(trainer, batches)
        expected = reference.contaccum_loss(queries, passages, bank, 0.2, ids, center_over=1)
        expected.backward()
        assert losses.loss == pytest.approx(expected.item(), rel=1e-4)
        assert_close_gradients(found, gradients(trainer.model))
        assert len(trainer.method.bank) == len(bank) == min(20, 12 * (update + 1))


def test_compiled_encoders_drop_out_the_same_in_both_encodings(two_layers, tmp_path):
    trainer = make_trainer(two_layers, tmp_path, method="gradcache", compile=True, layers=1)
    trainer.model.train()
    batches = trainer._micro_batches(trainer.sampler.update(0))
    torch.manual_seed(5)
    losses = trainer.method.accumulate(trainer._encode, batches)
    found = gradients(trainer.model)
    trainer.optimizer.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    queries, passages, ids = graph_of_all(trainer, batches)
    expected = reference.contaccum_loss(queries, passages, None, 0.05, ids)
    expected.backward()
    assert losses.loss == pytest.approx(expected.item(), rel=1e-5)
    assert_close_gradients(found, gradients(trainer.model))
