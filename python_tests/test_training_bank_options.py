"""What the loss sees of the banks under each option, against a matrix written out here."""

from __future__ import annotations

import math

import pytest
import torch
from trainer_parts import assert_close_gradients, gradients, make_trainer

from contaccum_ext import BankLayout, DualMemoryBank, contaccum_loss, reference, transport
from contaccum_ext.training import ConfigError, TrainConfig
from contaccum_ext.training.positive_bank import positive_bank_loss

SETTINGS = {
    "accumulation_steps": 3,
    "bank_size": 16,
    "temperature": 0.2,
    "drift": "none",
    "center_gradients": False,
}


def run_update(trainer, update: int):
    """The losses of an update, the gradients, and the vectors its micro-batches had."""
    trainer.optimizer.zero_grad(set_to_none=True)
    batches = trainer._micro_batches(trainer.sampler.update(update))
    trainer.method.scoring.begin_update(update)
    losses = trainer.method.accumulate(trainer._encode, batches)
    found = gradients(trainer.model)
    trainer.optimizer.zero_grad(set_to_none=True)
    return losses.loss, found, [(*trainer.model(batch), batch.passage_ids) for batch in batches]


class Seen:
    """A list as bank, and the loss as a matrix with every entry's reason."""

    def __init__(self, capacity=16, query=True, passage=True, hard_negatives=True) -> None:
        self.capacity = capacity
        self.query, self.passage, self.hard_negatives = query, passage, hard_negatives
        self.slots: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def loss(self, queries, passages, ids, use=True) -> torch.Tensor:
        local = list(zip(queries, passages, ids, strict=True))
        banked = self.slots if use else []
        rows = [*local, *(banked if self.query else [])]
        total = 0.0
        for i, (query, own, own_ids) in enumerate(rows):
            scores = [query @ own[0]]
            for j, (_, others, other_ids) in enumerate([*local, *banked]):
                is_banked = j >= len(local)
                if is_banked and not self.passage:
                    continue
                kept = 1 if is_banked and not self.hard_negatives else len(others)
                for k in range(kept):
                    if not ((i == j and k == 0) or other_ids[k] == own_ids[0]):
                        scores.append(query @ others[k])
            scores = torch.stack(scores) / 0.2
            total = total + scores.logsumexp(0) - scores[0]
        self.slots += [(q.detach(), p.detach(), i) for q, p, i in local]
        self.slots = self.slots[-self.capacity :]
        return total / len(queries)


def check_updates(trainer, seen: Seen, updates: int = 3, **use) -> list[float]:
    """The trainer's loss and gradients are those of `seen`, update by update."""
    found_losses = []
    for update in range(updates):
        if use.get("clear"):
            seen.slots.clear()
        loss, found, micro_batches = run_update(trainer, update)
        waits = update < use.get("warmup", 0)
        expected = sum(seen.loss(*batch, use=not waits) for batch in micro_batches) / 3
        expected.backward()
        # fp32 sums over up to 16 x 2 columns in another order
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        assert_close_gradients(found, gradients(trainer.model))
        found_losses.append(loss)
    return found_losses


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({}, {}),
        ({"bank_query": False}, {"query": False}),
        ({"method": "prebatch"}, {"query": False}),
        ({"bank_passage": False}, {"passage": False}),
        ({"bank_hard_negatives": False}, {"hard_negatives": False}),
        (
            {"bank_hard_negatives": False, "bank_query": False},
            {"hard_negatives": False, "query": False},
        ),
        (
            {"bank_hard_negatives": False, "bank_passage": False},
            {"hard_negatives": False, "passage": False},
        ),
    ],
)
def test_each_option_leaves_out_what_it_says(start, tmp_path, options, seen):
    losses = check_updates(make_trainer(start, tmp_path, **SETTINGS, **options), Seen(**seen))
    if seen:
        whole = check_updates(make_trainer(start, tmp_path, **SETTINGS), Seen())
        assert all(abs(a - b) > 0.01 for a, b in zip(losses, whole, strict=True))


def test_prebatch_is_contaccum_without_the_query_bank(start, tmp_path):
    first = make_trainer(start, tmp_path, method="prebatch", **SETTINGS).update()
    second = make_trainer(start, tmp_path, bank_query=False, **SETTINGS).update()
    assert (first.loss, first.grad_norm_ratio) == (second.loss, second.grad_norm_ratio)


def test_a_cleared_bank_knows_the_current_update_only(start, tmp_path):
    trainer = make_trainer(start, tmp_path, clear_bank_every_update=True, **SETTINGS)
    check_updates(trainer, Seen(), clear=True)
    assert len(trainer.method.bank) == 12  # of 16 slots, filled 36 times


def test_a_bank_that_waits_fills_and_is_not_seen(start, tmp_path):
    trainer = make_trainer(start, tmp_path, bank_warmup_updates=2, **SETTINGS)
    check_updates(trainer, Seen(), warmup=2)
    alone = make_trainer(start, tmp_path, method="gradaccum", **SETTINGS)
    waiting = make_trainer(start, tmp_path, bank_warmup_updates=2, **SETTINGS)
    for expected in (12, 16):
        found, wanted = waiting.update(), alone.update()
        assert (found.loss, found.grad_norm_query) == (wanted.loss, wanted.grad_norm_query)
        assert found.bank_filled == expected
    assert waiting.update().loss > alone.update().loss + 0.5


def test_options_that_leave_no_bank_are_refused():
    says = "bank_passage: expected true where method=contaccum and bank_query=false leave no other"
    with pytest.raises(ConfigError, match=says):
        TrainConfig(bank_query=False, bank_passage=False)
    with pytest.raises(ConfigError, match="method=prebatch and bank_query=true"):
        TrainConfig(method="prebatch", bank_passage=False)
    TrainConfig(method="gradaccum", bank_query=False, bank_passage=False)  # has none anyway


@pytest.mark.parametrize("banks", ["both", "passages", "queries"])
@pytest.mark.parametrize("row_weighting", ["local", "all"])
@pytest.mark.parametrize("drift", ["none", "mean"])
@pytest.mark.parametrize("rebuild", [True, False])
def test_the_bank_of_positives_is_the_op_where_there_are_no_hard_negatives(
    banks, row_weighting, drift, rebuild
):
    """The reference knows no table: it follows only where that is rebuilt with every move."""
    torch.manual_seed(0)
    options = {"dtype": torch.float64, "drift": drift, "layout": BankLayout(1, 2, 2)}
    ours = DualMemoryBank(13, 6, **options)
    plain = reference.DualMemoryBank(13, 6, **options)
    fused = DualMemoryBank(13, 6, **options)
    for step, size in enumerate((4, 3, 5, 4, 2, 4, 3, 2, 4)):
        for bank in (ours, plain, fused):
            bank.window = 5 if step in (4, 7) else None
        if step in (3, 6, 7):  # the table does not hold for what the bank holds now
            moves = torch.randn(4, 9, 6).double()
            for bank in (ours, fused):
                transport(bank, *moves, normalize=False, rebuild=rebuild)
            plain.transport(moves[0], moves[1], "queries", 0.1, False)
            plain.transport(moves[2], moves[3], "passages", 0.1, False)
        q, p = torch.randn(size, 6).double(), torch.randn(size, 1, 6).double()
        ids = torch.randint(-1, 6, (size, 1))
        results = []
        for loss, bank in (
            (positive_bank_loss, ours),
            (contaccum_loss, fused),
            (reference.contaccum_loss, plain),
        ):
            q_, p_ = q.clone().requires_grad_(), p.clone().requires_grad_()
            value = loss(q_, p_, bank, 0.5, ids, row_weighting, banks=banks)
            value.backward()
            results.append((value.detach(), q_.grad, p_.grad))
        for other in results[1 : 3 if rebuild else 2]:
            torch.testing.assert_close(results[0], other, rtol=1e-10, atol=1e-10)
    assert math.isfinite(results[0][0])
    torch.testing.assert_close(ours.queries(), fused.queries(), rtol=0, atol=0)


def test_the_bank_of_positives_refuses_what_is_not_finite(start, tmp_path):
    trainer = make_trainer(start, tmp_path, bank_hard_negatives=False, **SETTINGS)
    trainer.update()
    before = trainer.method.bank.queries()
    q, p = torch.randn(4, 16), torch.randn(4, 2, 16)
    p[2, 1, 3] = -math.inf  # a hard negative, which the bank would not even keep
    loss = trainer.method.scoring.loss(q, p, torch.arange(8).view(4, 2))
    assert not loss.isfinite()
    assert torch.equal(trainer.method.bank.queries(), before)
