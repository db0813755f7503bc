"""Gradients: against finite differences, after the bank has moved on, and where there are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import contaccum_ext as ca
from contaccum_ext import reference


def filled_bank(device: str, slots: int = 11, m: int = 2, ids: bool = False, **options):
    """A float64 bank of 8 slots, wrapped around, blocks of 4, with offsets that are not zero."""
    torch.manual_seed(0)
    layout = ca.BankLayout(1, 2, 4)
    bank = ca.DualMemoryBank(8, 3, m, torch.float64, device, layout=layout, **options)
    while slots:
        n = min(slots, 3)
        bank.enqueue(*batch(device, n, m, ids))
        slots -= n
    return bank


def batch(device: str, n: int = 4, m: int = 2, ids: bool = False, d: int = 3):
    q = torch.randn(n, d, dtype=torch.float64, device=device)
    p = torch.randn(n, m, d, dtype=torch.float64, device=device)
    return q, p, torch.randint(-1, 4, (n, m), device=device) if ids else None


def leaves(device: str, n: int = 4, m: int = 2, d: int = 3) -> list[Tensor]:
    return [x.requires_grad_() for x in batch(device, n, m, d=d)[:2]]


def set_random_offsets(bank: ca.DualMemoryBank) -> None:
    blocks, like = bank.layout.offset_blocks(bank.capacity), bank.bank_queries
    shape = (blocks, bank.passages_per_query, bank.dim)
    bank.set_offsets(like.new_empty(blocks, bank.dim).normal_(), like.new_empty(shape).normal_())


VARIANTS = {
    "plain": {},
    "one passage": {"m": 1},
    "three passages": {"m": 3},
    "ids": {"ids": True},
    "drift": {"drift": "mean"},
    "offsets": {"offsets": True},
    "window": {"window": 3},
    "window, offsets, ids": {"window": 3, "offsets": True, "ids": True},
    "banked passages only": {"banks": "passages", "drift": "mean"},
    "banked queries only": {"banks": "queries", "drift": "mean", "ids": True},
    "weights of the paper": {"row_weighting": "all", "ids": True},
    "partly filled": {"slots": 5},
    "empty": {"slots": 0},
}


def variant(name: str, device: str, **kinds):
    """The bank of a variant, m, ids of a batch of 4, and what the loss is to be told."""
    options = dict(VARIANTS[name])
    m, ids, slots = options.pop("m", 2), options.pop("ids", False), options.pop("slots", 11)
    window, offsets = options.pop("window", None), options.pop("offsets", False)
    bank = filled_bank(device, slots, m, ids, drift=options.pop("drift", "none"), **kinds)
    bank.window = window
    if offsets:
        set_random_offsets(bank)
    return bank, m, batch(device, 4, m, ids)[2], options | {"enqueue": False}


@pytest.mark.parametrize("name", VARIANTS)
def test_gradcheck(device, name):
    bank, m, given, options = variant(name, device)

    def loss(q, p):
        return ca.contaccum_loss(q, p, bank, 0.7, given, **options)

    inputs = leaves(device, 4, m)
    assert torch.autograd.gradcheck(loss, inputs)
    if bank.use_offsets:
        assert bank.query_offsets()[0].abs().min() > 0  # the variant is what its name says


@pytest.mark.parametrize("m", [1, 2])
def test_gradcheck_without_a_bank(device, m):
    assert torch.autograd.gradcheck(
        lambda q, p: ca.contaccum_loss(q, p, None, 0.5), leaves(device, 5, m)
    )


@pytest.mark.parametrize("drift", ["none", "mean"])
@pytest.mark.parametrize("later", [1, 3, 8, 20])
def test_gradients_are_of_the_bank_that_the_loss_saw(device, later, drift):
    """Between forward and backward the slots are overwritten, once or several times."""
    bank = filled_bank(device, drift=drift)
    q, p = leaves(device)
    exact = reference.contaccum_loss(q, p, bank, 0.7, enqueue=False)
    expected = torch.autograd.grad(exact, (q, p))
    loss = ca.contaccum_loss(q, p, bank, 0.7)
    for _ in range(3):
        ca.contaccum_loss(*leaves(device, later), bank, 0.7)
    bank.clear()
    for got, wanted in zip(torch.autograd.grad(loss, (q, p)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)


def test_several_losses_before_one_backward(device):
    """Gradient accumulation without a backward in between: each loss keeps its own gradients."""
    banks = [filled_bank(device), filled_bank(device)]
    torch.manual_seed(1)
    weight = torch.randn(3, 3, dtype=torch.float64, device=device)
    data = [batch(device, n) for n in (4, 2, 9, 1)]
    results = []
    for function, bank in ((ca.contaccum_loss, banks[0]), (reference.contaccum_loss, banks[1])):
        w = weight.clone().requires_grad_()
        losses = [function(q @ w, p @ w, bank, 0.7) for q, p, _ in data]
        torch.stack(losses).mean().backward()
        results.append(w.grad)
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)


def test_the_upstream_factor_multiplies(device):
    bank = filled_bank(device)
    q, p = leaves(device)

    def gradients(factor):
        loss = ca.contaccum_loss(q, p, bank, enqueue=False)
        return torch.autograd.grad(factor(loss), (q, p))

    plain = gradients(lambda loss: loss)
    for got, wanted in zip(gradients(lambda loss: 3 * loss), plain, strict=True):
        assert torch.equal(got, 3 * wanted)
    for got, wanted in zip(gradients(lambda loss: loss - 2 * loss), plain, strict=True):
        assert torch.equal(got, -wanted)


@pytest.mark.parametrize("which", [0, 1])
def test_only_one_input_requires_grad(device, which):
    bank = filled_bank(device)
    both = leaves(device)
    expected = torch.autograd.grad(ca.contaccum_loss(*both, bank, enqueue=False), both)
    inputs = [x.detach() for x in both]
    inputs[which].requires_grad_()
    ca.contaccum_loss(*inputs, bank, enqueue=False).backward()
    assert torch.equal(inputs[which].grad, expected[which])
    assert inputs[1 - which].grad is None


def raw_call(bank: ca.DualMemoryBank, q: Tensor, p: Tensor, with_grad: bool):
    y = bank.layout
    return torch.ops.contaccum_ext.banked_loss_(
        q,
        p,
        None,
        None,
        *bank.buffers_in_order(),
        [y.group, y.offset_block, y.block],
        1.0,
        -1,
        False,
        True,
        True,
        False,
        -1.0,
        with_grad,
        False,
        False,
        0,
    )


def test_without_grad_no_gradients_are_computed(device):
    """And the loss is the same to the bit."""
    bank = filled_bank(device)
    q, p, _ = batch(device)
    with_grad, without = raw_call(bank, q, p, True), raw_call(bank, q, p, False)
    assert [x.shape for x in with_grad] == [(), (4, 3), (4, 2, 3), (0,)]
    assert [x.shape for x in without] == [(), (0, 3), (0, 2, 3), (0,)]
    assert torch.equal(with_grad[0], without[0])


def test_no_grad_gives_a_loss_without_history_and_still_enqueues(device):
    bank = filled_bank(device)
    q, p = leaves(device)
    expected = ca.contaccum_loss(q, p, bank, enqueue=False)
    with torch.no_grad():
        loss = ca.contaccum_loss(q, p, bank)
    assert expected.requires_grad and not loss.requires_grad and loss.grad_fn is None
    assert torch.equal(loss, expected)
    assert torch.equal(bank.queries()[-4:], q)
    assert not any(buffer.requires_grad for buffer in bank.buffers())


def test_inputs_that_need_no_grad_give_a_loss_that_needs_none(device):
    q, p, _ = batch(device)
    assert not ca.contaccum_loss(q, p, filled_bank(device)).requires_grad


@pytest.mark.parametrize("enqueue", [True, False])
def test_the_version_counters_show_the_mutation(device, enqueue):
    """A banked tensor saved for a backward is noticed when the op has overwritten it."""
    bank = filled_bank(device)
    buffers = [buffer for buffer in bank.buffers() if buffer is not bank.centering]
    versions = [buffer._version for buffer in buffers]
    weight = torch.ones_like(bank.bank_queries, requires_grad=True)
    product = (bank.bank_queries * weight).sum()
    ca.contaccum_loss(*leaves(device), bank, enqueue=enqueue)
    assert all(b._version > v for b, v in zip(buffers, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


class TestSecondDerivativesAreRefused:
    """Silence would be the fault: the gradients saved by the forward pass look like constants."""

    MESSAGE = "contaccum_loss: expected to be differentiated once"

    def gradients(self, device):
        q, p = leaves(device)
        loss = ca.contaccum_loss(q, p, filled_bank(device))
        return q, p, torch.autograd.grad(loss, (q, p), create_graph=True)

    def test_first_derivatives_with_create_graph_are_right(self, device):
        q, p, created = self.gradients(device)
        loss = ca.contaccum_loss(q, p, filled_bank(device), enqueue=False)
        for got, wanted in zip(created, torch.autograd.grad(loss, (q, p)), strict=True):
            assert torch.equal(got, wanted)

    def test_backward_through_a_gradient(self, device):
        _, _, (dq, dp) = self.gradients(device)
        for gradient in (dq, dp):
            with pytest.raises(RuntimeError, match=self.MESSAGE):
                gradient.pow(2).sum().backward()

    def test_backward_after_backward_with_create_graph(self, device):
        q, p = leaves(device)
        ca.contaccum_loss(q, p, filled_bank(device)).backward(create_graph=True)
        with pytest.raises(RuntimeError, match=self.MESSAGE):
            q.grad.sum().backward()

    def test_gradient_of_a_gradient(self, device):
        q, _, (dq, _) = self.gradients(device)
        with pytest.raises(RuntimeError, match=self.MESSAGE):
            torch.autograd.grad(dq.sum(), q)

    def test_gradient_penalty_beside_another_term(self, device):
        """The other term reaches q, so that autograd has no reason of its own to complain."""
        q, _, (dq, _) = self.gradients(device)
        with pytest.raises(RuntimeError, match=self.MESSAGE):
            torch.autograd.grad(dq.pow(2).sum() + q.pow(2).sum(), q)
