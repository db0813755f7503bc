"""Loss, both gradients, bank contents and Invariant T against the oracle, over random histories."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Setup, Step, examples, histories, setups
from twins import Twins

import contaccum_ext as ca


def run(history: tuple[Setup, list[Step]], device: str) -> Twins:
    setup, steps = history
    twins = Twins(setup, device)
    for step in steps:
        twins.run(step)
    return twins


@given(history=histories())
@settings(max_examples=examples(300))
def test_random_history_of_a_small_bank(device, history):
    run(history, device)


@given(history=histories(setups(st.integers(100, 300), st.sampled_from([8, 24, 65])), longest=10))
@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.too_slow])
def test_random_history_of_a_larger_bank(device, history):
    run(history, device)


LAPS = [Step("loss", n) for n in (3, 5, 1, 8, 2, 7, 4, 6)] * 3


@pytest.mark.parametrize("drift", ["none", "mean"])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("capacity", [23, 24, 25])
def test_three_laps_over_every_kind_of_boundary(device, capacity, ids, drift):
    """Batches that end before, at and after groups, offset blocks, blocks and the ring's end."""
    layout = ca.BankLayout(2, 4, 8)
    twins = run((Setup(capacity, 5, 2, layout, ids=ids, drift=drift, seed=7), LAPS), device)
    assert twins.oracle.written >= 3 * capacity
    assert len(twins.bank) == capacity


@pytest.mark.parametrize("window", [1, 8, 9, 16, 17])
def test_a_window_through_three_laps(device, window):
    steps = [Step("window", value=window), *LAPS]
    twins = run((Setup(24, 5, 1, ca.BankLayout(2, 4, 8)), steps), device)
    assert twins.bank.window < 24 or window > 16
    twins.run(Step("window"))
    twins.run(Step("loss", 3))


@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_pair_of_narrow_dtypes(device, bank_dtype, input_dtype):
    setup = Setup(20, 33, 2, None, bank_dtype, input_dtype, drift="mean", ids=True)
    run((setup, [Step("loss", n) for n in (4, 4, 7, 1, 25, 3)]), device)


def test_two_dimensional_passages_mean_one_passage_per_query(device):
    banks = [ca.DualMemoryBank(6, 5, device=device) for _ in range(2)]
    for _ in range(3):
        q, p = (
            torch.randn(4, 5, device=device),
            torch.randn(4, 5, device=device, requires_grad=True),
        )
        flat = ca.contaccum_loss(q, p, banks[0])
        deep = ca.contaccum_loss(q, p[:, None], banks[1])
        assert torch.equal(flat, deep)
        assert torch.equal(*(torch.autograd.grad(loss, p)[0] for loss in (flat, deep)))
    assert torch.equal(banks[0].passages(), banks[1].passages())
