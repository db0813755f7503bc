"""What the banks of the losses hold, over a history of batches, and what they do to the loss."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")


from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import dot_score
from tiny_sentence_transformer import (
    EPS,
    PAIRS,
    assert_same,
    batch,
    embed,
    features,
    gradients,
    load,
    oracle,
    rows,
    step,
)

from contaccum_ext import DualMemoryBank, contaccum_loss, mean_decay, reference
from contaccum_ext.integrations.sentence_transformers import ContAccumLoss
from contaccum_ext.integrations.sentence_transformers.memory import MEAN_DECAY


@pytest.fixture(scope="module")
def model(start) -> SentenceTransformer:
    """In float64: what then differs is the method, not the rounding."""
    return load(start).double().train()


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("drift", ["auto", "mean"])
def test_an_empty_bank_changes_nothing_about_the_first_batch(model, kind, drift):
    theirs, ours, options = PAIRS[kind]
    expected = step(theirs(model, **options), batch(model, 6, 1))
    loss = ours(model, bank_size=32, drift=drift, **options)
    assert_same(step(loss, batch(model, 6, 1)), expected)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("drift", ["mean", "none"])
@pytest.mark.parametrize("row_weighting", ["local", "all"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_history_of_batches_is_the_oracles(model, kind, drift, row_weighting, symmetric):
    """Loss and gradients; with m = 2 and a bank that wraps around: 20 slots, 4 batches of 7."""
    _, ours, options = PAIRS[kind]
    loss = ours(
        model,
        bank_size=20,
        drift=drift,
        row_weighting=row_weighting,
        symmetric=symmetric,
        mask_duplicates=False,
        **options,
    )
    bank = reference.DualMemoryBank(20, 16, 2, torch.float64, drift, MEAN_DECAY)
    for first in (0, 7, 14, 21):
        got = step(loss, batch(model, 7, 1, first))
        kinds = {"row_weighting": row_weighting, "symmetric": symmetric}
        value = oracle(bank, embed(model, batch(model, 7, 1, first)), **kinds)
        value.backward()
        assert_same(got, (value.detach(), gradients(model)))
    (ours_bank,) = loss.memory.banks.values()
    assert len(ours_bank) == len(bank) == 20
    torch.testing.assert_close(ours_bank.queries(), bank.queries(), rtol=0, atol=8 * EPS)
    torch.testing.assert_close(ours_bank.passages(), bank.passages(), rtol=0, atol=8 * EPS)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("micro_batches", [1, 7, 8, 16])
def test_updates_of_few_batches_have_means_that_anticipate(model, kind, micro_batches):
    """Loss, gradients and means; those of updates of many batches would be others."""
    _, ours, options = PAIRS[kind]
    loss = ours(model, bank_size=20, drift="mean", mask_duplicates=False, **options)
    loss.memory.begin_run(7 * micro_batches, None, micro_batches)
    decay = mean_decay(micro_batches)
    banks = {a: reference.DualMemoryBank(20, 16, 2, torch.float64, "mean", decay) for a in (0, 1)}
    anticipates = micro_batches < 8
    for first in (0, 7, 14, 21):
        got = step(loss, batch(model, 7, 1, first))
        columns = embed(model, batch(model, 7, 1, first))
        centering = {"center_over": micro_batches if micro_batches > 1 else None}
        value, other = (
            oracle(banks[a], columns, None, a, **centering) for a in (anticipates, not anticipates)
        )
        value.backward()
        assert_same(got, (value.detach(), gradients(model)))
        assert first == 0 or abs(value - other) > 1e-6 * value
    for name in ("query_offsets", "passage_offsets"):
        got, expected = (
            getattr(bank, name)() for bank in (loss.memory.banks["16x2"], banks[anticipates])
        )
        torch.testing.assert_close(got, expected, rtol=0, atol=32 * EPS)


def test_capacity_counts_slots_and_the_oldest_leave_across_optimizer_steps(model, start):
    """Three faults an earlier attempt had: batches counted, nothing evicted, cleared each step."""
    model = load(start).double().train()
    loss = ContAccumLoss(model, bank_size=10, drift="mean")  # which leaves what is banked
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen, filled = [], []
    for first in (0, 4, 8, 12):
        columns = batch(model, 4, 0, first)
        with torch.no_grad():
            seen.append(embed(model, columns)[0])
        loss(batch(model, 4, 0, first), None).backward()
        optimizer.step()
        optimizer.zero_grad()
        filled.append(loss.memory.filled()["16x1"])
    assert filled == [4, 8, 10, 10]
    bank = loss.memory.banks["16x1"]
    expected = torch.cat(seen)[-10:]  # of four different models
    torch.testing.assert_close(bank.queries(), expected, rtol=0, atol=8 * EPS)


def test_banked_queries_are_rows_of_the_loss(model):
    """Without them the passages' gradient would lack what banked queries contribute."""
    loss = ContAccumLoss(model, bank_size=32, drift="none")
    banks = {name: DualMemoryBank(32, 16, 1, torch.float64) for name in ("both", "passages")}
    values = {}
    for first in (0, 6):
        got = loss(batch(model, 6, 0, first), None)
        queries, passages = embed(model, batch(model, 6, 0, first))
        for name, bank in banks.items():
            values[name] = contaccum_loss(queries, passages, bank, 1 / 20, banks=name)
    torch.testing.assert_close(got, values["both"], rtol=1e4 * EPS, atol=0)
    assert values["both"] > values["passages"] * 1.5


@pytest.mark.parametrize("kind", PAIRS)
def test_equal_passages_are_left_out_of_a_rows_negatives(model, kind):
    """In the batch, as a hard negative, and in the bank; the oracle gets ids by hand."""
    _, ours, options = PAIRS[kind]
    columns = rows(4, 1)
    columns["positive"][3] = columns["positive"][0]
    columns["negative_1"][1] = columns["positive"][2] + "  "  # the same tokens
    ids = torch.tensor([[0, 10], [1, 2], [2, 12], [0, 13]])
    options = {"bank_size": 16, "drift": "mean"} | options
    loss, plain = ours(model, **options), ours(model, mask_duplicates=False, **options)
    bank = reference.DualMemoryBank(16, 16, 2, torch.float64, "mean", MEAN_DECAY)
    for _ in range(2):  # the second time everything is in the bank as well
        got = step(loss, features(model, columns))
        value = oracle(bank, embed(model, features(model, columns)), ids)
        value.backward()
        assert_same(got, (value.detach(), gradients(model)))
        assert step(plain, features(model, columns))[0] > got[0] + 0.01  # terms of its sums


@pytest.mark.parametrize("kind", PAIRS)
def test_matryoshka_keeps_a_bank_for_each_size(model, kind):
    theirs, ours, options = PAIRS[kind]
    weights = {"matryoshka_dims": [16, 4], "matryoshka_weights": [1, 0.5]}
    expected = step(MatryoshkaLoss(model, theirs(model, **options), **weights), batch(model, 6, 1))
    plain = MatryoshkaLoss(model, ours(model, bank_size=0, **options), **weights)
    assert_same(step(plain, batch(model, 6, 1)), expected)

    inner = ours(model, bank_size=20, drift="mean", **options)
    loss = MatryoshkaLoss(model, inner, **weights)
    bank = {
        dim: reference.DualMemoryBank(20, dim, 2, torch.float64, "mean", MEAN_DECAY)
        for dim in (16, 4)
    }
    for first in (0, 6, 12):
        got = step(loss, batch(model, 6, 1, first))
        columns = [model(c)["sentence_embedding"] for c in batch(model, 6, 1, first)]
        total = torch.zeros((), dtype=torch.float64)
        for dim, weight in ((16, 1.0), (4, 0.5)):
            cut = [torch.nn.functional.normalize(c[:, :dim], dim=-1) for c in columns]
            total = total + weight * oracle(bank[dim], cut)
        total.backward()
        assert_same(got, (total.detach(), gradients(model)))
    assert loss.loss.memory.filled() == {"16x2": 18, "4x2": 18}


def test_adaptive_layers_bank_the_last_layer_once_per_batch(two_layers):
    model = load(two_layers).double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    options = {"n_layers_per_step": -1}
    expected = step(
        AdaptiveLayerLoss(model, MultipleNegativesRankingLoss(model), **options), batch(model, 6)
    )
    plain = AdaptiveLayerLoss(model, ContAccumLoss(model, bank_size=0), **options)
    assert_same(step(plain, batch(model, 6)), expected)
    loss = AdaptiveLayerLoss(model, ContAccumLoss(model, bank_size=16), **options)
    step(loss, batch(model, 6))
    assert loss.loss.memory.filled() == {"16x1": 6}
    with torch.no_grad():
        last = embed(model, batch(model, 6))[0]
    torch.testing.assert_close(loss.loss.memory.banks["16x1"].queries(), last, rtol=0, atol=8 * EPS)


def test_data_sets_with_other_columns_have_banks_of_their_own(model):
    loss = ContAccumLoss(model, bank_size=8)
    step(loss, batch(model, 4, 0))
    step(loss, batch(model, 3, 2))
    assert loss.memory.filled() == {"16x1": 4, "16x3": 3}


def test_the_state_dict_takes_the_banks_along(model):
    loss, other = (ContAccumLoss(model, bank_size=10) for _ in range(2))
    for first in (0, 7):
        step(loss, batch(model, 7, 1, first))
    step(other, batch(model, 5, 0))  # a bank that the other state does not have
    other.load_state_dict(loss.state_dict())
    assert other.memory.filled() == {"16x2": 10}
    expected = step(loss, batch(model, 7, 1, 14))
    got = step(other, batch(model, 7, 1, 14))
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(got[1][name], value) for name, value in expected[1].items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bank_size": 12}, "bank_size: expected 12, got 10"),
        ({"drift": "none"}, "drift: expected 'none', got 'transport'"),
        ({"drift": "mean"}, "drift: expected 'mean', got 'transport'"),
        ({"similarity_fct": dot_score}, "normalize: expected False, got True"),
        ({"mask_duplicates": False}, "mask_duplicates: expected False, got True"),
    ],
)
def test_the_banks_of_another_setting_are_refused(model, change, says):
    loss = ContAccumLoss(model, bank_size=10)
    step(loss, batch(model, 4))
    other = ContAccumLoss(model, **({"bank_size": 10} | change))
    with pytest.raises(RuntimeError, match=says):
        other.load_state_dict(loss.state_dict())
    assert other.memory.filled() == {}


def test_the_automatic_correction_is_transport_as_long_as_nobody_knows_the_update(model):
    """Which is right for all ages; also for a bank that would be young in most trainings."""
    for size in ("auto", 1024, 64, 2):
        loss = ContAccumLoss(model, bank_size=size)
        step(loss, batch(model, 2))
        bank, kept = loss.memory.banks["16x1"], loss.memory
        assert kept.drift == "transport" and kept.probes.count == 64
        assert (bank.drift, bank.drift_decay) == ("mean", 0.9)
        assert kept.staleness.keys() == {"16x1"}
    loss.memory.begin_run(update_size=1, training_queries=None, micro_batches=1)
    assert (loss.memory.drift, loss.memory.probes) == ("mean", None)
    loss.memory.begin_run(update_size=1, training_queries=None)
    assert loss.memory.drift_decay == MEAN_DECAY == 0.5


def test_an_automatic_bank_has_1024_slots_as_long_as_nobody_knows_the_update(model):
    loss = ContAccumLoss(model)
    step(loss, batch(model, 2))
    assert loss.memory.banks["16x1"].capacity == 1024
    for update, rows_seen, batches, slots in (
        (64, None, None, 4 * 64),
        (64, None, 7, 4 * 64),
        (64, None, 8, 4 * 64),
        (64, 300, 8, 4 * 64),
        (64, 100, 8, 100),
        (63, None, 8, 8 * 63),
        (16, 200, None, 8 * 16),
        (32, 200, None, 200),
    ):
        loss.memory.begin_run(update, rows_seen, batches)
        assert loss.memory.capacity == slots
    assert loss.memory.filled() == {}
