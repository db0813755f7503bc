"""A learned temperature: its exact gradient, and the table of expected scores behind it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Setup, Step, examples, histories, setups
from test_op_gradients import VARIANTS, batch, filled_bank, leaves, set_random_offsets
from test_op_history import LAPS
from test_op_nonfinite import FAULTS, bank_and_batch
from test_op_refusals import assert_refused, assert_same_state, state
from twins import Twins

import contaccum_ext as ca
from contaccum_ext import reference

NO_LEARNING = "temperature: expected one that requires no gradient"


def learned(value: float, device: str, dtype=torch.float64, shape=()) -> torch.Tensor:
    return torch.full(shape, value, dtype=dtype, device=device, requires_grad=True)


@pytest.mark.parametrize(
    ("name", "symmetric"),  # both directions need both banks
    [
        (name, both)
        for name in VARIANTS
        for both in (False, True)
        if not (both and "banks" in VARIANTS[name])
    ],
)
def test_gradcheck(device, name, symmetric):
    """Temperature, queries and passages together; with both directions of the loss too."""
    options = dict(VARIANTS[name])
    m, ids, slots = options.pop("m", 2), options.pop("ids", False), options.pop("slots", 11)
    window, offsets = options.pop("window", None), options.pop("offsets", False)
    kind = {"drift": options.pop("drift", "none"), "symmetric": symmetric}
    bank = filled_bank(device, slots, m, ids, learn_temperature=True, **kind)
    bank.window = window
    if offsets:
        set_random_offsets(bank)
    given_ids = batch(device, 4, m, ids)[2]
    options |= {"enqueue": False, "symmetric": symmetric}

    def loss(q, p, tau):
        return ca.contaccum_loss(q, p, bank, tau, given_ids, **options)

    assert torch.autograd.gradcheck(loss, [*leaves(device, 4, m), learned(0.7, device)])


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradcheck_without_a_bank(device, m, symmetric):
    def loss(q, p, tau):
        return ca.contaccum_loss(q, p, None, tau, symmetric=symmetric)

    assert torch.autograd.gradcheck(loss, [*leaves(device, 5, m), learned(0.5, device)])


def run(history: tuple[Setup, list[Step]], device: str, **changes) -> Twins:
    setup, steps = history
    twins = Twins(replace(setup, learn=True, **changes), device)
    for step in steps:
        twins.run(step)
    return twins


@given(history=histories(), symmetric=st.booleans())
@settings(max_examples=examples(200))
def test_random_history_of_a_small_bank(device, history, symmetric):
    """The scale stays for some steps, so that upkeep is what keeps the table, and then changes."""
    run(history, device, symmetric=symmetric)


@given(history=histories(setups(st.integers(100, 300), st.sampled_from([8, 24, 65])), longest=10))
@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.too_slow])
def test_random_history_of_a_larger_bank(device, history):
    run(history, device)


@pytest.mark.parametrize("drift", ["none", "mean"])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("capacity", [23, 24, 25])
def test_three_laps_over_every_kind_of_boundary(device, capacity, ids, drift):
    """With one scale throughout: nothing but upkeep ever writes the table."""
    layout = ca.BankLayout(2, 4, 8)
    run((Setup(capacity, 5, 2, layout, ids=ids, drift=drift, seed=7), LAPS), device)


def test_a_scale_that_changes_every_few_steps(device):
    steps = []
    for i, step in enumerate(LAPS):
        steps += [step] if i % 3 else [Step("temperature", value=0.3 + 0.1 * i), step]
    run((Setup(24, 5, 2, ca.BankLayout(2, 4, 8), ids=True, drift="mean"), steps), device)


@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_pair_of_narrow_dtypes(device, bank_dtype, input_dtype):
    setup = Setup(40, 40, 2, None, bank_dtype, input_dtype, drift="mean", ids=True)
    run((setup, [Step("loss", n) for n in (4, 4, 7, 1, 9, 25, 60, 3)]), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 384])
def test_sizes_that_tensor_cores_take(device, d, dtype):
    """Offsets, masks, a ring that wraps around; rows enough for large and for small tiles."""
    if device == "cpu" and d > 64:
        pytest.skip("the CPU has no tiles")
    setup = Setup(1700, d, 1, None, dtype, torch.float32, "mean", ids=True, size=d**-0.5)
    steps = [Step("temperature", value=0.3), *(Step("loss", n) for n in (700, 600, 40, 8, 700, 17))]
    steps += [Step("window", value=500), Step("loss", 30), Step("temperature", value=0.2)]
    run((setup, [*steps, Step("loss", 8), Step("loss", 8)]), device)


@pytest.mark.parametrize("name", FAULTS)
def test_a_refused_batch_leaves_the_table_as_it_was(device, name):
    tensor, at, value = FAULTS[name]
    bank = ca.DualMemoryBank(10, 6, 2, device=device, learn_temperature=True)
    _, good = bank_and_batch(device)
    for _ in range(3):
        ca.contaccum_loss(*good[:2], bank, 0.5)
    bad = [x.clone() for x in good[:2]]
    bad[tensor][at] = value
    before, tau = state(bank), learned(0.5, device, torch.float32)
    loss = ca.contaccum_loss(*bad, bank, tau)
    loss.backward()
    assert loss.isnan() and tau.grad.isnan()
    assert_same_state(bank, before)


def test_a_tensor_is_the_same_as_the_number(device):
    """And one that requires no gradient works with every bank."""
    banks = [filled_bank(device) for _ in range(2)]
    q, p = leaves(device)
    number = ca.contaccum_loss(q, p, banks[0], 0.7)
    tensor = ca.contaccum_loss(q, p, banks[1], learned(0.7, device).detach())
    assert torch.equal(number, tensor)
    assert_same_state(banks[1], state(banks[0]))
    with torch.no_grad():
        ca.contaccum_loss(q, p, banks[1], learned(0.7, device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_the_gradient_has_shape_and_dtype_of_the_temperature(device, dtype, shape):
    bank = filled_bank(device, learn_temperature=True)
    q, p, _ = batch(device)
    tau, exact = learned(0.75, device, dtype, shape), learned(0.75, device)
    (3 * ca.contaccum_loss(q, p, bank, tau, enqueue=False)).backward()
    (3 * reference.contaccum_loss(q, p, bank, exact, enqueue=False)).backward()
    assert tau.grad.shape == shape and tau.grad.dtype == dtype
    error = (tau.grad.double().reshape(()) - exact.grad).abs()
    assert error <= (torch.finfo(dtype).eps + 1e-12) * exact.grad.abs()


def test_the_gradient_is_of_the_bank_that_the_loss_saw(device):
    bank = filled_bank(device, learn_temperature=True)
    q, p = leaves(device)
    tau = learned(0.7, device)
    exact = reference.contaccum_loss(q, p, bank, tau, enqueue=False)
    (expected,) = torch.autograd.grad(exact, tau)
    loss = ca.contaccum_loss(q, p, bank, tau)
    for _ in range(3):
        ca.contaccum_loss(*leaves(device, 3), bank, 0.4)
    bank.clear()
    torch.testing.assert_close(torch.autograd.grad(loss, tau)[0], expected, rtol=1e-11, atol=1e-13)


def test_a_second_derivative_is_refused(device):
    tau = learned(0.7, device)
    loss = ca.contaccum_loss(*leaves(device), filled_bank(device, learn_temperature=True), tau)
    (gradient,) = torch.autograd.grad(loss, tau, create_graph=True)
    with pytest.raises(RuntimeError, match="expected to be differentiated once"):
        gradient.backward()


@pytest.mark.parametrize("slots", [0, 11])
def test_a_bank_without_the_table_is_refused(device, slots):
    bank = filled_bank(device, slots)
    call = (*leaves(device), bank, learned(0.7, device))
    assert_refused(bank, lambda: ca.contaccum_loss(*call), ValueError, [NO_LEARNING])


REFUSED = {
    "integer": (torch.tensor(1), TypeError, ["temperature", "floating", "int64"]),
    "two": (torch.ones(2), ValueError, ["temperature", "one element", "(2,)"]),
    "none": (torch.ones(0), ValueError, ["temperature", "one element", "(0,)"]),
    "zero": (torch.zeros(()), ValueError, ["temperature", "positive", "0.0"]),
    "negative": (torch.tensor(-1.0), ValueError, ["temperature", "-1.0"]),
    "nan": (torch.tensor(math.nan), ValueError, ["temperature", "nan"]),
    "infinite": (torch.tensor(math.inf), ValueError, ["temperature", "inf"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_temperature_is_refused(device, name):
    value, kind, words = REFUSED[name]
    bank = filled_bank(device, learn_temperature=True)
    call = (*leaves(device), bank, value.to(device))
    assert_refused(bank, lambda: ca.contaccum_loss(*call), kind, words)


def test_a_bank_without_the_table_keeps_none(device):
    plain, learning = filled_bank(device), filled_bank(device, learn_temperature=True)
    assert {*learning.state_dict()} - {*plain.state_dict()} == {"expected"}
    assert learning.expected.shape == (2 + 4 + 4, 8)  # blocks, groups of a block, states
    with pytest.raises(RuntimeError, match=r"expected: expected \(10, 8\) .*, got missing"):
        learning.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="expected: expected none"):
        plain.load_state_dict(learning.state_dict())
    assert "learn_temperature=True" in repr(learning)
