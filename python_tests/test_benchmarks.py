"""The benchmarked peers do the same work; floor, timing and memory are what they are said to be.

No test asserts a time.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from contaccum_ext import reference

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # benchmarks/ is not installed with the package
    sys.path.insert(0, str(ROOT))

from benchmarks import lap, memory  # noqa: E402
from benchmarks.cases import TEMPERATURE, Batches, Case, floor_seconds, make_vectors  # noqa: E402
from benchmarks.ceilings import Ceilings, matmul_shapes  # noqa: E402
from benchmarks.measure import Timing, percentile, time_calls  # noqa: E402
from benchmarks.peers import FULL_MATRIX, LINEAR_TORCH, OURS, PEERS, find  # noqa: E402

CEILINGS = Ceilings({"sum": 40e9, "norm": 50e9}, {"1024^3": 200e9, "2048^3": 100e9})


def leaves(case: Case, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    queries, passages = make_vectors(case, n, seed)
    return queries.requires_grad_(), passages.requires_grad_()


def assert_step_equals_reference(stepper, bank, case: Case, n: int, seed: int) -> None:
    queries, passages = leaves(case, n, seed)
    wanted_queries, wanted_passages = leaves(case, n, seed)
    wanted = reference.contaccum_loss(wanted_queries, wanted_passages, bank, TEMPERATURE)
    wanted.backward()
    loss, d_queries, d_passages = stepper.step(queries, passages)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=1e-12)
    for got, leaf in ((d_queries, wanted_queries), (d_passages, wanted_passages)):
        torch.testing.assert_close(got, leaf.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize(("slots", "m"), [(40, 1), (37, 2), (16, 3)])
def test_every_peer_does_the_work_of_the_reference_from_empty_over_two_laps(peer, slots, m):
    case = Case(slots, n=3, d=8, m=m, dtype="fp64")
    stepper, bank = peer.build(case), reference.DualMemoryBank(slots, 8, m, torch.float64)
    written = seed = 0
    while written < 2 * slots + 7:
        n = (3, 1, 5, 2)[seed % 4]  # odd sizes wrap and cross blocks in the middle of a batch
        assert_step_equals_reference(stepper, bank, case, n, seed)
        written, seed = written + n, seed + 1


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_filled_peer_goes_on_as_the_reference_does(peer):
    case = Case(24, n=4, d=8, m=2, dtype="fp64")
    stepper, bank = peer.build(case), reference.DualMemoryBank(24, 8, 2, torch.float64)
    vectors = make_vectors(case, 24, seed=0)
    stepper.fill(*vectors)
    bank.enqueue(*vectors)
    for seed in range(1, 9):
        assert_step_equals_reference(stepper, bank, case, case.n, seed)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_peer_takes_the_narrower_dtypes(peer, dtype):
    case = Case(32, n=4, d=8, dtype=dtype)
    stepper, bank = peer.build(case), reference.DualMemoryBank(32, 8, 1, case.torch_dtype)
    vectors = make_vectors(case, 32, seed=0)
    stepper.fill(*vectors)
    bank.enqueue(*vectors)
    queries, passages = leaves(case, 4, seed=1)
    wanted = reference.contaccum_loss(*leaves(case, 4, seed=1), bank, TEMPERATURE)
    loss, d_queries, _ = stepper.step(queries, passages)
    assert d_queries.dtype == case.torch_dtype and not loss.requires_grad
    # Scores near 20, rounded to the peers' dtype: 8 bits of them in bf16.
    tolerance = {"bf16": 2e-2, "fp16": 5e-3, "fp32": 1e-5}[dtype]
    torch.testing.assert_close(loss.double(), wanted.detach().double(), rtol=tolerance, atol=0)


def test_linear_peer_refuses_what_its_table_cannot_hold():
    stepper = LINEAR_TORCH.build(Case(16, n=2, d=4))
    stepper.fill(*make_vectors(Case(16, d=4), 16, seed=0))
    with pytest.raises(ValueError, match="expected at most 12, got 13"):
        stepper.step(*leaves(Case(16, d=4), 13, seed=1))
    with pytest.raises(ValueError, match="expected 16 for an empty bank"):
        stepper.fill(*make_vectors(Case(16, d=4), 16, seed=0))


def test_peers_say_what_they_lack_and_are_found_by_name():
    assert OURS.lacks == ""
    for peer in (FULL_MATRIX, LINEAR_TORCH):
        assert "drift" in peer.lacks and "masking" in peer.lacks
        assert find(peer.name) is peer
    with pytest.raises(ValueError, match="nobody"):
        find("nobody")


def test_table_bytes_are_those_of_the_buffers():
    case = Case(64, n=4, d=8)
    bank = OURS.build(case).bank
    kept = (bank.block_lse, bank.group_lse, bank.row_state, bank.means)
    assert OURS.build(case).table_bytes() == sum(t.nbytes for t in kept)
    assert FULL_MATRIX.build(case).table_bytes() == 0
    # width 8: 8 blocks, 9 sums, base, fresh, positive
    assert LINEAR_TORCH.build(case).table_bytes() == (8 + 9 + 3) * 64 * 4


def test_floor_is_the_longer_of_reading_and_multiplying():
    case = Case(32768, n=8, d=384, m=1, dtype="fp32")
    assert case.bank_bytes() == 32768 * 2 * 384 * 4
    assert case.operations() == 8 * 8 * 32768 * 384
    assert floor_seconds(case, 100e9, 200e9) == pytest.approx(805306368 / 200e9)
    assert floor_seconds(case, 10e9, 200e9) == pytest.approx(100663296 / 10e9)
    half = Case(1000, n=2, d=16, m=3, dtype="bf16")
    assert half.bank_bytes() == 1000 * 4 * 16 * 2
    assert half.operations() == 8 * 2 * 1000 * 3 * 16
    assert CEILINGS.floor(case) == floor_seconds(case, 50e9, 200e9)


def test_ceilings_only_rise():
    raised = CEILINGS.raised_by(Ceilings({"sum": 60e9, "norm": 1e9}, {"other": 1e9}))
    assert raised.reading == {"sum": 60e9, "norm": 50e9}
    assert raised.best_reading() == ("sum", 60e9)
    assert raised.best_multiplying() == ("1024^3", 200e9)
    shapes = matmul_shapes(Case(1000, n=4, d=16, m=2))
    assert shapes["scores 1000 x 16 x 8"] == (1000, 16, 8)
    assert shapes["weighted sum 8 x 1000 x 16"] == (8, 1000, 16)


@pytest.mark.parametrize(
    ("percent", "wanted"), [(0, 1.0), (20, 1.6), (50, 2.5), (80, 3.4), (100, 4.0)]
)
def test_percentile_is_linear_between_neighbours(percent, wanted):
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == pytest.approx(wanted)


def test_percentile_of_one_none_or_too_much():
    assert percentile([7.0], 20) == 7.0
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)
    with pytest.raises(ValueError, match="0 to 100"):
        percentile([1.0], 101)


def test_time_calls_counts_repetitions_but_not_the_warm_up():
    calls = []
    timing = time_calls(lambda: calls.append(1), seconds=0.0, warmup=2, at_least=5)
    assert (timing.repetitions, len(calls)) == (5, 7)
    both = timing + Timing((1.0,), 0.5)
    assert both.repetitions == 6
    assert both.cpu_mean == pytest.approx((timing.cpu_total + 0.5) / 6)


def test_batches_rotate():
    batches = Batches(Case(16, n=2, d=4), count=3)
    first = batches.next()
    others = [batches.next() for _ in range(2)]
    assert all(not torch.equal(first[0], q) for q, _ in others)
    again = batches.next()
    assert again[0] is first[0] and again[0].requires_grad and again[0].is_leaf


def test_steps_into_another_block():
    # blocks of 8, 8 and 4 slots, batches of 4: the last batch ends the short last block
    assert lap.crossing_steps(20, 8, 4) == [False, True, False, True, True]
    assert lap.crossing_steps(8, 8, 8) == [True]
    result = lap.LapResult(Case(12, n=4), 1, (1.0, 3.0, 2.0), (False, True, False))
    assert (result.median, result.slowest, result.crossing_median) == (2.0, 3.0, 3.0)
    assert result.slowest_crosses


def test_lap_visits_every_position():
    result = lap.run_lap(Case(32, n=4, d=8), laps=2)
    assert len(result.steps) == len(result.crossing) == 8
    assert all(math.isfinite(seconds) for seconds in result.steps)
    with pytest.raises(ValueError, match="divide"):
        lap.run_lap(Case(30, n=4, d=8), laps=1)


def test_out_of_memory_is_computed(monkeypatch):
    case = Case(65536, n=8)
    needed = 3 * (65536 + 8) ** 2 * 4
    assert FULL_MATRIX.peak_bytes(case) == needed
    assert (OURS.peak_bytes(case), LINEAR_TORCH.peak_bytes(case)) == (0, 0)
    monkeypatch.setattr(memory, "available_bytes", lambda: 24 << 30)
    assert memory.refusal(FULL_MATRIX, case) == "out of memory: would need 48.0 GiB"
    assert memory.refusal(FULL_MATRIX, Case(32768)) is None
    assert memory.refusal(OURS, case) is None


def test_peak_memory_sees_the_quadratic_matrix_and_no_such_thing_in_ours():
    case = Case(2048, n=4, d=16)
    one_matrix = (2048 + 4) ** 2 * 4
    full = memory.measure_peak(FULL_MATRIX, case, threads=1, limit_seconds=120)
    if not full.exact:
        pytest.skip("the peak resident size cannot be set back here")
    # The three copies that peak_bytes counts on, and less than half of another one besides.
    assert 2.9 * one_matrix < full.extra_bytes < 3.5 * one_matrix
    ours = memory.measure_peak(OURS, case, threads=1, limit_seconds=120)
    assert ours.extra_bytes < 0.25 * one_matrix
    assert ours.table_bytes == OURS.build(case).table_bytes()


def test_a_child_that_fails_says_how():
    with pytest.raises(RuntimeError, match=r"ended with 1: .*dim"):
        memory.measure_peak(OURS, Case(64, d=0), threads=1, limit_seconds=60)
