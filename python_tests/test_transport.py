"""A bank is moved along with its encoders: what transport computes, and that the loss follows."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

import contaccum_ext as ca
from contaccum_ext import reference
from contaccum_ext.displacement import Displacement

D, M, CAPACITY = 8, 2, 21
F64 = torch.float64
LAYOUT = ca.BankLayout(1, 4, 8)  # several means, and head within the slots of one
DRIFTS = pytest.mark.parametrize("drift", ["none", "mean"])


def vectors(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, D, generator=generator, dtype=F64), dim=-1).to(dtype)


def filled_bank(
    device: str,
    dtype: torch.dtype = F64,
    slots: int = 30,
    drift: str = "none",
    symmetric: bool = False,
) -> ca.DualMemoryBank:
    options = {"layout": LAYOUT, "symmetric": symmetric}
    bank = ca.DualMemoryBank(CAPACITY, D, M, dtype, device, drift, **options)
    for begin in range(0, slots, 5):
        batch = vectors(5, seed=begin), vectors(5, M, seed=begin + 1)
        ca.contaccum_loss(*(x.to(device, dtype) for x in batch), bank, 0.2, symmetric=symmetric)
    return bank


def probes(count: int, device: str = "cpu") -> list[torch.Tensor]:
    return [vectors(count, seed=100 + i).to(device) for i in range(4)]


def test_a_displacement_follows_an_affine_map_that_it_has_enough_probes_for():
    old, slope, shift = vectors(3 * D), torch.eye(D, dtype=F64) + 0.1 * vectors(D, seed=5), 0.3
    field = Displacement.fit(old, old @ slope + shift, 1e-12)
    others = vectors(40, seed=9)
    torch.testing.assert_close(field(others), others @ slope + shift, rtol=0, atol=1e-8)


def test_the_ridge_is_in_units_of_the_mean_eigenvalue():
    old, new = vectors(5), vectors(5, seed=1)
    spread, moved = old - old.mean(0), new - old
    gram = spread @ spread.T
    inverse = (gram + 0.1 * gram.trace() / 5 * torch.eye(5, dtype=F64)).inverse()
    field, others = Displacement.fit(old, new, 0.1), vectors(7, seed=2)
    wanted = (others - old.mean(0)) @ spread.T @ inverse @ (moved - moved.mean(0))
    torch.testing.assert_close(field(others), others + moved.mean(0) + wanted)


@pytest.mark.parametrize("ridge", [1e-6, 0.1])
@pytest.mark.parametrize("count", [20, 60], ids=["few probes", "many"])
def test_narrow_vectors_are_turned_as_precisely_as_products_allow(count, ridge):
    d = 96
    generator = torch.Generator().manual_seed(3)
    old, moved, x = (torch.randn(r, d, generator=generator, dtype=F64) for r in (count, count, 50))
    field = Displacement.fit(old, old + 0.1 * moved, ridge)
    assert len(field.slope) == (2 if count == 20 else 1)
    assert len(field.slope) == 1 or torch.linalg.matrix_norm(field.slope[0], 2) <= 1 + 1e-9
    x = x.float()
    exact, terms = x.double(), x.double().abs()
    for factor in field.slope:
        exact, terms = exact @ factor, terms @ factor.abs()
    exact += x
    # Every product of s terms is off by s roundings of its absolute terms at most; both factors
    # and the sum are rounded, too.
    unit = torch.finfo(torch.float32).eps
    bound = unit * ((2 * d + count + 4) * terms + 2 * x.double().abs())
    assert (field.turn(x).double() - exact).abs().le(bound).all()


def test_the_error_is_that_of_leaving_each_probe_out():
    old = vectors(9)
    new = old + 0.2 * vectors(9, seed=1)
    gram_scale = ((old - old.mean(0)) @ (old - old.mean(0)).T).trace() / 9
    errors = []
    for i in range(9):
        rest = [j for j in range(9) if j != i]
        o, n = old[rest], new[rest]
        spread, moved = o - o.mean(0), n - o
        # The ridge in absolute units is that of all nine.
        inverse = (spread @ spread.T + 0.1 * gram_scale * torch.eye(8, dtype=F64)).inverse()
        slope = spread.T @ inverse @ (moved - moved.mean(0))
        errors.append((old[i] + moved.mean(0) + (old[i] - o.mean(0)) @ slope - new[i]).norm() ** 2)
    spread = (new - new.mean(0)).norm(dim=1).square().mean().sqrt()
    wanted = torch.stack(errors).mean().sqrt() / spread
    torch.testing.assert_close(Displacement.fit(old, new, 0.1).error, wanted)


@pytest.mark.parametrize("count", [1, 3])
def test_probes_that_are_all_alike_give_the_shift_alone(count):
    old = vectors(1).expand(count, D)
    field = Displacement.fit(old, old + 0.25, 0.1)
    torch.testing.assert_close(field(vectors(4, seed=3)), vectors(4, seed=3) + 0.25)


def test_probes_that_stay_leave_the_bank_as_it_is(device):
    bank = filled_bank(device)
    before = bank.queries(), bank.passages()
    old_queries, _, old_passages, _ = probes(6, device)
    ca.transport(bank, old_queries, old_queries, old_passages, old_passages)
    torch.testing.assert_close((bank.queries(), bank.passages()), before)


@pytest.mark.parametrize("slots", [10, 30], ids=["partly filled", "wrapped"])
@pytest.mark.parametrize(
    ("drift", "unit"),
    [("none", True), ("none", False), ("mean", True), ("mean", False)],
    ids=["normalized", "as they are", "about means", "about means, as they are"],
)
@pytest.mark.parametrize("both", [False, True], ids=["one way", "symmetric"])
@pytest.mark.parametrize("count", [3, 6], ids=["few probes", "many"])  # than half the dimensions
def test_loss_and_gradients_after_transport_are_the_oracle_s(
    device, slots, drift, unit, both, count
):
    bank = filled_bank(device, slots=slots, drift=drift, symmetric=both)
    oracle = reference.DualMemoryBank(CAPACITY, D, M, F64, drift, layout=LAYOUT)
    for begin in range(0, slots, 5):
        oracle.enqueue(vectors(5, seed=begin), vectors(5, M, seed=begin + 1))
    moves = probes(count)
    for step in range(4):  # the table is rebuilt at the first and the third, and else kept
        if step % 2 == 0:
            ca.transport(bank, *(x.to(device) for x in moves), ridge=0.3, normalize=unit)
            oracle.transport(moves[0], moves[1], "queries", 0.3, unit)
            oracle.transport(moves[2], moves[3], "passages", 0.3, unit)
            torch.testing.assert_close(bank.queries().cpu(), oracle.queries())
            torch.testing.assert_close(bank.passages().cpu(), oracle.passages())
        results = []
        for memory, place in ((bank, device), (oracle, "cpu")):
            q = vectors(5, seed=50 + step).to(place).requires_grad_()
            p = vectors(5, M, seed=60 + step).to(place).requires_grad_()
            function = ca.contaccum_loss if memory is bank else reference.contaccum_loss
            loss = function(q, p, memory, 0.2, symmetric=both)
            results.append([x.cpu() for x in (loss.detach(), *torch.autograd.grad(loss, (q, p)))])
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    assert (bank.bank_queries[len(bank) :] == 0).all()  # what is not filled is not moved


@DRIFTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_banks_are_moved_in_single_precision_and_rounded_once(device, dtype, drift):
    bank, wide = (filled_bank(device, kind, drift=drift) for kind in (dtype, torch.float32))
    wide.bank_queries.copy_(bank.bank_queries)
    wide.bank_passages.copy_(bank.bank_passages)
    wide.means.copy_(bank.means)
    moves = probes(6, device)
    for one in (bank, wide):
        ca.transport(one, *moves)
    torch.testing.assert_close(bank.queries(), wide.queries().to(dtype), rtol=0, atol=1e-6)
    torch.testing.assert_close(bank.passages(), wide.passages().to(dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("unit", [True, False])
def test_about_means_vectors_count_where_an_exact_map_has_taken_them(unit):
    """Nothing lags after a step, and what probes got wrong of the mean decays with batches."""
    bank, slope = filled_bank("cpu", drift="mean"), torch.eye(D, dtype=F64) + 0.1 * vectors(D)
    old, others = vectors(3 * D, seed=7), vectors(3 * D, seed=8)
    counted = [
        bank.queries() + bank.query_offsets(),
        bank.passages() + bank.passage_offsets(),
    ]
    ca.transport(
        bank, old, old @ slope + 0.5, others, others @ slope - 0.25, ridge=1e-12, normalize=unit
    )
    expected = [counted[0] @ slope + 0.5, counted[1] @ slope - 0.25]
    now = [bank.queries() + bank.query_offsets(), bank.passages() + bank.passage_offsets()]
    torch.testing.assert_close(now, expected, rtol=0, atol=1e-8)
    assert (bank.query_offsets() == 0).all()  # they are stored as they count
    wrong = bank.means[0, 0].clone()
    steps = 40
    for step in range(steps):  # batches whose mean is elsewhere
        ca.contaccum_loss(vectors(5, seed=step) * 0 + 0.5, vectors(5, M, seed=step), bank, 0.2)
    away = bank.means[0, 0] - 0.5
    torch.testing.assert_close(away, bank.drift_decay**steps * (wrong - 0.5))


def test_an_empty_bank_has_no_mean_to_move():
    bank = ca.DualMemoryBank(CAPACITY, D, M, F64, drift="mean")
    ca.transport(bank, *probes(6))
    assert (bank.means == 0).all() and len(bank) == 0


@DRIFTS
def test_following_needs_a_first_look_and_then_moves_step_by_step(device, drift):
    bank, stepwise = filled_bank(device, drift=drift), filled_bank(device, drift=drift)
    first, second, third, _ = probes(6, device)
    follow = ca.BankTransport(bank, ridge=0.2, normalize=False)
    assert follow.state_dict() == {}
    follow(first, second.view(3, 2, D))
    torch.testing.assert_close(bank.queries(), stepwise.queries(), rtol=0, atol=0)
    again = ca.BankTransport(bank, ridge=0.2, normalize=False)
    again.load_state_dict(follow.state_dict())
    again(third, first.view(3, 2, D))
    ca.transport(stepwise, first, third, second, first, ridge=0.2, normalize=False)
    torch.testing.assert_close(bank.queries(), stepwise.queries(), rtol=0, atol=0)
    torch.testing.assert_close(bank.passages(), stepwise.passages(), rtol=0, atol=0)


def follow_noisily(bank: ca.DualMemoryBank, follow: ca.BankTransport, noises: list[float]) -> list:
    """Updates of five new slots each; the probes move at random, by so many of their spreads."""
    windows = []
    for i, noise in enumerate(noises):
        ca.contaccum_loss(vectors(5, seed=i), vectors(5, M, seed=i + 1), bank, 0.2)
        follow(*(vectors(40) + noise * vectors(40, seed=200 + 2 * i + k) for k in (0, 1)))
        windows.append(min(len(bank), bank.window))
    return windows


def test_slots_that_cannot_be_followed_leave_the_window_and_others_may_grow_old():
    bank = ca.DualMemoryBank(40, D, M, F64, layout=ca.BankLayout(1, 1, 1))
    follow = ca.BankTransport(bank, ridge=1e-6, limit=1.0)
    follow(vectors(40), vectors(40))
    assert bank.window == 40 and follow.staleness == 0
    stormy = follow_noisily(bank, follow, [0.5] * 4)  # two such maps are too many
    assert stormy == [5, 5, 5, 5] and follow.staleness > 0.5
    calm = follow_noisily(bank, follow, [0.0] * 10)
    # The map back to where the probes were is one more stormy one; from then on nothing is lost.
    assert calm == [5, 10, 15, 20, 25, 30, 35, 40, 40, 40], calm
    assert follow.staleness < 1e-3


def test_without_a_limit_the_window_is_left_alone():
    bank = ca.DualMemoryBank(40, D, M, F64)
    follow = ca.BankTransport(bank)
    follow(vectors(40), vectors(40))
    assert follow_noisily(bank, follow, [3.0] * 3) == [5, 10, 15]
    assert follow.staleness > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(old_queries=torch.zeros(3, D + 1)), r"old_queries: .*\(3, 9\)"),
        (lambda a: a.update(new_queries=torch.zeros(2, D)), r"new_queries: .*\(3, 8\).*\(2, 8\)"),
        (lambda a: a.update(new_passages=torch.full((3, D), torch.nan)), "new_passages: .*finite"),
        (lambda a: a.update(new_queries=torch.full((3, D), torch.inf)), "new_queries: .*finite"),
        (lambda a: a.update(old_passages=torch.zeros(0, D)), r"old_passages: .*\(0, 8\)"),
        (lambda a: a.update(ridge=0.0), "ridge: .*0.0"),
    ],
)
def test_bad_input_is_refused_by_name_and_moves_nothing(change, message):
    bank = filled_bank("cpu")
    names = ("old_queries", "new_queries", "old_passages", "new_passages")
    arguments: dict = {"bank": bank, **dict(zip(names, probes(3), strict=True)), "ridge": 0.1}
    change(arguments)
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        ca.transport(**arguments)
    for name, value in bank.state_dict().items():
        assert torch.equal(value, before[name]), name
