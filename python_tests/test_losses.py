"""ContAccumLoss: the function with a bank of its own, which eval mode leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from test_op_refusals import assert_same_state, state

import contaccum_ext as ca

OPTIONS = [
    {},
    {"temperature": 0.05, "row_weighting": "all"},
    {"drift": "mean", "dtype": torch.bfloat16},
]


def batches(device, count: int, m: int = 2, d: int = 6):
    torch.manual_seed(0)
    for step in range(count):
        n = 1 + step % 4
        q = torch.randn(n, d, device=device, requires_grad=True)
        p = torch.randn(n, m, d, device=device, requires_grad=True)
        yield q, p, torch.randint(0, 9, (n, m), device=device)


def test_two_losses_with_a_learned_temperature_may_be_summed(device):
    """A scale above the largest is brought back by the first; the second changes nothing."""
    summed, apart = (
        ca.ContAccumLoss(7, 6, 2, temperature=0.05, learn_temperature=True, device=device)
        for _ in range(2)
    )
    steps = list(batches(device, 4))
    for loss_fn in (summed, apart):
        with torch.no_grad():
            loss_fn.learned.log_scale.fill_(9.0)
    sum(summed(q, p) for q, p, _ in steps).backward()
    for q, p, _ in steps:
        apart(q, p).backward()
    assert summed.temperature == pytest.approx(0.01)
    found = summed.learned.log_scale.grad
    torch.testing.assert_close(found, apart.learned.log_scale.grad)
    assert found != 0


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_training_equals_the_function(device, options, ids):
    loss_fn = ca.ContAccumLoss(7, 6, 2, device=device, **options).train()
    dtype, drift = options.get("dtype", torch.float32), options.get("drift", "none")
    bank = ca.DualMemoryBank(7, 6, 2, dtype, device, drift)
    weighting, tau = options.get("row_weighting", "local"), options.get("temperature", 1.0)
    for q, p, given in batches(device, 8):
        given = given if ids else None
        got = loss_fn(q, p, given)
        expected = ca.contaccum_loss(q, p, bank, tau, given, weighting)
        assert torch.equal(got, expected)
        for a, b in zip(*(torch.autograd.grad(x, (q, p)) for x in (got, expected)), strict=True):
            assert torch.equal(a, b)
    assert_same_state(loss_fn.bank, state(bank))


@pytest.mark.parametrize("options", OPTIONS)
def test_evaluation_neither_reads_nor_writes_the_bank(device, options):
    loss_fn = ca.ContAccumLoss(7, 6, 2, device=device, **options)
    empty = ca.ContAccumLoss(7, 6, 2, device=device, **options).eval()
    for q, p, _ in batches(device, 5):
        loss_fn.train()(q, p)
    before = state(loss_fn.bank)
    versions = [buffer._version for buffer in loss_fn.buffers()]
    for q, p, ids in batches(device, 5):
        for given in (None, ids):  # ids or none, whatever the bank has
            loss = loss_fn.eval()(q, p, given)
            assert torch.equal(loss, empty(q, p, given))  # the same for any bank: not read
            weighting = options.get("row_weighting", "local")
            tau = options.get("temperature", 1.0)
            assert torch.equal(loss, ca.contaccum_loss(q, p, None, tau, given, weighting))
    assert_same_state(loss_fn.bank, before)
    assert versions == [buffer._version for buffer in loss_fn.buffers()]


def test_evaluation_between_steps_changes_no_step(device):
    plain, disturbed = (ca.ContAccumLoss(7, 6, 2, device=device) for _ in range(2))
    for (q, p, _), (other_q, other_p, _) in zip(
        batches(device, 8), reversed(list(batches(device, 8))), strict=True
    ):
        with torch.no_grad():
            disturbed.eval()(other_q, other_p)
        assert torch.equal(disturbed.train()(q, p), plain(q, p))


def test_state_dict_round_trip(device):
    source = ca.ContAccumLoss(7, 6, 2, device=device, drift="mean")
    target = ca.ContAccumLoss(7, 6, 2, device=device, drift="mean")
    steps = list(batches(device, 8))
    for q, p, _ in steps[:4]:
        source(q, p)
    assert all(key.startswith("bank.") for key in source.state_dict())
    target.load_state_dict(source.state_dict())
    for q, p, _ in steps[4:]:
        assert torch.equal(target(q, p), source(q, p))
    assert_same_state(target.bank, state(source.bank))


def test_it_has_no_parameters_and_its_bank_moves_with_it(device):
    loss_fn = ca.ContAccumLoss(7, 6, device=device)
    assert not list(loss_fn.parameters())
    assert loss_fn.bank.capacity == 7 and loss_fn.bank.dim == 6
    assert loss_fn.half().bank.dtype == torch.float16
    assert isinstance(loss_fn.bank.block_lse, torch.Tensor)
    assert loss_fn.bank.block_lse.dtype == torch.float32


class TestLearnedTemperature:
    def learning(self, device, **options):
        options = {"temperature": 0.05, "device": device, "learn_temperature": True, **options}
        return ca.ContAccumLoss(7, 6, 2, **options)

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_training_equals_the_function(self, device, symmetric):
        """With the gradient of the logarithm of the scale, by the chain rule."""
        loss_fn = self.learning(device, symmetric=symmetric)
        kinds = {"learn_temperature": True, "symmetric": symmetric}
        bank = ca.DualMemoryBank(7, 6, 2, device=device, **kinds)
        (log_scale,) = loss_fn.parameters()
        optimizer = torch.optim.SGD([log_scale], 0.01)
        for q, p, _ in batches(device, 8):
            tau = torch.exp(-log_scale.detach()).requires_grad_()
            assert loss_fn.temperature == tau.item()
            expected = ca.contaccum_loss(q, p, bank, tau, symmetric=symmetric)
            got = loss_fn(q, p)
            assert torch.equal(got, expected)
            optimizer.zero_grad()
            got.backward()
            expected.backward()
            torch.testing.assert_close(log_scale.grad, -tau.grad * tau.detach())
            optimizer.step()
        assert_same_state(loss_fn.bank, state(bank))

    def test_evaluation_has_the_learned_temperature_and_no_bank(self, device):
        loss_fn = self.learning(device).eval()
        q, p, _ = next(batches(device, 1))
        expected = ca.contaccum_loss(q, p, None, loss_fn.temperature)
        assert torch.equal(loss_fn(q, p), expected)
        assert len(loss_fn.bank) == 0

    def test_the_scale_stays_below_its_maximum_and_comes_back(self, device):
        loss_fn = self.learning(device, max_scale=21.0)
        with torch.no_grad():
            loss_fn.learned.log_scale.add_(1.0)
        assert loss_fn.temperature == pytest.approx(1 / 21)
        *_, (q, p, _) = batches(device, 4)
        loss_fn(0.1 * q, 0.1 * p).backward()
        assert loss_fn.learned.log_scale.item() == pytest.approx(math.log(21))
        assert loss_fn.learned.log_scale.grad.abs() > 0  # it is not stuck there

    def test_the_temperature_can_be_set(self, device):
        for loss_fn in (self.learning(device), ca.ContAccumLoss(7, 6, device=device)):
            loss_fn.temperature = 0.5
            assert loss_fn.temperature == pytest.approx(0.5)

    def test_its_state_and_its_device_are_the_modules(self, device):
        source, target = self.learning(device), self.learning(device, temperature=0.1)
        assert "learned.log_scale" in source.state_dict()
        target.load_state_dict(source.state_dict())
        assert target.temperature == source.temperature
        assert "learned" in repr(source)

    @pytest.mark.parametrize("temperature", [0.0, 0.005, -1.0])
    def test_a_temperature_out_of_range_is_refused(self, temperature):
        with pytest.raises(ValueError, match="temperature"):
            self.learning("cpu", temperature=temperature)


def test_the_symmetric_loss_equals_the_function(device):
    loss_fn = ca.ContAccumLoss(7, 6, 2, device=device, symmetric=True, drift="mean")
    bank = ca.DualMemoryBank(7, 6, 2, device=device, symmetric=True, drift="mean")
    for q, p, ids in batches(device, 8):
        expected = ca.contaccum_loss(q, p, bank, 1.0, ids, symmetric=True)
        assert torch.equal(loss_fn(q, p, ids), expected)
        alone = ca.contaccum_loss(q, p, None, 1.0, ids, symmetric=True)
        assert torch.equal(loss_fn.eval()(q, p, ids), alone)
        loss_fn.train()
    assert_same_state(loss_fn.bank, state(bank))
    assert "symmetric=True" in repr(loss_fn)


@pytest.mark.parametrize("name", ["capacity", "dim", "passages_per_query"])
def test_bad_sizes_are_refused(name):
    with pytest.raises(ValueError, match=name):
        ca.ContAccumLoss(**{"capacity": 4, "dim": 4, "passages_per_query": 1, name: 0})
