"""What the losses equal without a bank, and when they are in use at all."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")


from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim
from tiny_sentence_transformer import (
    EPS,
    PAIRS,
    assert_same,
    asymmetric,
    batch,
    features,
    gradients,
    load,
    routed,
    rows,
    step,
)

from contaccum_ext.integrations.sentence_transformers import CachedContAccumLoss, ContAccumLoss


@pytest.fixture(scope="module")
def model(start, device) -> SentenceTransformer:
    """In float64: what then differs is the method, not the rounding."""
    return load(start, device).double().train()


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize(
    ("negatives", "scale", "similarity"),
    [(0, 20.0, cos_sim), (1, 5.0, cos_sim), (3, 1.0, dot_score)],
)
def test_without_a_bank_it_is_the_loss_it_replaces(
    model, kind, masking, negatives, scale, similarity
):
    theirs, ours, options = PAIRS[kind]
    options = options | {"scale": scale, "similarity_fct": similarity}
    columns = batch(model, 7, negatives)
    expected = step(theirs(model, **options), columns)
    columns = batch(model, 7, negatives)
    got = step(ours(model, bank_size=0, mask_duplicates=masking, **options), columns)
    assert_same(got, expected)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("negatives", [0, 2])
def test_without_a_bank_both_directions_are_theirs_apart(model, kind, negatives):
    theirs, ours, options = PAIRS[kind]
    directions = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    expected = step(theirs(model, **options, **directions), batch(model, 7, negatives))
    got = step(ours(model, bank_size=0, symmetric=True, **options), batch(model, 7, negatives))
    assert_same(got, expected)


@pytest.mark.parametrize("kind", PAIRS)
def test_without_a_bank_single_precision_agrees_to_1e_6(start, device, kind):
    theirs, ours, options = PAIRS[kind]
    model = load(start, device).train()
    expected = step(theirs(model, **options), batch(model, 8, 2))
    got = step(ours(model, bank_size=0, **options), batch(model, 8, 2))
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
    size = max(gradient.norm() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).norm() <= 1e-6 * size, name


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("why", ["eval", "no_grad"])
def test_evaluation_is_the_replaced_loss_and_leaves_the_bank_alone(model, kind, why):
    theirs, ours, options = PAIRS[kind]
    loss = ours(model, bank_size=8, **options)
    step(loss, batch(model, 6))
    before = {name: value.clone() for name, value in loss.memory.banks.state_dict().items()}
    columns = rows(6)
    columns["positive"][1] = columns["positive"][0]  # masked in training, not here
    model.train(why != "eval")
    with torch.set_grad_enabled(why != "no_grad"):
        expected = theirs(model, **options)(features(model, columns), None)
        got = loss(features(model, columns), None)
    model.train()
    torch.testing.assert_close(got, expected, rtol=1e4 * EPS, atol=0)
    after = loss.memory.banks.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_texts_truncated_to_the_same_tokens_count_as_the_same(model, start, device):
    short = load(start, device).double().train()
    short.max_seq_length = 8
    columns = rows(2)
    columns["positive"] = ["one river crosses the glacier " * 3 + end for end in ("no 1", "no 2")]
    cut, whole = (
        ContAccumLoss(encoder, bank_size=0)(features(encoder, columns), None)
        for encoder in (short, model)
    )
    # Each row's only negative is left out: a log-sum-exp of the score that is subtracted from it.
    assert cut.abs() < 100 * 20 * EPS
    assert whole > 0.1


def test_prompts_reach_the_encoder_and_the_identity(model):
    expected = step(MultipleNegativesRankingLoss(model), batch(model, 5, 1, prompt="query: "))
    assert_same(
        step(ContAccumLoss(model, bank_size=0), batch(model, 5, 1, prompt="query: ")), expected
    )


@pytest.mark.parametrize("kind", PAIRS)
def test_asymmetric_encoders(start, kind):
    theirs, ours, options = PAIRS[kind]
    model = asymmetric(start)
    expected = step(theirs(model, **options), routed(model, 6, 1))
    got = step(ours(model, bank_size=0, **options), routed(model, 6, 1))
    assert_same(got, expected)
    loss = ours(model, bank_size=8, **options)
    step(loss, routed(model, 6, 1))
    assert step(loss, routed(model, 6, 1))[0] > 1.2 * expected[0]  # eight slots more to tell apart
    with torch.no_grad():
        positives = model(routed(model, 6, 1)[1])["sentence_embedding"]
    expected_passages = torch.nn.functional.normalize(positives, dim=-1)
    torch.testing.assert_close(
        loss.memory.banks["16x2"].passages()[-6:, 0], expected_passages, rtol=0, atol=8 * EPS
    )


def test_gradient_caching_replays_dropout(two_layers, device):
    """With dropout on, the second encoding must draw what the first drew: else gradients differ."""
    model = load(two_layers, device).double().train()
    found = []
    for make in (CachedMultipleNegativesRankingLoss, CachedContAccumLoss):
        options = {} if make is CachedMultipleNegativesRankingLoss else {"bank_size": 0}
        torch.manual_seed(3)
        found.append(step(make(model, mini_batch_size=2, **options), batch(model, 6, 1)))
    assert_same(found[1], found[0])


def test_gradient_caching_does_not_depend_on_the_mini_batch(model):
    found = []
    for size in (2, 5, 64):
        loss = CachedContAccumLoss(model, bank_size=16, mini_batch_size=size)
        step(loss, batch(model, 6, 1))
        found.append(step(loss, batch(model, 6, 1, 6)))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_half_precision_embeddings_are_scored_in_single_precision(start, kind, device):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
    model = load(start, device).to(dtype).train()
    loss = ContAccumLoss(model, bank_size=8)
    embeddings = [model(column)["sentence_embedding"].float() for column in batch(model, 4)]
    theirs = MultipleNegativesRankingLoss(model).compute_loss_from_embeddings(embeddings, None)
    ours = loss(batch(model, 4), None)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    ours.backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())
    assert loss.memory.banks["16x1"].dtype == torch.float32


def test_autocast_around_model_and_loss(start, device):
    model = load(start, device).train()
    with torch.autocast(device, torch.bfloat16):
        theirs = MultipleNegativesRankingLoss(model)(batch(model, 4), None)
        ours = ContAccumLoss(model, bank_size=0)(batch(model, 4), None)
    # Theirs are scores up to 20, rounded to bfloat16 as a product and when scaled, by 2**-9 each;
    # likewise their log-sum-exp's terms; then the loss, below 8, is rounded.
    allowed = 2 * 2 * 20 * 2**-9 + 8 * 2**-9
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=allowed)
    exact = MultipleNegativesRankingLoss(model)
    with torch.autocast(device, torch.bfloat16):
        embeddings = [model(column)["sentence_embedding"] for column in batch(model, 4)]
    expected = exact.compute_loss_from_embeddings(embeddings, None)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"bank_size": -1}, ValueError, "bank_size: expected 'auto' or a number of slots >= 0"),
        ({"bank_size": "large"}, ValueError, "bank_size: expected 'auto' .* got 'large'"),
        ({"bank_size": True}, ValueError, "bank_size: expected 'auto' .* got True"),
        ({"drift": "shift"}, ValueError, "drift: expected one of .* got 'shift'"),
        ({"drift_decay": 1.0}, ValueError, r"drift_decay: expected None or .* \[0, 1\), got 1.0"),
        ({"drift_decay": "slow"}, TypeError, "drift_decay: expected a number, got str"),
        ({"row_weighting": 1}, ValueError, "row_weighting: expected one of .* got 1"),
        ({"similarity_fct": euclidean_sim}, ValueError, "similarity_fct: .* got euclidean_sim"),
    ],
)
@pytest.mark.parametrize("kind", PAIRS)
def test_refusals_name_the_argument(model, kind, options, error, says):
    with pytest.raises(error, match=says):
        PAIRS[kind][1](model, **options)


def test_refusals_of_models_and_batches(model):
    with pytest.raises(TypeError, match="model: expected a SentenceTransformer, got Linear"):
        ContAccumLoss(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"expected at least 2 columns .* got 1"):
        ContAccumLoss(model)(batch(model, 2)[:1], None)
