"""Trainers on the tiny data, and one update of them taken apart."""

from __future__ import annotations

import torch
from tiny_retriever import tiny_config, tiny_dataset
from torch import nn

from contaccum_ext.training import DualEncoder, Trainer
from contaccum_ext.training.encoder import load_tokenizer


def make_trainer(start, output, dataset=None, **settings) -> Trainer:
    config = tiny_config(**settings)
    model = DualEncoder.from_pretrained(start, config)
    return Trainer(model, load_tokenizer(start), dataset or tiny_dataset(), config, output)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def first_update(start, output, **settings):
    """Trainer, its first update's micro-batches, and the gradients its method gives them."""
    trainer = make_trainer(start, output, **settings)
    batches = trainer._micro_batches(trainer.sampler.update(0))
    losses = trainer.method.accumulate(trainer._encode, batches)
    found = gradients(trainer.model)
    trainer.optimizer.zero_grad(set_to_none=True)
    return trainer, batches, losses, found


def assert_close_gradients(found, expected):
    assert found.keys() == expected.keys()
    assert found
    largest = max(value.abs().max().item() for value in expected.values())
    assert largest > 1e-3  # nothing compared with nothing
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * largest, msg=name)
