"""What GPU runs of the suite stand on: the check of peers, the device, published kernels."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # benchmarks/ is not installed with the package
    sys.path.insert(0, str(ROOT))

from benchmarks import agreement  # noqa: E402
from benchmarks.cases import Batches, Case  # noqa: E402
from benchmarks.cuda_cases import Rotation  # noqa: E402
from benchmarks.cuda_peers import FULL_BF16, FULL_FP32, FULL_TF32, Liger  # noqa: E402
from benchmarks.device import CpuDevice, CudaDevice, StepTimes, time_steps  # noqa: E402
from benchmarks.peers import LINEAR_TORCH, OURS, FullMatrix  # noqa: E402


@pytest.mark.parametrize(
    "peer", [OURS, FULL_FP32, FULL_TF32, FULL_BF16, LINEAR_TORCH], ids=lambda peer: peer.name
)
@pytest.mark.parametrize("m", [1, 2])
def test_peers_agree_with_float64_on_the_checked_case(peer, m):
    errors = agreement.measure_errors(peer, Case(1, d=32, m=m, dtype="bf16"), "cpu")
    limit = 1e-5 if peer.dtype == "fp32" else 0.02
    assert max(errors.loss, errors.dq, errors.dp) < limit
    assert errors.small


def test_drift_is_checked_with_ours_and_left_out_with_peers():
    like = Case(1, d=32, dtype="fp64", drift="mean", center_over=2)
    errors = agreement.measure_errors(OURS, like, "cpu")
    assert max(errors.loss, errors.dq, errors.dp) < 1e-12
    assert agreement.measure_errors(LINEAR_TORCH, like, "cpu").small


def test_a_peer_that_computes_or_enqueues_something_else_is_found_out():
    class Forgetful(FullMatrix):
        def _enqueue(self, queries, passages):
            if not self.filled:
                super()._enqueue(queries, passages)

    class Scaled(FullMatrix):
        def step(self, queries, passages):
            loss, d_queries, d_passages = super().step(queries, passages)
            return loss, d_queries, 2 * d_passages

    for kind in (Forgetful, Scaled):
        peer = dataclasses.replace(FULL_FP32, build=kind)
        errors = agreement.measure_errors(peer, Case(1, d=32), "cpu")
        assert errors.dp > 0.01
    assert not errors.small  # twice dp


def test_worst_errors_keep_what_is_not_a_number():
    good, bad = agreement.Errors(0.0, 0.5, 0.01), agreement.Errors(0.1, math.nan, 0.0)
    for worst in (good.worse_of(bad), bad.worse_of(good)):
        assert (worst.loss, worst.dp) == (0.1, 0.01) and math.isnan(worst.dq)
        assert not worst.small
    assert agreement.Errors(1e-3, 1e-3, 1e-3).small


def test_published_kernels_are_given_all_rows_scaled_and_all_columns():
    """Liger's interface, by a stand-in that does what it documents."""
    case = Case(24, n=4, d=8, m=2, dtype="fp64")
    liger = object.__new__(Liger)
    FullMatrix.__init__(liger, case)
    liger._loss = lambda weight, rows, targets: torch.nn.functional.cross_entropy(
        rows @ weight.T, targets, reduction="sum"
    )
    full, batches = FullMatrix(case), Batches(case)
    for stepper in (liger, full):
        stepper.fill(*(t.detach() for t in Batches(case, count=1, seed=3).next()))
    for _ in range(8):
        batch = batches.next()
        for got, wanted in zip(liger.step(*batch), full.step(*batch), strict=True):
            torch.testing.assert_close(got, wanted)


def test_bursts_are_divided_by_their_steps():
    calls = []
    times = time_steps(CpuDevice(), lambda: calls.append(1), seconds=0.0, warmup=2)
    assert len(times.elapsed) == len(times.issued) == 3
    assert times.steps == 3 and len(calls) == 4  # slow at once: the first was for warmth
    both = StepTimes((1.0, 3.0), (0.5, 0.7), 4) + StepTimes((2.0,), (0.6,), 2)
    assert (both.median, both.host, both.steps) == (2.0, 0.6, 6)
    assert (both.p20, both.p80) == (pytest.approx(1.4), pytest.approx(2.6))


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="no CUDA device"):
        CudaDevice()


def test_a_gpu_times_counts_and_replays(device):
    if device != "cuda":
        pytest.skip("for a CUDA device")
    gpu = CudaDevice()
    assert gpu.label().endswith("-cuda") and gpu.cache_bytes() > 1 << 20
    assert 0 < gpu.free_bytes() <= gpu.total_bytes()
    assert "gpu" in gpu.describe()
    one_mib = torch.empty(1 << 18, device="cuda")
    assert gpu.peak_extra(lambda: one_mib + 1, 3) == 1 << 20
    rotation = Rotation(OURS, Case(64, n=4, d=32, dtype="bf16"), gpu, banks=2)
    times = time_steps(gpu, rotation.step, 0.02)
    assert min(times.elapsed) > 0 and min(times.issued) > 0
    replay = gpu.graph(rotation.step, 4)
    before = [int(stepper.bank.cursor[0]) for stepper in rotation.steppers]
    replay()
    after = [int(stepper.bank.cursor[0]) for stepper in rotation.steppers]
    assert after == [(head + 8) % 64 for head in before]
