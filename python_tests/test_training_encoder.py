"""Encoders, the optimizer's groups, the schedule and gradient clipping."""

from __future__ import annotations

import math
import re

import pytest
import torch
from tiny_retriever import (
    assert_same_weights,
    tiny_config,
    weights,
)
from torch import nn

from contaccum_ext.training import (
    DualEncoder,
    Encoder,
    EncoderError,
)
from contaccum_ext.training.optimization import (
    LinearSchedule,
    build_optimizer,
    clip_gradients,
    warmup_updates,
)

CPU = torch.device("cpu")


def test_schedule_rises_to_the_peak_and_falls_to_zero():
    schedule = LinearSchedule(peak=1.0, warmup=4, total=12)
    rates = [schedule.at(update) for update in range(12)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == pytest.approx([0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert LinearSchedule(1.0, 0, 4).at(0) == 1.0
    shares = tiny_config(warmup_ratio=0.1)
    assert [warmup_updates(161, shares), warmup_updates(5, shares)] == [16, 0]
    assert warmup_updates(161, tiny_config(warmup_ratio=0.1, warmup_updates=5)) == 5


def test_weight_decay_spares_biases_and_norms(start):
    model = DualEncoder.from_pretrained(start, tiny_config())
    decayed, spared = build_optimizer(model, 1e-3, 0.1).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    kinds = {id(p): name for name, p in model.named_parameters()}
    spared_names = {kinds[id(p)] for p in spared["params"]}
    assert spared_names == {
        name for name, _ in model.named_parameters() if "LayerNorm" in name or "bias" in name
    }
    assert len(decayed["params"]) + len(spared["params"]) == len(kinds)


def test_gradient_norms_are_measured_apart_and_clipped_together(start):
    model = DualEncoder.from_pretrained(start, tiny_config())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    next(model.query.parameters()).grad.view(-1)[:2] = torch.tensor([3.0, 0.0])
    next(model.passage.parameters()).grad.view(-1)[:2] = torch.tensor([0.0, 4.0])
    norms = clip_gradients(model, 1.0)
    assert (norms.query, norms.passage) == pytest.approx((3, 4))
    assert norms.ratio == pytest.approx(4 / 3)
    after = clip_gradients(model, 100.0)
    assert (after.query, after.passage) == pytest.approx((0.6, 0.8), rel=1e-4)
    again = clip_gradients(model, 100.0)  # below the limit: left alone
    assert (again.query, again.passage) == pytest.approx((after.query, after.passage))


class Constant(nn.Module):
    """A backbone whose last hidden state is given."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden = hidden
        self.config = type("Config", (), {"hidden_size": hidden.shape[-1]})

    def forward(self, **inputs):
        return type("Output", (), {"last_hidden_state": self.hidden})


def test_pooling_leaves_padding_out():
    hidden = torch.tensor([[[1.0, 0.0], [3.0, 8.0], [100.0, 100.0]]]).to(torch.bfloat16)
    inputs = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    mean = Encoder(Constant(hidden), "mean", normalize=False)(**inputs)
    assert mean.dtype == torch.float32
    assert mean.tolist() == [[2.0, 4.0]]
    assert Encoder(Constant(hidden), "cls", normalize=False)(**inputs).tolist() == [[1.0, 0.0]]
    unit = Encoder(Constant(hidden), "mean")(**inputs)
    assert unit[0].tolist() == pytest.approx([2 / math.sqrt(20), 4 / math.sqrt(20)])
    with pytest.raises(EncoderError, match="pooling: expected mean or cls, got 'max'"):
        Encoder(Constant(hidden), "max")


def test_layers_keeps_the_first_ones(two_layers):
    whole = Encoder.from_pretrained(two_layers)
    first = Encoder.from_pretrained(two_layers, layers=1)
    assert len(whole.backbone.encoder.layer) == 2
    assert len(first.backbone.encoder.layer) == 1
    assert_same_weights(
        weights(first.backbone.encoder.layer[0]), weights(whole.backbone.encoder.layer[0])
    )
    with pytest.raises(EncoderError, match="has 2 layers, asked for the first 3"):
        Encoder.from_pretrained(two_layers, layers=3)


def test_encoders_that_cannot_be_opened(tmp_path, start):
    with pytest.raises(EncoderError, match=re.escape(f"{tmp_path}/none: no such directory")):
        Encoder.from_pretrained(tmp_path / "none")
    with pytest.raises(EncoderError, match="no encoder there"):
        Encoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EncoderError, match="no encoder can be opened there: ") as caught:
        Encoder.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(EncoderError, match=r"passage_max_length: .* at most 32 tokens, got 33"):
        DualEncoder.from_pretrained(start, tiny_config(passage_max_length=33))
