"""Mixed precision, gradient checkpointing and compiled encoders change memory and time only."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_retriever import assert_same_weights, tiny_config, weights
from torch import nn
from trainer_parts import assert_close_gradients, gradients, make_trainer

from contaccum_ext.training import (
    DivergedError,
    DualEncoder,
    Encoder,
    EncoderError,
    load_checkpoint,
)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_encoders_compute_in_it_and_weights_and_loss_do_not(start, tmp_path, precision):
    trainer = make_trainer(start, tmp_path, precision=precision)
    seen = set()
    for module in trainer.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    trainer.update()
    assert seen == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert trainer.method.bank.dtype == torch.float32


@pytest.mark.parametrize("method", ["contaccum", "gradcache_contaccum"])
def test_fp16_gradients_are_scaled_for_backward_and_back_for_the_step(start, tmp_path, method):
    expected = make_trainer(start, tmp_path, method=method).update()
    trainer = make_trainer(start, tmp_path, method=method, precision="fp16")
    batches = trainer._micro_batches(trainer.sampler.update(0))
    trainer.method.accumulate(trainer._encode, batches, trainer.scaler.scale)
    assert trainer.scaler.get_scale() == 65536
    largest = max(p.grad.abs().max() for p in trainer.model.parameters() if p.grad is not None)
    assert largest > 1000  # scaled
    again = make_trainer(start, tmp_path, method=method, precision="fp16").update()
    assert again.loss == pytest.approx(expected.loss, rel=0.01)
    assert again.grad_norm_query == pytest.approx(expected.grad_norm_query, rel=0.05)
    assert again.loss_scale == 65536
    assert expected.loss_scale is None


def overflow(trainer, times: int) -> None:
    """Make the gradient infinite in the first updates: what a loss scale too large does."""
    encode = trainer._encode

    def broken(batch):
        queries, passages = encode(batch)
        if trainer.done < times and queries.requires_grad:
            queries.register_hook(lambda gradient: gradient * math.inf)
        return queries, passages

    trainer._encode = broken


def test_an_fp16_step_that_overflows_is_left_out_and_the_scale_halved(start, tmp_path):
    settings = {"precision": "fp16", "max_updates": 4, "temperature": 1.0}  # small gradients
    trainer = make_trainer(start, tmp_path, **settings)
    overflow(trainer, times=2)
    before = weights(trainer.model)
    first = trainer.update()
    assert_same_weights(weights(trainer.model), before)
    assert (first.skipped, first.loss_scale, first.grad_norm_query) == (1, 32768, None)
    assert math.isfinite(first.loss)
    # Representations were finite: banked as in a step that was taken, and no NaN among them.
    assert first.bank_filled == 8
    assert trainer.method.bank.queries().isfinite().all()
    assert (trainer.update().skipped, trainer.update().skipped) == (2, 2)
    assert trainer.scaler.get_scale() == 16384
    after = weights(trainer.model)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert all(value.isfinite().all() for value in after.values())


def test_a_gradient_infinite_at_every_scale_ends_an_fp16_run(start, tmp_path):
    trainer = make_trainer(start, tmp_path, precision="fp16", epochs=10)
    overflow(trainer, times=10**6)
    with pytest.raises(DivergedError, match=r"update 17: the gradient is not finite"):  # 2^16
        trainer.train(progress=False)


def test_the_loss_scale_survives_a_resume(start, tmp_path):
    settings = {"precision": "fp16", "max_updates": 4, "checkpoint_every": 2}
    trainer = make_trainer(start, tmp_path, **settings)
    overflow(trainer, times=1)
    trainer.train(progress=False)
    checkpoint = load_checkpoint(tmp_path / "checkpoint-000002")
    resumed = make_trainer(start, tmp_path / "other", **settings)
    resumed.load_state_dict(checkpoint.training_state())
    assert (resumed.scaler.get_scale(), resumed.skipped, resumed.done) == (32768, 1, 2)


def one_update(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first update, with dropout drawn from the same seed."""
    trainer.model.train()
    batches = trainer._micro_batches(trainer.sampler.update(0))
    torch.manual_seed(3)
    loss = trainer.method.accumulate(trainer._encode, batches).loss
    return loss, gradients(trainer.model)


def test_checkpointed_gradients_are_the_same_and_take_less_memory(two_layers, tmp_path):
    kept, results = {}, {}
    for wanted in (False, True):
        trainer = make_trainer(two_layers, tmp_path, gradient_checkpointing=wanted)
        kept[wanted] = 0

        def count(tensor, wanted=wanted):
            kept[wanted] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            results[wanted] = one_update(trainer)
    assert results[True][0] == pytest.approx(results[False][0], rel=1e-6)
    assert_close_gradients(results[True][1], results[False][1])
    assert kept[True] < 0.5 * kept[False]


def test_a_backbone_that_cannot_checkpoint_is_refused_by_name():
    class Plain(nn.Module):
        config = type("Config", (), {"hidden_size": 4})

    encoder = Encoder(Plain())
    with pytest.raises(EncoderError, match="gradient_checkpointing: Plain: this model has none"):
        DualEncoder(encoder, encoder).prepare_training(tiny_config(gradient_checkpointing=True))


def test_compiled_encoders_train_alike_and_save_under_the_same_names(start, tmp_path):
    expected = one_update(make_trainer(start, tmp_path))
    trainer = make_trainer(start, tmp_path, compile=True, max_updates=1)
    from torch._dynamo.utils import counters

    counters.clear()
    found = one_update(trainer)
    assert counters["stats"]["unique_graphs"] > 0
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    # A compiled backbone gives the pooling layer it does not use gradients of zero, not none.
    assert all(not found[1].pop(name).any() for name in found[1].keys() - expected[1].keys())
    assert_close_gradients(found[1], expected[1])
    trainer.train(progress=False)
    assert_same_weights(weights(load_checkpoint(tmp_path).model), weights(trainer.model))
