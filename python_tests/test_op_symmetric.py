"""The symmetric loss: both directions against the oracle, over a bank and its mirror."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from strategies import Setup, Step, examples, histories
from test_op_gradients import VARIANTS, leaves, variant
from test_op_history import LAPS
from test_op_nonfinite import FAULTS, bank_and_batch
from test_op_refusals import CASES, D, M, assert_refused, assert_same_state, bank_with, good, state
from torch.nn.functional import cross_entropy
from twins import Twins

import contaccum_ext as ca
from contaccum_ext import functional, ops


@pytest.mark.parametrize("name", [name for name in VARIANTS if "only" not in name])
def test_gradcheck(device, name):
    bank, m, given_ids, options = variant(name, device, symmetric=True)

    def loss(q, p):
        return ca.contaccum_loss(q, p, bank, 0.7, given_ids, symmetric=True, **options)

    assert torch.autograd.gradcheck(loss, leaves(device, 4, m))


@pytest.mark.parametrize("m", [1, 3])
def test_without_a_bank_it_is_cross_entropy_both_ways(device, m):
    q, p = leaves(device, 5, m)
    scores = q @ p.flatten(0, 1).T / 0.5
    rows = torch.arange(5, device=device)
    there, back = cross_entropy(scores, rows * m), cross_entropy(scores[:, ::m].T, rows)
    ours = ca.contaccum_loss(q, p, None, 0.5, symmetric=True)
    torch.testing.assert_close(ours, (there + back) / 2)
    pairs = (torch.autograd.grad(loss, (q, p)) for loss in (ours, (there + back) / 2))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


def run(history: tuple[Setup, list[Step]], device: str) -> Twins:
    setup, steps = history
    twins = Twins(replace(setup, symmetric=True), device)
    for step in steps:
        twins.run(step)
    return twins


@given(history=histories())
@settings(max_examples=examples(150))
def test_random_history_of_a_small_bank(device, history):
    run(history, device)


@pytest.mark.parametrize("drift", ["none", "mean"])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("capacity", [23, 24, 25])
def test_three_laps_over_every_kind_of_boundary(device, capacity, ids, drift):
    layout = ca.BankLayout(2, 4, 8)
    run((Setup(capacity, 5, 2, layout, ids=ids, drift=drift, seed=7), LAPS), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 2])
def test_sizes_that_tensor_cores_take(device, m, dtype):
    setup = Setup(1100, 64, m, None, dtype, torch.float32, "mean", ids=True, size=0.125)
    run((setup, [Step("loss", n) for n in (300, 300, 40, 8, 300, 300, 17)]), device)


@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("name", FAULTS)
def test_a_refused_batch_changes_neither_half(device, name, n):
    """Even a fault of the hard negatives alone, of which the other direction knows nothing."""
    tensor, at, value = FAULTS[name]
    bank = ca.DualMemoryBank(10, 6, 2, device=device, symmetric=True, drift="mean")
    _, sound = bank_and_batch(device)
    for _ in range(3):
        ca.contaccum_loss(*sound[:2], bank, 0.5, symmetric=True)
    bad = [x.clone() for x in sound[:2]]
    bad[tensor][at] = value
    bad = [torch.cat([x] * n).requires_grad_() for x in bad]
    before = state(bank)
    loss = ca.contaccum_loss(*bad, bank, 0.5, symmetric=True)
    loss.backward()
    assert loss.isnan() and all(x.grad.isnan().any() for x in bad)
    assert_same_state(bank, before)


def test_the_largest_hard_negative_that_is_banked(device):
    """Norms near the largest number: both halves take the same ones, to the last bit of them."""
    torch.manual_seed(0)
    bank = ca.DualMemoryBank(50, 7, 2, torch.float32, device, symmetric=True)
    root = torch.finfo(torch.float32).max ** 0.5
    refused = 0
    for size in torch.linspace(0.99999, 1.00001, 60).tolist():
        q, p = torch.rand(1, 7, device=device), torch.rand(1, 2, 7, device=device)
        p[:, 1] *= size * root / p[:, 1].norm()
        refused += ca.contaccum_loss(q, p, bank, symmetric=True).isnan().item()
        assert torch.equal(bank.cursor, bank.mirror.cursor)
        assert torch.equal(bank.mirror.passages()[:, 0], bank.queries())
    assert 0 < refused < 60


@pytest.mark.parametrize("name", CASES)
def test_a_bad_argument_is_refused(device, name):
    """In the words of the caller's arguments, whichever direction it would have spoilt."""
    changed, _, words = CASES[name]
    bank = bank_with(device, symmetric=True)
    arguments = {**good(device), "bank": bank, "temperature": 0.5, "symmetric": True, **changed}
    for key, value in changed.items():
        if isinstance(value, torch.Tensor) and not value.is_meta:
            arguments[key] = value.to(device)
    words = [word for word in words if word != "at least one"]
    assert_refused(bank, lambda: ca.contaccum_loss(**arguments), None, words)


MISMATCHES = {
    "a bank without a mirror": (False, {"symmetric": True}, ["symmetric", "expected False"]),
    "a batch for one half": (True, {}, ["symmetric", "expected True"]),
    "one bank": (True, {"symmetric": True, "banks": "passages"}, ["banks", "both", "passages"]),
    "no bank, banks": (None, {"symmetric": True, "banks": "queries"}, ["banks", "both"]),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_what_does_not_fit_together_is_refused(device, name):
    symmetric, options, words = MISMATCHES[name]
    bank = bank_with(device, symmetric=bool(symmetric))
    given_bank = None if symmetric is None else bank
    call = good(device)

    def refused():
        ca.contaccum_loss(**call, bank=given_bank, **options)

    assert_refused(bank, refused, ValueError, words)


def test_one_direction_may_read_a_symmetric_bank(device):
    bank, plain = bank_with(device, symmetric=True), bank_with(device)
    call = good(device)
    ours = ca.contaccum_loss(**call, bank=bank, enqueue=False)
    assert torch.equal(ours, ca.contaccum_loss(**call, bank=plain, enqueue=False))


def test_a_step_that_fails_half_way_leaves_the_halves_in_step(device, monkeypatch):
    """Memory may run out between the two directions: the bank is as it was, its mirror too."""
    bank, spared = (bank_with(device, symmetric=True, drift="mean") for _ in range(2))
    batches = [good(device) for _ in range(4)]
    for b in (bank, spared):
        ca.contaccum_loss(**batches[0], bank=b, symmetric=True)
    before = state(bank)
    calls = []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError("no room")
        return op(*arguments)

    op = ops.banked_loss_
    monkeypatch.setattr(functional.ops, "banked_loss_", fails)
    with pytest.raises(MemoryError):
        ca.contaccum_loss(**batches[1], bank=bank, symmetric=True)
    monkeypatch.undo()
    own = {name: x for name, x in before.items() if not name.startswith("mirror.")}
    assert all(torch.equal(bank.state_dict()[name], x) for name, x in own.items())
    assert torch.equal(bank.mirror.queries(), bank.passages()[:, 0])
    assert torch.equal(bank.mirror.means, before["mirror.means"])
    for batch_ in batches[2:]:
        losses = [ca.contaccum_loss(**batch_, bank=b, symmetric=True) for b in (bank, spared)]
        torch.testing.assert_close(*losses)


def test_a_mirror_takes_no_batch_of_its_own(device):
    bank = bank_with(device, slots=5, symmetric=True)
    q, p = torch.randn(2, D, device=device), torch.randn(2, 1, D, device=device)
    before = state(bank)
    for fill in (lambda: ca.contaccum_loss(q, p, bank.mirror), lambda: bank.mirror.enqueue(q, p)):
        with pytest.raises(ValueError, match=r"bank: expected one to take .* got the mirror"):
            fill()
        assert_same_state(bank, before)


def test_vectors_of_the_wrong_number_are_refused_in_the_words_they_came_in(device):
    bank = ca.DualMemoryBank(5, D, device=device, symmetric=True)
    with pytest.raises(ValueError, match=rf"passages: expected shape \(2, {D}\), got \(3, {D}\)"):
        ca.contaccum_loss(
            torch.randn(2, D, device=device), torch.randn(3, D, device=device), bank, symmetric=True
        )


def test_a_state_is_loaded_by_both_halves_or_by_none(device):
    symmetric, plain = bank_with(device, symmetric=True), bank_with(device)
    with pytest.raises(RuntimeError, match="mirror: expected none"):
        plain.load_state_dict(symmetric.state_dict())
    before, saved = state(symmetric), bank_with(device, slots=7, symmetric=True).state_dict()
    for damaged in ("bank_queries", "mirror.bank_queries"):
        wrong = {**saved, damaged: torch.zeros(1)}
        with pytest.raises(RuntimeError, match=f"{damaged}: expected"):
            symmetric.load_state_dict(wrong)
        assert_same_state(symmetric, before)
    for missing in (lambda key: key.startswith("mirror."), lambda key: key == "means"):
        with pytest.raises(RuntimeError, match=r"expected .* got missing"):
            symmetric.load_state_dict({k: v for k, v in saved.items() if not missing(k)})
        assert_same_state(symmetric, before)
    symmetric.load_state_dict(saved)
    assert len(symmetric) == len(symmetric.mirror) == 7


def test_transport_and_casts_move_both_halves(device):
    bank = bank_with(device, slots=7, symmetric=True)
    old, new = torch.randn(9, D, device=device), torch.randn(9, D, device=device)
    before = bank.queries()
    ca.transport(bank, old, new, new, old)
    assert not torch.equal(bank.queries(), before)
    for _ in range(2):
        assert torch.equal(bank.mirror.bank_queries, bank.bank_passages[:, 0])
        assert torch.equal(bank.mirror.bank_passages[:, 0], bank.bank_queries)
        assert bank.mirror.pending_rebuild(1.0, -1) == ops.REBUILD_TABLE
        bank.to(torch.bfloat16)
    assert bank.mirror.dtype == torch.bfloat16 and bank.mirror.row_state.dtype == torch.float32
    bank.clear()
    assert len(bank.mirror) == 0 and bank.passages_per_query == M
