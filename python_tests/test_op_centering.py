"""Centered gradients: those of columns sum to zero over an update, as an in-batch loss's do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_op_gradients import VARIANTS, filled_bank, leaves, variant
from test_op_refusals import assert_same_state, state
from torch import Tensor

import contaccum_ext as ca
from contaccum_ext import ops, reference
from contaccum_ext.training.positive_bank import positive_bank_loss

CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


class Riding:
    """A bank whose passages go where the mean of the batch goes; their values are the same."""

    def __init__(self, bank: ca.DualMemoryBank, columns: Tensor) -> None:
        self.bank, mean = bank, columns.mean((0, 1))
        self.ride = mean - mean.detach()

    def __getattr__(self, name: str):
        return getattr(self.bank, name)

    def __len__(self) -> int:
        return len(self.bank)

    def passages(self) -> Tensor:
        return self.bank.passages() + self.ride


@pytest.mark.parametrize("name", VARIANTS)
def test_one_batch_alone_is_the_gradient_of_a_bank_that_follows_its_mean(device, name):
    """Exactly that, where banked vectors are the same for all rows: without offsets."""
    bank, m, given, options = variant(name, device)
    q, p = leaves(device, 4, m)

    plain = ca.contaccum_loss(q, p, bank, 0.7, given, **options)
    ours = ca.contaccum_loss(q, p, bank, 0.7, given, center_over=1, **options)

    assert torch.equal(ours, plain)
    wanted, got = gradients(plain, [q, p]), gradients(ours, [q, p])
    moved = (wanted[1] - got[1]).abs().max()
    wanted[1] = wanted[1] - wanted[1].mean((0, 1))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    if not bank.use_offsets:
        exact = reference.contaccum_loss(q, p, Riding(bank, p), 0.7, given, **options)
        torch.testing.assert_close(gradients(exact, [p]), got[1:], **CLOSE)
    assert moved < 1e-12 if len(bank) == 0 else moved > 1e-4


@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 9, 3), (5,)])
def test_gradients_of_an_update_sum_to_zero(device, sizes):
    """Whatever the sizes; a batch's differ from the exact ones by the same vector in each row."""
    bank, twin = filled_bank(device), filled_bank(device)
    torch.manual_seed(3)
    for _ in range(3):  # updates
        total = torch.zeros(3, dtype=torch.float64, device=device)
        for count, n in enumerate(sizes):
            q, p = leaves(device, n)
            loss = ca.contaccum_loss(q, p, bank, 0.7, center_over=len(sizes))
            exact = ca.contaccum_loss(q, p, twin, 0.7)
            found, plain = gradients(loss, [q, p]), gradients(exact, [q, p])
            assert torch.equal(found[0], plain[0])
            taken = (plain[1] - found[1]).flatten(0, 1)
            torch.testing.assert_close(taken, taken[:1].expand_as(taken), **CLOSE)
            total += found[1].sum((0, 1))
            assert (bank.centering[1] == (count + 1) % len(sizes)).all()
        assert total.abs().max() < 1e-12
        assert bank.centering[0].abs().max() < 1e-13


def test_what_a_batch_owes_is_spread_over_those_that_are_left(device):
    bank = filled_bank(device)
    torch.manual_seed(3)
    owed = torch.zeros(3, dtype=torch.float64, device=device)
    for left in (3, 2, 1):
        q, p = leaves(device)
        exact = reference.contaccum_loss(q, p, bank, 0.7, enqueue=False)
        (plain,) = gradients(exact, [p])
        owed = owed + plain.sum((0, 1))
        (got,) = gradients(ca.contaccum_loss(q, p, bank, 0.7, center_over=3), [p])
        torch.testing.assert_close(plain - got, (owed / left / 8).expand_as(got), **CLOSE)
        owed = owed - owed / left


def test_an_update_begins_anew_when_told(device):
    bank = filled_bank(device, symmetric=True)
    for forget in (bank.begin_update, bank.clear):
        ca.contaccum_loss(*leaves(device), bank, 0.7, symmetric=True, center_over=4)
        assert bank.centering.abs().min() > 0 and bank.mirror.centering.abs().min() > 0
        forget()
        assert not bank.centering.any() and not bank.mirror.centering.any()


def test_fewer_batches_than_before(device):
    """Another K in the middle of an update: nothing is divided by zero, and it ends."""
    bank = filled_bank(device)
    for over in (5, 5, 5, 2, 1):
        q, p = leaves(device)
        (got,) = gradients(ca.contaccum_loss(q, p, bank, 0.7, center_over=over), [p])
        assert got.isfinite().all()
    assert not bank.centering.any()


def test_both_directions_of_a_symmetric_loss(device):
    bank = filled_bank(device, symmetric=True)
    q, p = leaves(device)
    options = {"symmetric": True, "center_over": 1}
    exact = reference.contaccum_loss(q, p, bank, 0.7, enqueue=False, **options)
    ours = ca.contaccum_loss(q, p, bank, 0.7, **options)
    for a, b in zip(gradients(ours, [q, p]), gradients(exact, [q, p]), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_a_failing_symmetric_loss_leaves_both_halves_as_they_were(device, monkeypatch):
    bank = filled_bank(device, symmetric=True)
    options = {"symmetric": True, "center_over": 3}
    ca.contaccum_loss(*leaves(device), bank, 0.7, **options)
    before, calls = state(bank), []
    run = ops.banked_loss_

    def second_fails(*arguments):
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return run(*arguments)

    monkeypatch.setattr(ops, "banked_loss_", second_fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        ca.contaccum_loss(*leaves(device), bank, 0.7, **options)
    after = state(bank)
    for name in ("centering", "mirror.centering"):
        assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("quiet", ["enqueue", "no_grad"])
def test_what_is_no_part_of_an_update_is_not_counted(device, quiet):
    bank = filled_bank(device)
    ca.contaccum_loss(*leaves(device), bank, 0.7, center_over=3)
    before = bank.centering.clone()
    if quiet == "enqueue":
        ca.contaccum_loss(*leaves(device), bank, 0.7, enqueue=False, center_over=3)
    else:
        with torch.no_grad():
            ca.contaccum_loss(*leaves(device), bank, 0.7, center_over=3)
    assert torch.equal(bank.centering, before)


@pytest.mark.parametrize("of_queries", [True, False])
def test_a_refused_batch_is_not_counted(device, of_queries):
    bank = filled_bank(device)
    ca.contaccum_loss(*leaves(device), bank, 0.7, center_over=3)
    before = state(bank)
    q, p = leaves(device)
    with torch.no_grad():
        (q if of_queries else p).view(-1)[1] = float("nan")
    loss = ca.contaccum_loss(q, p, bank, 0.7, center_over=3)
    assert loss.isnan() and all(x.isnan().all() for x in gradients(loss, [q, p]))
    assert_same_state(bank, before)


def test_a_saved_bank_goes_on_in_the_middle_of_an_update(device):
    bank = filled_bank(device)
    ca.contaccum_loss(*leaves(device), bank, 0.7, center_over=3)
    again = ca.DualMemoryBank(8, 3, 2, torch.float64, device, layout=bank.layout)
    again.load_state_dict(bank.state_dict())
    q, p = leaves(device)
    pair = [ca.contaccum_loss(q, p, b, 0.7, center_over=3) for b in (bank, again)]
    for a, b in zip(*(gradients(loss, [q, p]) for loss in pair), strict=True):
        assert torch.equal(a, b)


def test_a_bank_saved_before_there_was_centering_loads(device):
    bank = filled_bank(device, symmetric=True)
    old = {k: v for k, v in bank.state_dict().items() if not k.endswith("centering")}
    again = ca.DualMemoryBank(8, 3, 2, torch.float64, device, layout=bank.layout, symmetric=True)
    ca.contaccum_loss(*leaves(device), again, 0.7, symmetric=True, center_over=3)
    again.load_state_dict(old)
    assert_same_state(again, state(bank))


@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 2, 31), (700, 3, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operator(device, shape, dtype):
    torch.manual_seed(0)
    given = torch.randn(*shape, dtype=dtype, device=device)
    owed = torch.randn(2, shape[2], dtype=dtype, device=device)
    owed[1] = 2
    for keep in (False, True):
        got, left = given.clone(), owed.clone()
        ops.center_gradients_(got, left, 5, keep)
        total = owed[0].double() + given.double().sum((0, 1))
        rows = shape[0] * shape[1]
        u = torch.finfo(dtype).eps / 2
        # A sum of rows + 4 terms, whose roundings add up as independent ones; see tolerances.py.
        error = 6 * (rows + 4) ** 0.5 * u * (owed[0].abs() + given.abs().sum((0, 1))).double()
        exact = given.double() - total / 3 / rows
        assert ((got.double() - exact).abs() <= error / rows + u * (exact.abs() + 1)).all()
        if keep:
            assert ((left[0].double() - total * 2 / 3).abs() <= 2 * error).all()
            assert (left[1] == 3).all()
        else:
            assert torch.equal(left, owed)


@pytest.mark.parametrize("over", [0, -1, 1.0, True, "4"])
def test_a_wrong_number_is_refused_before_anything_is_written(device, over):
    bank = filled_bank(device)
    before = state(bank)
    kind = ValueError if type(over) is int else TypeError
    with pytest.raises(kind, match="center_over: expected"):
        ca.contaccum_loss(*leaves(device), bank, 0.7, center_over=over)
    assert_same_state(bank, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradients": torch.zeros(2, 3)}, r"gradients: expected shape \(n, m, d\)"),
        ({"gradients": torch.zeros(2, 1, 3).half()}, "gradients: expected dtype float32"),
        ({"gradients": torch.zeros(0, 1, 3)}, "gradients: expected a contiguous tensor with rows"),
        ({"gradients": torch.zeros(2, 3, 4).mT}, "gradients: expected a contiguous tensor"),
        ({"state": torch.zeros(2, 4)}, "state: expected"),
        ({"state": torch.zeros(2, 3).double()}, "state: expected dtype float32"),
        ({"over": 0}, "over: expected at least 1, got 0"),
    ],
)
def test_the_operator_refuses(change, message):
    good = {"gradients": torch.zeros(2, 1, 3), "state": torch.zeros(2, 3), "over": 1, "keep": True}
    with pytest.raises(RuntimeError, match=message):
        ops.center_gradients_(*(good | change).values())


def test_opcheck():
    arguments = (torch.randn(2, 3, 4), torch.zeros(2, 4), 3, True)
    done = torch.library.opcheck(torch.ops.contaccum_ext.center_gradients_.default, arguments)
    assert set(done.values()) == {"SUCCESS"} and len(done) == 4, done


def test_hard_negatives_that_are_not_banked(device):
    """The ablation in plain PyTorch: centered on the way back, in units of what comes."""
    bank = filled_bank(device, m=1)
    sums = []
    for _ in range(2):
        q, p = leaves(device, 4, 3)
        loss = positive_bank_loss(q, p, bank, 0.7, None, center_over=2)
        (got,) = gradients(loss / 2, [p])
        sums.append(got.sum((0, 1)))
    assert sums[0].abs().max() > 1e-4
    assert (sums[0] + sums[1]).abs().max() < 1e-12


def test_the_module_hands_it_on(device):
    loss = ca.ContAccumLoss(8, 3, 2, dtype=torch.float64, device=device, center_over=2)
    assert "center_over=2" in repr(loss)
    for count in (1, 0):
        loss(*leaves(device)).backward()
        assert (loss.bank.centering[1] == count).all()


def test_the_reference_bank_has_both_halves():
    bank = reference.DualMemoryBank(4, 3, dtype=torch.float64)
    assert isinstance(bank.mirror, SimpleNamespace)
    q, p = (torch.randn(2, *s, 3, dtype=torch.float64, requires_grad=True) for s in ((), (1,)))
    for _ in range(2):
        reference.contaccum_loss(q, p, bank, center_over=3, symmetric=True)
    assert (bank.centering[1] == 2).all() and bank.mirror.centering[0].any()
    bank.begin_update()
    assert not bank.centering.any() and not bank.mirror.centering.any()
