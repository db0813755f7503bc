"""Mixed precision: towers under autocast, loss scaling, and steps that loss scaling skips."""

from __future__ import annotations

import math

import pytest
import torch
from strategies import Setup, Step
from test_op_refusals import assert_same_state, state
from tolerances import Kernels, Sizes, bounds
from torch import nn
from twins import Twins

import contaccum_ext as ca
from contaccum_ext import reference

CAPACITY, D, M, N, FEATURES, TAU = 37, 16, 2, 6, 8, 0.5
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HALVES = [BF16, F16]


class Amp:
    """A tower that keeps float32 weights, a bank, and steps as mixed-precision training has them.

    Weights, data and optimizer are the same for every instance.
    """

    def __init__(self, device, dtype, stored=F32, loss_scale=1024.0):
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        self.tower = nn.Linear(FEATURES, D, bias=False, device=device)
        self.bank = ca.DualMemoryBank(CAPACITY, D, M, stored, device, "mean")
        self.optimizer = torch.optim.SGD(self.tower.parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler(device, init_scale=loss_scale)
        self.generator = torch.Generator().manual_seed(1)

    def batch(self):
        x = torch.randn(N, FEATURES, generator=self.generator)
        y = torch.randn(N, M, FEATURES, generator=self.generator)
        return x.to(self.device), y.to(self.device)

    def encode(self, x, y):
        with torch.autocast(self.device, self.dtype):
            return self.tower(x), self.tower(y)

    def step(self, *batches):
        """Micro-batches, one update; their losses."""
        self.optimizer.zero_grad()
        losses = []
        for x, y in batches:
            loss = ca.contaccum_loss(*self.encode(x, y), self.bank, TAU)
            self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return losses

    @property
    def weight(self):
        return self.tower.weight.detach().clone()


def assert_no_nan(bank) -> None:
    for name, buffer in bank.named_buffers():
        assert not buffer.isnan().any(), name


@pytest.mark.parametrize("stored", [F32, BF16, F16])
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_around_the_loss_changes_nothing(device, dtype, stored):
    inside, outside = Amp(device, dtype, stored), Amp(device, dtype, stored)
    for _ in range(10):  # a lap and a half
        with torch.autocast(device, dtype):
            x, y = inside.batch()
            first = ca.contaccum_loss(inside.tower(x), inside.tower(y), inside.bank, TAU)
        q, p = outside.encode(*outside.batch())
        second = ca.contaccum_loss(q, p, outside.bank, TAU)
        assert q.dtype == p.dtype == dtype
        assert first.dtype == second.dtype == torch.float32
        gradients = [
            torch.autograd.grad(loss, amp.tower.weight)[0]
            for amp, loss in ((inside, first), (outside, second))
        ]
        assert gradients[0].dtype == torch.float32 and gradients[0].abs().max() > 0
        assert torch.equal(first, second) and torch.equal(*gradients)
    assert_same_state(inside.bank, state(outside.bank))


class TowerTwins(Twins):
    """Batches are what a linear layer makes under autocast."""

    def __init__(self, setup, device):
        super().__init__(setup, device)
        torch.manual_seed(setup.seed)
        self.tower = nn.Linear(FEATURES, setup.d, bias=False, device=device)

    def draw_batch(self, n):
        s = self.setup
        self.largest_batch = max(self.largest_batch, n)
        self.x = torch.randn(n, FEATURES, generator=self.generator).to(self.device)
        self.y = torch.randn(n, s.m, FEATURES, generator=self.generator).to(self.device)
        with torch.autocast(self.device, s.input_dtype):
            q, p = self.tower(self.x), self.tower(self.y)
        return self.measured(q), self.measured(p), None


@pytest.mark.parametrize("stored", [F32, BF16, F16])
@pytest.mark.parametrize("dtype", HALVES)
def test_weights_get_the_gradients_of_the_oracle(device, dtype, stored):
    twins = TowerTwins(Setup(CAPACITY, D, M, None, stored, dtype, "mean"), device)
    for n in (N, 20, 3, 17, N):  # loss, dq, dp and the bank against the oracle
        twins.run(Step("loss", n))
    q, p, _ = twins.draw_batch(N)
    weight = twins.tower.weight
    loss = ca.contaccum_loss(q, p, twins.bank, twins.tau, enqueue=False)
    dq, dp, ours = torch.autograd.grad(loss, (q, p, weight), retain_graph=True)
    (through,) = torch.autograd.grad((q, p), weight, (dq, dp), retain_graph=True)
    assert torch.equal(ours, through)

    exact = [v.detach().double().requires_grad_() for v in (q, p)]
    float64 = reference.contaccum_loss(
        *exact, twins.bank, twins.tau, enqueue=False, compute_dtype=torch.float64
    )
    exact_dq, exact_dp = torch.autograd.grad(float64, exact)
    x, y = (v.to(dtype).double().flatten(0, -2) for v in (twins.x, twins.y))
    wanted = exact_dq.T @ x + exact_dp.flatten(0, 1).T @ y
    # Carried through the layer: |x| |error of dq|. Then what the layer itself rounds to its dtype:
    # two products, the sum of both, and a partial sum where the library splits a product.
    u, tiny = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal * math.sqrt(D)
    carried = (
        x.norm() * (dq.double() - exact_dq).norm() + y.norm() * (dp.double() - exact_dp).norm()
    )
    rounded = 4 * u * (x.norm() * dq.double().norm() + y.norm() * dp.double().norm()) + 4 * tiny
    assert (ours.double() - wanted).norm() <= carried + rounded
    assert rounded + carried < wanted.norm() / 4  # so that the bound says something


@pytest.mark.parametrize("dtype", [F32, *HALVES])
def test_a_scaled_loss_has_scaled_gradients(device, dtype):
    torch.manual_seed(0)
    bank = ca.DualMemoryBank(CAPACITY, D, M, dtype, device)
    scaler = torch.amp.GradScaler(device, init_scale=256.0)
    q, p = torch.randn(N, D), torch.randn(N, M, D)
    q, p = (v.to(device, dtype).requires_grad_() for v in (q, p))
    ca.contaccum_loss(q, p, bank, TAU)
    plain, scaled = (
        torch.autograd.grad(factor(ca.contaccum_loss(q, p, bank, TAU, enqueue=False)), (q, p))
        for factor in (lambda loss: loss, scaler.scale)
    )
    kind = torch.finfo(dtype)
    for a, b in zip(scaled, plain, strict=True):
        assert a.dtype == b.dtype == dtype and a.isfinite().all()
        # A power of two rounds nothing, except where the unscaled gradient is subnormal.
        error = (a.double() / 256 - b.double()).abs()
        normal = b.abs() > kind.smallest_normal
        assert torch.equal(a[normal], 256 * b[normal])
        assert error.max() <= kind.smallest_normal * kind.eps


@pytest.mark.parametrize("factor", [1 / 3, 65536.0])
@pytest.mark.parametrize("stored", [F32, *HALVES])
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_are_rounded_once_after_the_factor(device, dtype, stored, factor):
    """The same representations as float32 have float32 gradients: those, scaled, then rounded.

    A third in bfloat16 would be 0.2% too much for every component alike, and 65536 in float16
    infinite.
    """
    torch.manual_seed(0)
    bank = ca.DualMemoryBank(CAPACITY, D, M, stored, device)
    q, p = (torch.randn(64, *shape).to(device, dtype) for shape in ((D,), (M, D)))
    bank.enqueue(q[:20], p[:20])
    scaled = []
    for given in (dtype, F32):
        leaves = [x.to(given, copy=True).requires_grad_() for x in (q, p)]
        loss = ca.contaccum_loss(*leaves, bank, TAU, enqueue=False)
        scaled.append(torch.autograd.grad(loss * (factor if given == dtype else 1), leaves))
    for once, wide in zip(*scaled, strict=True):
        assert once.dtype == dtype and wide.dtype == F32 and wide.abs().max() > 0
        assert torch.equal(once, (wide * torch.tensor(factor, device=device)).to(dtype))


@pytest.mark.parametrize("stored", [F32, F16])
def test_loss_scaling_saves_gradients_that_float16_cannot_hold(device, stored):
    """Rounded before the factor, they would be zeros; the factor in float16 would be infinite."""
    n, height, factor = 8, 4.5, 65536.0  # the scale that torch.amp.GradScaler starts with
    q = (height * torch.eye(n, D)).to(device, F16).requires_grad_()
    p = q.detach()[:, None].clone().requires_grad_()
    bank = ca.DualMemoryBank(CAPACITY, D, 1, stored, device)
    plain = torch.autograd.grad(ca.contaccum_loss(q, p, bank, enqueue=False), (q, p))
    scaled = torch.autograd.grad(factor * ca.contaccum_loss(q, p, bank), (q, p))
    exact = height * math.exp(-(height**2)) / n  # w P_ij times the component of vector j
    assert exact < torch.finfo(F16).smallest_normal * torch.finfo(F16).eps / 2
    tol = bounds(Sizes(n, 1, D, 0, 1.0, height, height, 1 / n), stored, Kernels(device))
    off_diagonal = ~torch.eye(n, dtype=torch.bool)
    u, subnormal = 2**-11, 2**-25
    for vanished, kept in zip(plain, scaled, strict=True):
        kept, vanished = (v.reshape(n, D)[:, :n].cpu().double() for v in (kept, vanished))
        assert (vanished[off_diagonal] == 0).all()
        # The bound on dq is for a mass of 1 on the columns; here it is P_ij.
        error = (kept[off_diagonal] / factor - exact).abs()
        allowed = math.exp(-(height**2)) * tol.dq + u * exact + subnormal / factor
        assert error.max() <= allowed < exact / 100


# What is wrong with one number that the tower gets; 1e6 is finite, its representation is not.
FAULTS = [(BF16, math.nan), (BF16, math.inf), (F16, math.nan), (F16, -math.inf), (F16, 1e6)]


@pytest.mark.parametrize(("dtype", "value"), FAULTS)
def test_a_skipped_step_leaves_no_trace(device, dtype, value):
    trained, undisturbed = Amp(device, dtype), Amp(device, dtype)
    for _ in range(8):
        trained.step(trained.batch())
        undisturbed.step(undisturbed.batch())
    x, y = trained.batch()
    undisturbed.batch()
    x[1, 2] = value
    before, weight, scale = state(trained.bank), trained.weight, trained.scaler.get_scale()
    (loss,) = trained.step((x, y))
    assert loss.isnan()
    assert not trained.tower.weight.grad.isfinite().any()
    assert trained.scaler.get_scale() == scale / 2
    assert torch.equal(trained.weight, weight)
    assert_same_state(trained.bank, before)
    assert_no_nan(trained.bank)
    trained.scaler.update(scale)
    for _ in range(8):
        (loss,), (expected,) = (amp.step(amp.batch()) for amp in (trained, undisturbed))
        assert loss.isfinite() and torch.equal(loss, expected)
    assert trained.scaler.get_scale() == scale
    assert torch.equal(trained.weight, undisturbed.weight)
    assert not torch.equal(trained.weight, weight)
    assert_same_state(trained.bank, state(undisturbed.bank))


@pytest.mark.parametrize(("dtype", "value"), FAULTS)
def test_one_bad_micro_batch_of_several(device, dtype, value):
    """The step is skipped for all of them; the good ones are in the bank."""
    amp = Amp(device, dtype)
    amp.step(amp.batch())
    batches = [amp.batch() for _ in range(3)]
    batches[1][1][0, 1, 3] = value  # in a hard negative
    weight, scale = amp.weight, amp.scaler.get_scale()
    good = [amp.encode(*batches[i])[0].detach().float() for i in (0, 2)]
    losses = amp.step(*batches)
    assert [bool(loss.isnan()) for loss in losses] == [False, True, False]
    assert torch.equal(amp.weight, weight) and amp.scaler.get_scale() == scale / 2
    assert len(amp.bank) == 3 * N
    assert torch.equal(amp.bank.queries()[N:], torch.cat(good))
    assert_no_nan(amp.bank)
    assert amp.step(amp.batch())[0].isfinite()
    assert not torch.equal(amp.weight, weight)


def test_gradients_that_overflow_do_not_keep_the_batch_out_of_the_bank(device):
    """Its representations were finite; only the scaled gradients were not, and the step is skipped.

    The bank cannot know: it is filled in the forward pass.
    """
    amp = Amp(device, F16)
    amp.step(amp.batch())
    amp.scaler.update(2.0**40)
    weight, batch = amp.weight, amp.batch()
    q, p = (v.detach().float() for v in amp.encode(*batch))
    (loss,) = amp.step(batch)
    assert loss.isfinite() and not amp.tower.weight.grad.isfinite().all()
    assert torch.equal(amp.weight, weight) and amp.scaler.get_scale() == 2.0**39
    assert len(amp.bank) == 2 * N
    assert torch.equal(amp.bank.queries()[N:], q) and torch.equal(amp.bank.passages()[N:], p)
    assert_no_nan(amp.bank)
    amp.scaler.update(256.0)
    assert amp.step(amp.batch())[0].isfinite()
    assert not torch.equal(amp.weight, weight) and amp.weight.isfinite().all()
