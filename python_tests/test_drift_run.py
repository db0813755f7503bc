"""One run of the drift experiments: encoder, order of examples, training, evaluation, trace."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_retriever import write_tiny_data, write_tiny_encoder
from transformers import AutoModel, AutoTokenizer

from benchmarks.drift import methods
from benchmarks.drift.data import draw, load
from benchmarks.drift.default_tables import LIBRARY, TURNED
from benchmarks.drift.encoder import _attend, _attend_packed, build
from benchmarks.drift.loss import Seen, update_loss
from benchmarks.drift.momentum_tables import MOMENTUM
from benchmarks.drift.prepare import prepare
from benchmarks.drift.run import Run, run, traced
from benchmarks.drift.settings import Setting
from benchmarks.drift.tables import FOLLOW, GUARDS, IDEAS

CPU = torch.device("cpu")
FOLLOWING = [("follow", options) for options in FOLLOW[:2]]
FOLLOWING += [("follow-mean", LIBRARY), ("follow-mean", TURNED)]
SHARED = [("mean", {"block": 16}), ("follow-mean", LIBRARY | {"block": 8})]
TRIED = (*IDEAS, *GUARDS, *FOLLOWING, *SHARED, *MOMENTUM[:2])
TINY = {"layers": 1, "n": 4, "accumulation": 2, "learning_rate": 1e-3, "bf16": False, "epochs": 4}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Directory of what `prepare` wrote, and the encoder it came from."""
    root = tmp_path_factory.mktemp("drift")
    encoder = write_tiny_encoder(root / "encoder", layers=2)
    prepare(encoder, [write_tiny_data(root / "tiny")], root / "out", layers=2)
    return root / "out", encoder


def tiny(**changes) -> Setting:
    """No bank unless asked for."""
    changes.setdefault("method", "bank" if changes.get("bank") else "gradaccum")
    return Setting("tiny", **TINY | changes)


def test_encoder_computes_what_transformers_computes(prepared):
    directory, source = prepared
    data = load(directory, tiny(passage_length=12), CPU)
    ours = build(directory / "model", tiny(layers=2)).passage.encode(
        data.corpus, np.array([5, 0, 5, 31, 7]), bf16=False
    )
    model = AutoModel.from_pretrained(source).half().float().eval()  # rounded as prepared
    tokenizer = AutoTokenizer.from_pretrained(source)
    corpus = [json.loads(line) for line in (source.parent / "tiny/corpus.jsonl").open()]
    batch = tokenizer([corpus[i]["text"] for i in (5, 0, 5, 31, 7)], padding=True, truncation=True,
                      max_length=12, return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    theirs = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    # fp32, two layers, sums of some dozens of terms of order 1.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_chunk_is_bounded_and_nothing_is_lost(prepared, monkeypatch):
    data = load(prepared[0], tiny(), CPU)
    encoder = build(prepared[0] / "model", tiny()).query
    ids = np.arange(len(data.corpus))
    whole = encoder.encode(data.corpus, ids, bf16=False)
    monkeypatch.setattr("benchmarks.drift.data._CHUNK", 64)
    sizes = [len(places) for places, _ in data.corpus.chunks(ids)]
    assert len(sizes) > 3 and sum(sizes) == len(ids)
    torch.testing.assert_close(encoder.encode(data.corpus, ids, bf16=False), whole)


def test_draws_are_whole_updates_of_permutations(prepared):
    data = load(prepared[0], tiny(), CPU)
    draws = draw(data, tiny(epochs=2, n=4, accumulation=3))
    assert draws.queries.shape == (72,) and draws.passages.shape == (72, 2)  # 3 of 40 // 12 updates
    for epoch in (draws.queries[:36], draws.queries[36:]):
        assert len(set(epoch.tolist())) == 36
    for query, (positive, negative) in zip(draws.queries, draws.passages, strict=True):
        assert positive in data.positives["train"][query]
        assert negative in data.negatives[query] and negative != -1
    again = draw(data, tiny(epochs=1, n=4, accumulation=3))
    assert np.array_equal(again.queries, draws.queries[:36])
    assert not np.array_equal(draw(data, tiny(seed=2)).queries[:36], draws.queries[:36])


def test_random_passages_stand_in_for_missing_negatives(prepared):
    data = load(prepared[0], tiny(), CPU)
    data.negatives[:] = -1
    draws = draw(data, tiny())
    assert draws.passages.min() >= 0 and (draws.passages[:, 0] != draws.passages[:, 1]).all()


def sequential_gradients(one: Run, update: int) -> list[torch.Tensor]:
    """The same update with a forward and a backward pass for each micro-batch.

    Only its own micro-batch's vectors carry a gradient, and only its loss is taken.
    """
    one.towers.zero_grad()
    k, n = one.cut
    with torch.no_grad():
        fixed = [x.detach() for x in one._encode(update)]
    history = one.correction.history
    own = one._slots(update)
    history.queries[own], history.passages[own] = (x.flatten(0, 1) for x in fixed)
    one.correction.after_encode(update, *fixed)
    view = one.correction.before_loss(update)
    ids = one.ids[history.view(update)]
    for number in range(k):
        slots = np.arange(own.start + number * n, own.start + (number + 1) * n)
        queries, passages = (x.clone() for x in fixed)
        queries[number] = one.towers.query(one.data.queries["train"].pack(one.draws.queries[slots]))
        passages[number] = one.towers.passage(
            one.data.corpus.pack(one.draws.passages[slots].reshape(-1))
        ).unflatten(0, (n, 2))
        update_loss(queries, passages, Seen(ids, view, one.shape)).backward()
    return [p.grad.clone() for p in one.towers.parameters()]


def test_encoding_at_once_gives_the_gradients_of_one_micro_batch_after_the_other(prepared):
    setting = tiny(bank=8, correction="mean", dropout=0.0, clip=1e9)
    one = Run(setting, load(prepared[0], setting, CPU), prepared[0] / "model", CPU)
    one.update(0)
    expected = sequential_gradients(one, 1)
    one = Run(setting, one.data, prepared[0] / "model", CPU)
    one.update(0)
    one.update(1)
    for (name, ours), theirs in zip(one.towers.named_parameters(), expected, strict=True):
        # fp32: relative to the largest entry, some hundred roundings.
        bound = 1e-4 * theirs.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs, rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("setting", [
    tiny(method="inbatch"),
    tiny(method="gradaccum", towers="shared"),
    tiny(bank=8, correction="mean", similarity="dot", scale=1.0),
    tiny(bank=40, correction="transport", options={"probes": 8}, start="random"),
    tiny(bank=16, correction="oracle", negatives=2, row_weighting="all"),
], ids=lambda setting: setting.label)  # fmt: skip
def test_a_run_learns_and_gives_a_row_that_json_holds(prepared, setting):
    cache: dict = {}
    row = run(setting, prepared[0], CPU, cache)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["key"] == setting.key and row["updates"] == 20 and row["loss_finite"]
    assert 0 <= row["valid_ndcg10"] <= 1 and 0 < row["test_recall20"] <= 1
    assert len(row["trace"]) == (0 if not setting.bank else 20)
    start = run(replace(setting, learning_rate=0.0), prepared[0], CPU, cache)
    assert row["loss_final"] < start["loss_final"]


def test_the_same_setting_gives_the_same_row(prepared):
    setting = tiny(bank=16, correction="mean", epochs=1)
    first, second = (run(setting, prepared[0], CPU, {}) for _ in range(2))
    for name in ("test_ndcg10", "loss_final", "trace"):
        assert first[name] == second[name]


def test_a_trace_tells_age_and_staleness(prepared):
    """Without dropout nothing is stale at age 0 nor with an oracle, and more with age."""
    settings = {
        name: tiny(bank=32, correction=name, dropout=0.0, learning_rate=3e-3)
        for name in ("none", "oracle", "mean")
    }
    lines = {
        name: run(setting, prepared[0], CPU, {})["trace"][5] for name, setting in settings.items()
    }
    for line in lines.values():
        assert line["ages"] == [0, 1, 2, 4]
        names = ("score_gap", "score_spread", "hardness", "mass", "shift_query")
        assert all(len(line[name]) == 4 for name in names)
        assert line["window"] == 4.5  # 32 slots and half of the update's 8
        assert line["residual_query"][0] == pytest.approx(0, abs=1e-4)  # fp32
        assert line["shift_query"][0] == 0
    none = lines["none"]["residual_query"]
    assert none[0] < none[1] < none[2] < none[3]
    assert max(lines["oracle"]["residual_passage"]) == pytest.approx(0, abs=1e-4)
    # A mean cannot be longer than the mean length.
    for line in lines.values():
        for kind in ("query", "passage"):
            for whole, part in zip(
                line[f"residual_{kind}"], line[f"systematic_{kind}"], strict=True
            ):
                assert part <= whole + 1e-5


def test_scores_with_old_passages_are_told_by_mean_deviation_and_weight(prepared):
    """Old passages that fresh queries score like fresh ones, but doubled, less, or both."""
    setting = tiny(bank=16, dropout=0.0)
    one = Run(setting, load(prepared[0], setting, CPU), prepared[0] / "model", CPU)
    for update in range(2):
        one.update(update)
    generator = torch.Generator().manual_seed(0)
    queries = torch.zeros(2, 4, 16)
    queries[..., 0] = 1.0
    passages = torch.randn(2, 4, 2, 16, generator=generator)
    history, fresh = one.correction.history, passages.flatten(0, 1)
    history.passages[8:16], history.passages[:8] = fresh, 2 * fresh - 3  # ages 0 and 1
    found = one.staleness.measure(1, queries, passages, one.correction.before_loss(1))
    scores = fresh[..., 0].flatten().double()  # of any query: all are alike
    mean, spread = scores.mean(), scores.std(correction=0)
    assert found["score_gap"][1] == pytest.approx(((mean - 3) / spread).item(), rel=1e-2)
    assert found["score_spread"][1] == pytest.approx(2, abs=1e-2)  # they divide by other counts
    others = [torch.cat([scores[: 2 * i], scores[2 * i + 2 :]]) for i in range(8)]  # not its own
    easy = torch.stack([(20 * x).logsumexp(0) for x in others]).mean() - math.log(14)
    hard = (20 * (2 * scores - 3)).logsumexp(0) - math.log(16)
    assert found["hardness"][1] == pytest.approx((hard - easy).item(), abs=1e-3)


def test_a_trace_is_dense_at_first_and_ends_with_the_last_update():
    assert traced(120) == {1, 2, 4, 8, *range(9, 120, 10), 119}
    assert traced(5) == {0, 1, 2, 3, 4}


def test_dropout_is_drawn_where_asked_for_and_the_mode_is_kept(prepared):
    data = load(prepared[0], tiny(), CPU)
    encoder = build(prepared[0] / "model", tiny(dropout=0.5)).passage
    ids = np.arange(6)
    for mode in (True, False):
        encoder.train(mode)
        plain = encoder.encode(data.corpus, ids, bf16=False)
        torch.testing.assert_close(encoder.encode(data.corpus, ids, bf16=False), plain)
        assert (encoder.encode(data.corpus, ids, False, dropout=True) - plain).abs().max() > 0.01
        assert encoder.training == mode


@pytest.mark.skipif(not torch.cuda.is_available(), reason="packed attention is CUDA's")
def test_packed_attention_computes_what_padding_computes(prepared):
    cuda = torch.device("cuda")
    packed = load(prepared[0], tiny(), cuda).corpus.pack(np.array([5, 0, 31, 7]))
    qkv = torch.randn(3, len(packed.tokens), 2, 8, device=cuda, dtype=torch.bfloat16)
    found = [f(*qkv, packed, 0.0).float() for f in (_attend_packed, _attend)]
    # bf16 outputs of order 1 from different orders of summation.
    torch.testing.assert_close(*found, rtol=0, atol=2**-6)


def test_mass_is_relative_to_a_uniform_share(prepared):
    """All vectors alike: every age has its share; shifted ones have more."""
    setting = tiny(bank=16, dropout=0.0)
    one = Run(setting, load(prepared[0], setting, CPU), prepared[0] / "model", CPU)
    for update in range(3):
        one.update(update)
    history, queries = one.correction.history, torch.zeros(2, 4, 16)
    queries[..., 0] = 1.0
    history.queries[:], history.passages[:] = 0.0, 0.0
    passages = torch.randn(2, 4, 2, 16, generator=torch.Generator().manual_seed(0))
    view = one.correction.before_loss(2)
    assert one.staleness.measure(2, queries, passages, view)["mass"] == pytest.approx([1.0] * 3)
    history.passages[8:16, :, 0] = math.log(3) / setting.scale  # age 1: three times as likely
    found = one.staleness.measure(2, queries, passages, view)["mass"]
    # All slots but the last micro-batch's: 8 of age 2, 8 of age 1, 4 of age 0.
    expected = np.array([1, 3, 1]) * 20 / (4 + 3 * 8 + 8)
    assert found == pytest.approx(expected.tolist(), abs=1e-4)


def test_learning_rate_is_the_trainers(prepared):
    from contaccum_ext.training.config import TrainConfig
    from contaccum_ext.training.optimization import LinearSchedule, warmup_updates

    setting = tiny(method="gradaccum")
    one = Run(setting, load(prepared[0], setting, CPU), prepared[0] / "model", CPU)
    theirs = LinearSchedule(1e-3, warmup_updates(20, TrainConfig(warmup_ratio=0.1)), 20)
    found = [one.learning_rate(update) for update in range(20)]
    assert found == pytest.approx([theirs.at(update) for update in range(20)], rel=1e-12)


def test_a_model_with_fewer_layers_is_refused(prepared):
    with pytest.raises(ValueError, match=r"layers: .* holds 2, the setting has 3"):
        build(prepared[0] / "model", tiny(layers=3, method="gradaccum"))
    with pytest.raises(ValueError, match=r"has 2, asked for the first 3"):
        prepare(prepared[1], [], prepared[0] / "elsewhere", layers=3)


def test_every_correction_has_a_run(prepared):
    """Two updates after the bank has filled, with the options that the tables use."""
    assert {name for name, _ in TRIED} == set(methods.CORRECTIONS)
    cache: dict = {}
    for name, options in TRIED:
        few = {key: min(value, 2) if key == "batches" else value for key, value in options.items()}
        setting = tiny(bank=16, correction=name, options=few, updates=4)
        assert run(setting, prepared[0], CPU, cache)["loss_finite"], setting.label


def test_no_update_asks_the_device_for_a_number(prepared, monkeypatch):
    """Tensors without values, on another device than the CPU: a wait or a mixture raises."""
    meta, adamw = torch.device("meta"), torch.optim.AdamW
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, fused: adamw(groups, lr=lr))
    monkeypatch.setattr("benchmarks.drift.staleness.Staleness.measure", lambda *_: {})
    for name, options in TRIED:
        few = {key: min(value, 2) if key == "batches" else value for key, value in options.items()}
        setting = tiny(bank=16, correction=name, options=few, updates=4, start="random")
        Run(setting, load(prepared[0], setting, meta), prepared[0] / "model", meta).train()
