"""drift="transport" inside other losses and wrappers, and with columns that differ in kind."""

from __future__ import annotations

import copy
import random

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")


from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss, MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import Normalize
from sentence_transformers.util import cos_sim, dot_score
from tiny_sentence_transformer import (
    PAIRS,
    assert_same,
    asymmetric,
    batch,
    features,
    load,
    routed,
    rows,
    step,
)
from transported_banks import (
    CLOSE,
    assert_followed,
    encode,
    learn,
    make,
    moved,
    optimizer,
    probe_columns,
)


@pytest.fixture
def model(two_layers):
    """With dropout, in float64: what then differs is the method, not the rounding."""
    return load(two_layers).double().train()


def test_casts_made_for_probes_do_not_cut_off_the_gradients(two_layers):
    """Autocast keeps casts of the weights while its context lasts."""
    model = load(two_layers).train()
    loss = make("plain", model)
    learn(loss, batch(model, 12), optimizer(model))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(batch(model, 6), None)
    value.backward()
    kernel = model[0].auto_model.encoder.layer[0].attention.self.query.weight
    assert kernel.grad.norm() > 0


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("similarity", [cos_sim, dot_score])
def test_matryoshka_banks_get_shortened_probes_of_length_one(model, kind, similarity):
    loss = MatryoshkaLoss(model, make(kind, model, similarity_fct=similarity), [16, 4])
    memory, sgd = loss.loss.memory, optimizer(model)
    learn(loss, batch(model, 6, 1))
    learn(loss, batch(model, 6, 1, 6))
    before = encode(model, probe_columns(model))
    torch.testing.assert_close(memory.probes.sets[2].last, before, **CLOSE)  # each text once
    learn(loss, batch(model, 6, 1, 12), sgd)
    after = encode(model, probe_columns(model))
    expected = {name: moved(bank, before, after) for name, bank in memory.banks.items()}
    learn(loss, batch(model, 3, 1, 18))
    assert expected.keys() == {"16x2", "4x2"}
    for name, bank in expected.items():
        assert_followed(memory.banks[name], bank, newer=3)


def test_an_encoder_that_normalizes_has_with_dot_products_the_banks_of_cosines(two_layers):
    model = load(two_layers).double().train()
    cosine = make("plain", copy.deepcopy(model))
    model.append(Normalize())
    dot = make("plain", model, similarity_fct=dot_score, scale=20.0)
    found = []
    for loss in (cosine, dot):
        torch.manual_seed(5)  # of dropout
        for first in (0, 12, 24):
            learn(loss, batch(loss.model, 12, 1, first), optimizer(loss.model))
        before = loss.memory.banks["16x2"].queries()
        loss._follow(batch(loss.model, 6))
        bank = loss.memory.banks["16x2"]
        found.append((bank.queries(), bank.passages(), bank.means))
        assert (bank.queries() - before).norm() > 1e-3
    torch.testing.assert_close(*found, **CLOSE)


def test_adaptive_layers_do_not_take_probes_for_a_column(model):
    """Probes are encoded while the last layer's loss is computed, and not for the others."""
    found = []
    for drift in ("none", "transport"):
        torch.manual_seed(5)
        random.seed(5)
        loss = AdaptiveLayerLoss(model, make("plain", model, drift=drift))
        found.append(step(loss, batch(model, 12)))
    assert_same(*found)
    probes = loss.loss.memory.probes.sets
    assert probes.keys() == {1}
    torch.testing.assert_close(probes[1].last, encode(model, probe_columns(model, 0)), **CLOSE)


def test_each_column_has_its_own_encoder_and_prompt(start):
    model = asymmetric(start)
    loss = make("plain", model)
    learn(loss, routed(model, 12, 1))
    expected = encode(model, [routed(model, 10, 1)[0], *routed(model, 5, 1)[1:]])
    torch.testing.assert_close(loss.memory.probes.sets[2].last, expected, **CLOSE)

    model = load(start).double().train()
    model[1].include_prompt = False  # the encoder takes the prompt out of the mask, in place
    loss = make("plain", model)
    prompt = {"prompt": "search the library: "}
    learn(loss, batch(model, 6, 0, 0, **prompt), optimizer(model))
    learn(loss, batch(model, 6, 0, 6, **prompt), optimizer(model))
    learn(loss, batch(model, 6, 0, 12, **prompt))
    expected = encode(model, features(model, rows(10), **prompt))
    torch.testing.assert_close(loss.memory.probes.sets[1].last, expected, **CLOSE)


def test_each_process_follows_its_own_probes_without_the_others(model, tmp_path):
    """DistributedDataParallel would wait for processes whose probes are complete at other times."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        loss = make("plain", model)
        model[0].auto_model.pooler.requires_grad_(False)  # of no use
        loss.model = torch.nn.parallel.DistributedDataParallel(model)
        learn(loss, batch(model, 12), optimizer(model))
        calls = []
        loss.model.register_forward_hook(lambda *_: calls.append(1))
        model[0].register_forward_hook(lambda *_: calls.append(2))
        learn(loss, batch(model, 6))
        assert calls == [2, 2, 2, 1, 2, 1]  # two columns of probes, two columns of the batch
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(
        loss.memory.probes.sets[1].last, encode(model, probe_columns(model, 0)), **CLOSE
    )
