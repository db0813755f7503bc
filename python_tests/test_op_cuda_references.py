"""Scores that tensor-core kernels must not take for large or small: references, and the window."""

from __future__ import annotations

import pytest
import torch
from tolerances import Kernels, Sizes, assert_table, bounds

import contaccum_ext as ca

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# One weight of a row may be nearly all: e_W of tolerances.py with Q = 1.
ROUNDING = 6 * torch.finfo(torch.bfloat16).eps / 2


def step(vectors, bank, temperature):
    """Loss and gradients of a batch, queries and passages (n, d); it goes into the bank."""
    q, p = (x.detach().clone().requires_grad_() for x in vectors)
    loss = ca.contaccum_loss(q, p, bank, temperature)
    return (loss.detach(), *torch.autograd.grad(loss, (q, p)))


def by_both_families(allow_kernels, history):
    """What history() gives with tensor cores, and without: the same random numbers for both."""
    results = []
    for family in ("tensor cores", "portable"):
        allow_kernels(family)
        torch.manual_seed(0)
        results.append(history())
    return results


def assert_close(ours, portable):
    for a, b in zip(ours, portable, strict=True):
        assert (a - b).norm() <= ROUNDING * b.norm()


@pytest.mark.parametrize("drift", ["none", "mean"])
@pytest.mark.parametrize("d", [384, 768])
def test_scores_so_far_apart_that_references_rise(d, drift, allow_kernels):
    """Over several tiles of each split, with offsets and without."""
    n = 1000

    def history():
        bank = ca.DualMemoryBank(1344, d, 1, torch.bfloat16, "cuda", drift)
        steps = []
        for _ in range(4):
            vectors = torch.randn(n, 2, d, device="cuda") + torch.randn(2, d, device="cuda")
            vectors = torch.nn.functional.normalize(vectors, dim=-1).unbind(1)
            steps.append(step(vectors, bank, 0.003))
        return steps

    for ours, portable in zip(*by_both_families(allow_kernels, history), strict=True):
        assert_close(ours, portable)


@pytest.mark.parametrize("drift", ["none", "mean"])
@pytest.mark.parametrize("d", [384, 768])
def test_scores_outside_the_window_move_nothing_within(d, drift, allow_kernels):
    """The table needs them, the loss must not: old passages are the queries of now."""
    n = 1000

    def history():
        bank = ca.DualMemoryBank(4096, d, 1, torch.bfloat16, "cuda", drift)
        drawn = torch.nn.functional.normalize(torch.randn(6, 2, n, d, device="cuda"), dim=-1)
        now, past = drawn[5], drawn[:5]
        past[:4, 1] = now[0]
        for q, p in past:
            bank.enqueue(q, p)
        bank.window = n
        return (*step(now, bank, 0.02), bank.table())

    (*ours, table), (*portable, same_table) = by_both_families(allow_kernels, history)
    assert_close(ours, portable)
    sizes = Sizes(n, 1, d, filled=4096, scale=50, norm=1.01, component=1.0, row_weight=1 / n)
    both = 2 * bounds(sizes, torch.bfloat16, Kernels("cuda")).table
    assert_table(table, same_table.double(), both)
