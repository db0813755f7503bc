"""Products by torch's library, forced on sizes so small that other kernels would be chosen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import test_op_sizes as sizes
import torch
from conftest import FAMILIES, choose_kernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Setup, Step, examples, histories, setups
from test_op_history import LAPS
from test_op_nonfinite import assert_refused_by_the_bank
from test_op_refusals import assert_same_state, state
from tolerances import Kernels
from twins import Twins

import contaccum_ext as ca

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TF32 = 2.0**-10  # what it may cut off a number: tolerances.py


@pytest.fixture(scope="module", autouse=True)
def library():
    choose_kernels("library")
    yield
    choose_kernels(*FAMILIES)


def run(setup: Setup, steps: list[Step]) -> None:
    twins = Twins(setup, "cuda", library=True)
    for step in steps:
        twins.run(step)


@given(history=histories())
@settings(max_examples=examples(100))
def test_random_history_of_a_small_bank(history):
    run(*history)


@given(history=histories(setups(st.integers(100, 300), st.sampled_from([8, 24, 65])), longest=10))
@settings(max_examples=examples(20), suppress_health_check=[HealthCheck.too_slow])
def test_random_history_of_a_larger_bank(history):
    run(*history)


@pytest.mark.parametrize("drift", ["none", "mean"])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("capacity", [23, 24, 25])
def test_three_laps_over_every_kind_of_boundary(capacity, ids, drift):
    """A last block shorter than the others, 23 and 25, makes steps that need many groups."""
    layout = ca.BankLayout(2, 4, 8)
    run(Setup(capacity, 5, 2, layout, ids=ids, drift=drift, seed=7), LAPS)


@pytest.mark.parametrize("window", [1, 8, 17])
@pytest.mark.parametrize("m", [1, 3])
def test_a_window_through_three_laps(window, m):
    setup = Setup(24, 5, m, ca.BankLayout(2, 4, 8), drift="mean")
    run(setup, [Step("window", value=window), *LAPS, Step("window"), Step("loss", 3)])


@pytest.mark.parametrize("banks", ["both", "passages", "queries"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_with_every_choice_of_banks(dtype, banks):
    given = torch.float64 if dtype == torch.float64 else torch.float32
    setup = Setup(20, 33, 2, None, dtype, given, drift="mean", ids=True)
    kinds = {"row_weighting": "all", "banks": banks}
    run(setup, [Step("loss", n, options=kinds) for n in (4, 4, 7, 1, 25, 3)])


@pytest.mark.parametrize("n", [3, 30])
def test_no_grad_gives_the_same_loss_and_the_same_bank(n):
    torch.manual_seed(0)
    banks = [ca.DualMemoryBank(25, 12, 2, device="cuda", drift="mean") for _ in range(2)]
    for _ in range(12):
        q, p = torch.randn(n, 12, device="cuda"), torch.randn(n, 2, 12, device="cuda")
        loss = ca.contaccum_loss(q.requires_grad_(), p, banks[0], 0.3)
        with torch.no_grad():
            assert torch.equal(ca.contaccum_loss(q, p, banks[1], 0.3), loss.detach())
        assert_same_state(banks[1], state(banks[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_that_is_not_finite_leaves_no_trace(dtype):
    """Its products are NaN from the first on, all of which goes to scratch memory."""
    torch.manual_seed(0)
    bank = ca.DualMemoryBank(10, 6, 2, dtype, "cuda", "mean", layout=ca.BankLayout(1, 2, 4))
    for _ in range(4):
        ca.contaccum_loss(torch.randn(4, 6, device="cuda"), torch.randn(4, 2, 6).cuda(), bank, 0.5)
    q, p = torch.randn(2, 6, device="cuda"), torch.randn(2, 2, 6, device="cuda")
    q[1, 3] = math.nan
    assert_refused_by_the_bank(bank, q, p)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_products_follow_torchs_setting(precision):
    """tf32 where it is allowed, and no more than that; the bound of full float32 otherwise."""
    case = sizes.Case(64, torch.float32, 600, (1, 63, 200), ids=True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        kernels = Kernels("cuda", library=True, operand=TF32 if precision == "high" else 0.0)
        sizes.run(case, kernels)
        sizes.run(replace(case, m=2, window=300), kernels)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="no tf32 before compute capability 8.0",
)
def test_tf32_changes_what_the_library_computes_and_other_dtypes_not():
    before, losses = torch.get_float32_matmul_precision(), []
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            torch.manual_seed(0)
            q = torch.randn(64, 256, device="cuda")
            p = torch.randn(64, 256, device="cuda")
            losses.append(
                [
                    ca.contaccum_loss(q.to(t), p.to(t), None, 16.0)
                    for t in (torch.float32, torch.float64, torch.bfloat16)
                ]
            )
    finally:
        torch.set_float32_matmul_precision(before)
    same = [torch.equal(a, b) for a, b in zip(*losses, strict=True)]
    assert same == [False, True, True]
