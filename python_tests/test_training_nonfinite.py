"""What is not a number stops a run with its place, or changes nothing."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from tiny_retriever import assert_same_weights, weights
from trainer_parts import make_trainer

from contaccum_ext.training import METHODS, DivergedError

SETTINGS = {"accumulation_steps": 3, "bank_size": 30}


def break_micro_batch(trainer, update: int, batch: int, value: float) -> None:
    """Make one component of a query of that micro-batch, counted from 0, `value`."""
    encode, queries = trainer._encode, []
    trainer._micro_batches, original = (
        lambda draws: queries.clear() or queries.extend(found := original(draws)) or found,
        trainer._micro_batches,
    )

    def broken(micro_batch):
        query_vectors, passage_vectors = encode(micro_batch)
        if trainer.done == update and micro_batch is queries[min(batch, len(queries) - 1)]:
            factor = torch.ones_like(query_vectors)
            factor[1, 3] = value
            query_vectors = query_vectors * factor
        return query_vectors, passage_vectors

    trainer._encode = broken


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_it_names_update_micro_batch_and_queries(start, tmp_path, method, value):
    trainer = make_trainer(start, tmp_path, method=method, **SETTINGS)
    break_micro_batch(trainer, update=1, batch=1, value=value)
    draws = trainer.sampler.update(1)
    if method == "inbatch":
        place, ids = "1 of 1", [draw.id for draw in draws]
    else:
        place, ids = "2 of 3", [draw.id for draw in draws[4:8]]
    trainer.update()
    before = weights(trainer.model)
    says = f"update 2, micro-batch {place}: .* are not finite, queries {', '.join(ids)}; lower"
    with pytest.raises(DivergedError, match=says):
        trainer.update()
    assert_same_weights(weights(trainer.model), before)
    assert trainer.done == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_skipped_update_leaves_weights_and_banks_as_they_were(start, tmp_path, method):
    trainer = make_trainer(start, tmp_path, method=method, on_nonfinite="skip", **SETTINGS)
    # The last micro-batch: those before it have long been in the bank when it shows.
    break_micro_batch(trainer, update=2, batch=2, value=math.nan)

    def state() -> dict[str, torch.Tensor]:
        bank = trainer.method.bank
        return weights(trainer.model) | ({} if bank is None else weights(bank))

    trainer.update()
    first = state()
    assert trainer.update().skipped == 0
    before, ages = state(), trainer.method.scoring.ages.state()
    assert any(not torch.equal(first[name], before[name]) for name in first)
    with pytest.warns(UserWarning, match=r"skipped: update 3, micro-batch \d of \d: "):
        metrics = trainer.update()
    assert_same_weights(state(), before)
    assert trainer.method.scoring.ages.state() == ages
    assert (metrics.update, metrics.skipped, metrics.loss, metrics.grad_norm_query) == (
        3,
        1,
        None,
        None,
    )
    after = trainer.update()
    assert (after.update, after.skipped) == (4, 1)
    assert math.isfinite(after.loss)


def test_a_gradient_that_is_not_finite_is_no_better(start, tmp_path):
    for policy in ("stop", "skip"):
        trainer = make_trainer(start, tmp_path, on_nonfinite=policy, **SETTINGS)
        before = weights(trainer.model)
        encode = trainer._encode

        def broken(batch, encode=encode):
            queries, passages = encode(batch)
            queries.register_hook(lambda gradient: gradient * math.inf)
            return queries, passages

        trainer._encode = broken
        says = r"update 1: the gradient is not finite, although the loss \([\d.]+\) is"
        if policy == "stop":
            with pytest.raises(DivergedError, match=says):
                trainer.update()
        else:
            with pytest.warns(UserWarning, match=says):
                assert trainer.update().bank_filled == 0
        assert_same_weights(weights(trainer.model), before)


def test_the_log_of_a_skipped_update_is_json(start, tmp_path):
    trainer = make_trainer(start, tmp_path, on_nonfinite="skip", max_updates=3, **SETTINGS)
    break_micro_batch(trainer, update=1, batch=0, value=math.nan)
    with pytest.warns(UserWarning, match="skipped: update 2"):
        trainer.train(progress=False)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert not re.search("NaN|Infinity", text)
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 1]
    assert [line["loss"] is None for line in lines] == [False, True, False]
