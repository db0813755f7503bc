"""What only a CUDA device has: streams, graphs, two sets of kernels, a host that must not wait."""

from __future__ import annotations

import ctypes

import pytest
import torch

import contaccum_ext as ca
from contaccum_ext import _C  # type: ignore[attr-defined]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CASES = {
    "bf16, hard negatives": {"capacity": 512, "d": 256, "m": 2, "n": 8, "dtype": torch.bfloat16},
    "fp32": {"capacity": 300, "d": 48, "m": 1, "n": 8, "dtype": torch.float32},
    "fp64, odd sizes": {"capacity": 200, "d": 33, "m": 2, "n": 5, "dtype": torch.float64},
    "a batch larger than the bank": {
        "capacity": 20,
        "d": 16,
        "m": 2,
        "n": 30,
        "dtype": torch.float32,
    },
}


def setting(capacity, d, m, n, dtype, drift="mean"):
    torch.manual_seed(0)
    bank = ca.DualMemoryBank(capacity, d, m, dtype, "cuda", drift)
    given = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = torch.nn.functional.normalize(torch.randn(40, n, 1 + m, d, dtype=given), dim=-1)
    ids = torch.randint(-1, 30, (40, n, m))
    return bank, vectors.cuda(), ids.cuda()


def step(bank, vectors, ids, out):
    """Loss and gradients of one batch into `out`, batch into the bank."""
    q, p = vectors[:, 0].detach().requires_grad_(), vectors[:, 1:].detach().requires_grad_()
    loss = ca.contaccum_loss(q, p, bank, 0.1, ids)
    for target, value in zip(out, (loss, *torch.autograd.grad(loss, (q, p))), strict=True):
        target.copy_(value.detach())


def outputs(vectors):
    loss_dtype = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    return (
        torch.zeros((), dtype=loss_dtype, device="cuda"),
        torch.zeros_like(vectors[0, :, 0]),
        torch.zeros_like(vectors[0, :, 1:]),
    )


def assert_same_buffers(a, b):
    for (name, x), y in zip(a.named_buffers(), b.buffers(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("name", CASES)
def test_a_captured_graph_replays_what_eager_does(name):
    eager, vectors, ids = setting(**CASES[name])
    captured, _, _ = setting(**CASES[name])
    for bank in (eager, captured):  # the first call decides the scale that the table holds for
        step(bank, vectors[0], ids[0], outputs(vectors))
    batch, batch_ids, replayed = vectors[0].clone(), ids[0].clone(), outputs(vectors)
    graph = torch.cuda.CUDAGraph()
    saved = {k: v.clone() for k, v in captured.state_dict().items()}
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step(captured, batch, batch_ids, replayed)
    captured.load_state_dict(saved)
    expected = outputs(vectors)
    for i in range(1000):
        batch.copy_(vectors[i % 40])
        batch_ids.copy_(ids[i % 40])
        graph.replay()
        step(eager, vectors[i % 40], ids[i % 40], expected)
        assert all(torch.equal(a, b) for a, b in zip(replayed, expected, strict=True)), i
    assert_same_buffers(captured, eager)


def test_another_stream_gives_the_same():
    plain, vectors, ids = setting(**CASES["bf16, hard negatives"])
    aside, _, _ = setting(**CASES["bf16, hard negatives"])
    first, second = outputs(vectors), outputs(vectors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for i in range(100):
        step(plain, vectors[i % 40], ids[i % 40], first)
        with torch.cuda.stream(stream):
            step(aside, vectors[i % 40], ids[i % 40], second)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_same_buffers(plain, aside)


def test_no_step_waits_for_the_device():
    bank, vectors, ids = setting(**CASES["bf16, hard negatives"])
    out = outputs(vectors)
    step(bank, vectors[0], ids[0], out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(1, 100):
            step(bank, vectors[i % 40], ids[i % 40], out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_cores_and_portable_kernels_agree(dtype):
    """Both sum the same rounded vectors in float32."""
    allow = ctypes.CDLL(_C.__file__).contaccum_allow_tensor_cores
    case = {"capacity": 8192, "d": 128, "m": 1, "n": 40, "dtype": dtype}
    results = []
    for allowed in (1, 0):
        allow(allowed)
        try:
            bank, vectors, ids = setting(**case)
            out = outputs(vectors)
            for i in range(250):  # a lap and a quarter
                step(bank, vectors[i % 40], ids[i % 40], out)
            results.append([x.double() for x in out])
        finally:
            allow(1)
    for a, b in zip(*results, strict=True):
        # Weights are split into two halves of 16 bits: 2^-17 relative to a bf16 pair's sum.
        assert (a - b).norm() <= 2**-14 * b.norm()
