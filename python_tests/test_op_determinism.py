"""The same bits from any number of threads, and from any repetition."""

from __future__ import annotations

import pytest
import torch

import contaccum_ext as ca

SHAPES = {
    "small": {"n": 5, "capacity": 64, "m": 2, "d": 24, "dtype": torch.float32},
    "many splits": {"n": 9, "capacity": 4000, "m": 1, "d": 32, "dtype": torch.float32},
    "fp64": {"n": 70, "capacity": 700, "m": 2, "d": 17, "dtype": torch.float64},
    "bf16, drift": {"n": 33, "capacity": 900, "m": 3, "d": 48, "dtype": torch.bfloat16},
    "two passes": {"n": 1100, "capacity": 256, "m": 2, "d": 260, "dtype": torch.float32},
}


def history(device, threads: int, n, capacity, m, d, dtype) -> list[torch.Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        drift = "mean" if dtype == torch.bfloat16 else "none"
        bank = ca.DualMemoryBank(capacity, d, m, dtype, device, drift)
        given = torch.float64 if dtype == torch.float64 else torch.float32
        bank.enqueue(
            torch.randn(capacity, d, dtype=given).to(device),
            torch.randn(capacity, m, d, dtype=given).to(device),
        )
        results = []
        for tau in (1.0, 1.0, 0.5):  # as it stands, after upkeep, after a rebuild
            q = torch.randn(n, d, dtype=given).to(device).requires_grad_()
            p = torch.randn(n, m, d, dtype=given).to(device).requires_grad_()
            loss = ca.contaccum_loss(q, p, bank, tau)
            results += [loss.detach(), *torch.autograd.grad(loss, (q, p))]
        return results + list(bank.state_dict().values())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", SHAPES)
def test_one_thread_two_threads_and_again(device, name):
    first = history(device, 1, **SHAPES[name])
    for threads in (2, 3, 1):
        for a, b in zip(history(device, threads, **SHAPES[name]), first, strict=True):
            assert torch.equal(a, b)
    assert all(x.isfinite().all() for x in first[:9])
