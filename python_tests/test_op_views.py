"""Inputs that are views: any strides give what a contiguous copy gives, to the bit."""

from __future__ import annotations

import pytest
import torch
from strategies import Setup, Step
from test_op_refusals import assert_same_state, state
from twins import Twins

import contaccum_ext as ca

N, M, CAPACITY = 5, 2, 13


# name: (shapes of two leaves of n, m, d; the views of them that are queries and passages)
VIEWS = {
    "transposed": (
        lambda n, m, d: ((d, n), (d, m, n)),
        lambda a, b: (a.t(), b.permute(2, 1, 0)),
    ),
    "passages first": (
        lambda n, m, d: ((n, d), (m, n, d)),
        lambda a, b: (a, b.transpose(0, 1)),
    ),
    "every other component": (
        lambda n, m, d: ((n, 2 * d), (n, m, 2 * d)),
        lambda a, b: (a[:, ::2], b[..., 1::2]),
    ),
    "every other row": (
        lambda n, m, d: ((2 * n, d), (2 * n, 2 * m, d)),
        lambda a, b: (a[::2], b[1::2, ::2]),
    ),
    "some columns": (
        lambda n, m, d: ((n, d + 3), (n, m, d + 3)),
        lambda a, b: (a[:, 1:-2], b[..., 2:-1]),
    ),
    "expanded": (
        lambda n, m, d: ((1, d), (n, 1, d)),
        lambda a, b: (a.expand(b.shape[0], -1), b.expand(-1, M, -1)),
    ),
    "expanded components": (
        lambda n, m, d: ((n, 1), (n, m, 1)),
        lambda a, b: (a.expand(-1, 24), b.expand(-1, -1, 24)),
    ),
    "halves of one tensor": (
        lambda n, m, d: ((n, 1 + m, d), (1,)),
        lambda a, b: (a[:, 0], a[:, 1:] * b),
    ),
}


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_gives_what_its_copy_gives(device, name, given):
    shapes, views = VIEWS[name]
    strided, packed = (ca.DualMemoryBank(CAPACITY, 24, M, given, device, "mean") for _ in range(2))
    torch.manual_seed(0)
    for _ in range(4):  # past the ring's end
        leaves = [torch.randn(s).to(device, given).requires_grad_() for s in shapes(N, M, 24)]
        q, p = views(*leaves)
        assert q.shape == (N, 24) and p.shape == (N, M, 24)
        assert not (q.is_contiguous() and p.is_contiguous())
        copies = [v.detach().contiguous().requires_grad_() for v in (q, p)]
        ids = torch.randint(0, 4, (M, 2 * N), device=device)[:, ::2].t()
        loss = ca.contaccum_loss(q, p, strided, 0.5, ids)
        expected = ca.contaccum_loss(*copies, packed, 0.5, ids.contiguous())
        assert torch.equal(loss, expected)
        gradients = torch.autograd.grad(loss, (q, p), retain_graph=True)
        wanted = torch.autograd.grad(expected, copies)
        for got, should in zip(gradients, wanted, strict=True):
            assert torch.equal(got, should)
        through = torch.autograd.grad((q, p), leaves, wanted, retain_graph=True)
        for got, should in zip(torch.autograd.grad(loss, leaves), through, strict=True):
            assert torch.equal(got, should)
    assert_same_state(strided, state(packed))


class ShiftedTwins(Twins):
    """Contiguous inputs that begin one element into their memory: aligned to nothing wider."""

    def draw(self, *shape, dtype=None):
        x = super().draw(*shape, dtype=dtype)
        shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)
        assert shifted.is_contiguous() and shifted.data_ptr() % 16 == shifted.element_size()
        return shifted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_inputs_that_are_not_aligned(device, dtype):
    """Wide loads are impossible, other kernels may run: within the bounds, not to the bit."""
    twins = ShiftedTwins(Setup(30, 24, M, None, dtype, dtype, "mean", True), device)
    for n in (N, 9, 1, 17, N):
        twins.run(Step("loss", n))
