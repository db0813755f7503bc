"""What only CUDA has: streams, graphs, families of kernels, more devices, tf32, no waiting."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import FAMILIES
from test_op_refusals import assert_refused, assert_same_state, state

import contaccum_ext as ca

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
    "bf16, a second table": {
        "capacity": 512,
        "d": 256,
        "m": 2,
        "n": 24,
        "dtype": torch.bfloat16,
        "learn_temperature": True,
    },
    "fp32, both directions": {
        "capacity": 300,
        "d": 48,
        "m": 2,
        "n": 8,
        "dtype": torch.float32,
        "learn_temperature": True,
        "symmetric": True,
    },
    "fp16, both directions": {
        "capacity": 1024,
        "d": 64,
        "m": 2,
        "n": 40,
        "dtype": torch.float16,
        "symmetric": True,
    },
}


# What may run: the families that are best, or products by torch's library whatever the sizes.
CHOICES = {"the best": tuple(FAMILIES), "library": ("library",)}


def setting(capacity, d, m, n, dtype, drift="mean", device="cuda", **kinds):
    torch.manual_seed(0)
    bank = ca.DualMemoryBank(capacity, d, m, dtype, device, drift, **kinds)
    given = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = torch.nn.functional.normalize(torch.randn(40, n, 1 + m, d, dtype=given), dim=-1)
    ids = torch.randint(-1, 30, (40, n, m))
    return bank, vectors.to(device), ids.to(device)


def step(bank, vectors, ids, out):
    """Loss and gradients of one batch into `out`, batch into the bank."""
    q, p = vectors[:, 0].detach().requires_grad_(), vectors[:, 1:].detach().requires_grad_()
    loss = ca.contaccum_loss(q, p, bank, 0.1, ids, symmetric=bank.mirror is not None)
    for target, value in zip(out, (loss, *torch.autograd.grad(loss, (q, p))), strict=True):
        target.copy_(value.detach())


def outputs(vectors):
    loss_dtype = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    return (
        torch.zeros((), dtype=loss_dtype, device=vectors.device),
        torch.zeros_like(vectors[0, :, 0]),
        torch.zeros_like(vectors[0, :, 1:]),
    )


@pytest.mark.parametrize("kernels", CHOICES)
@pytest.mark.parametrize("name", CASES)
def test_a_captured_graph_replays_what_eager_does(name, kernels, allow_kernels):
    allow_kernels(*CHOICES[kernels])
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
    assert_same_state(captured, state(eager))


@pytest.mark.parametrize("kernels", CHOICES)
def test_another_stream_gives_the_same(kernels, allow_kernels):
    allow_kernels(*CHOICES[kernels])
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
    assert_same_state(plain, state(aside))


@pytest.mark.parametrize("kernels", CHOICES)
def test_no_step_waits_for_the_device(kernels, allow_kernels):
    allow_kernels(*CHOICES[kernels])
    bank, vectors, ids = setting(**CASES["bf16, hard negatives"])
    out = outputs(vectors)
    step(bank, vectors[0], ids[0], out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(1, 100):
            step(bank, vectors[i % 40], ids[i % 40], out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def between_families(dtype: torch.dtype, d: int, slots: int) -> float:
    """How far kernels that round weights may be from portable ones, in L2, at a temperature of 0.1.

    tolerances.py has the term. Scores of unit vectors have variance 1 / d, hence this mean square
    of the weights; a row's gradient is about as long as its target, which is not among them.
    """
    squares = math.exp(100 / d) / slots
    return 6 * torch.finfo(dtype).eps / 2 * math.sqrt(squares) + 2**-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_families_of_kernels_agree(dtype, allow_kernels):
    """All sum the same rounded vectors in float32; all but portable ones round their weights."""
    case = {"capacity": 8192, "d": 128, "m": 1, "n": 40, "dtype": dtype}
    results = []
    for family in ("tensor cores", "library", "portable"):
        allow_kernels(family)
        bank, vectors, ids = setting(**case)
        out = outputs(vectors)
        for i in range(250):  # a lap and a quarter
            step(bank, vectors[i % 40], ids[i % 40], out)
        results.append([x.double() for x in out])
    bound = between_families(dtype, case["d"], case["capacity"])
    portable = results.pop()
    for result in results:
        for a, b in zip(result, portable, strict=True):
            assert (a - b).norm() <= bound * b.norm()


def test_more_splits_share_a_place_beyond_half_a_million_slots(allow_kernels):
    """On Hopper a chain of four splits adds up there; every split has slots."""
    capacity, d, n = (1 << 19) + 8, 64, 200
    torch.manual_seed(0)
    bank = ca.DualMemoryBank(capacity, d, 1, torch.bfloat16, "cuda")

    def draw(count):
        vectors = torch.nn.functional.normalize(torch.randn(count, 2, d, device="cuda"), dim=-1)
        return [x.clone().requires_grad_() for x in vectors.unbind(1)]

    with torch.no_grad():
        while len(bank) < capacity:
            ca.contaccum_loss(*draw(8192), bank, 0.1)
    q, p = draw(n)
    results = []
    for family in ("tensor cores", "portable"):
        allow_kernels(family)
        loss = ca.contaccum_loss(q, p, bank, 0.1, enqueue=False)
        results.append((loss.detach(), *torch.autograd.grad(loss, (q, p))))
    bound = between_families(torch.bfloat16, d, capacity)
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("n", [8, 200])
def test_tf32_of_matrix_products_does_not_reach_other_kernels(n, allow_kernels):
    """What PyTorch's switch allows its own products; kernels of ours keep to float32."""
    allow_kernels("portable", "tensor cores")
    before, results = torch.get_float32_matmul_precision(), []
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            bank, vectors, ids = setting(512, 256, 1, n, torch.float32)
            for i in range(5):
                out = outputs(vectors)
                step(bank, vectors[i], ids[i], out)
            results.append((*out, state(bank)))
    finally:
        torch.set_float32_matmul_precision(before)
    for a, b in zip(results[0][:3], results[1][:3], strict=True):
        assert torch.equal(a, b)
    assert_same_state(bank, results[0][3])


def no_equal_pair() -> str | None:
    """Why two devices cannot be compared, or None."""
    count = torch.cuda.device_count()
    if count < 2:
        return f"needs two CUDA devices, found {count}"
    names = {torch.cuda.get_device_name(i) for i in (0, 1)}
    # Another number of processors splits the sums otherwise.
    return f"needs two devices of a kind, found {sorted(names)}" if len(names) > 1 else None


needs_two = pytest.mark.skipif(no_equal_pair() is not None, reason=str(no_equal_pair()))


@needs_two
@pytest.mark.parametrize("name", CASES)
def test_a_device_that_is_not_the_current_one(name):
    histories, banks = [], []
    for device in ("cuda:0", "cuda:1"):
        bank, vectors, ids = setting(**CASES[name], device=device)
        history = []
        for i in range(80):
            out = outputs(vectors)
            step(bank, vectors[i % 40], ids[i % 40], out)
            assert torch.cuda.current_device() == 0
            assert {x.device for x in out} == {torch.device(device)}
            history += [x.cpu() for x in out]
        histories.append(history)
        banks.append(bank.cpu())
    assert all(torch.equal(a, b) for a, b in zip(*histories, strict=True))
    assert_same_state(banks[1], state(banks[0]))


@needs_two
@pytest.mark.parametrize("which", ["queries", "passages", "passage_ids"])
def test_an_argument_on_another_device_than_the_bank(which):
    bank, vectors, ids = setting(**CASES["fp32"], device="cuda:1")
    step(bank, vectors[0], ids[0], outputs(vectors))
    call = {"queries": vectors[1, :, 0], "passages": vectors[1, :, 1:], "passage_ids": ids[1]}
    call[which] = call[which].to("cuda:0")
    words = [f"{which}: ", "cuda:1", "got cuda:0"]
    assert_refused(bank, lambda: ca.contaccum_loss(**call, bank=bank), ValueError, words)
