"""The cases of a GPU run, with the times they are to reach on one H100, and its ceilings."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.cases import Batches, Case, make_vectors
from benchmarks.ceilings import Ceilings, call_rate, square_product_rate
from benchmarks.cuda_peers import COMPILED, CUDA_PEERS
from benchmarks.device import Device, StepTimes, backward_in_calling_thread, time_steps
from benchmarks.peers import OURS, Peer

_MODEL = Case(0, n=128, d=768, m=1, dtype="bf16")
SWEEP_CASE = _MODEL
SWEEP_SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
# A compilation takes many seconds, for each shape once more: only the cases A to D are worth it.
_WITHOUT_COMPILED = tuple(peer for peer in CUDA_PEERS if peer is not COMPILED)


@dataclass(frozen=True)
class NamedCase:
    label: str
    case: Case
    target_ms: float | None = None  # of an eager step
    graph_target_ms: float | None = None  # of a step in a replayed graph
    peers: tuple[Peer, ...] = CUDA_PEERS


def _model(slots: int, **changes) -> Case:
    return dataclasses.replace(_MODEL, slots=slots, **changes)


# E is last: filling a million slots takes longest, and what is before it is then written.
CASES = (
    NamedCase("A", _model(2048, n=8, m=2), 0.12, 0.05),
    NamedCase("B", _model(8192, n=8, m=2), 0.15),
    NamedCase("C", _model(32768), 0.20),
    NamedCase("D", _model(65536), 0.35),
    NamedCase("C-mean", _model(32768, drift="mean"), peers=(OURS,)),
    NamedCase("D-mean", _model(65536, drift="mean"), peers=(OURS,)),
    NamedCase("C-all", _model(32768, drift="mean", center_over=16), peers=(OURS,)),
    NamedCase("D-all", _model(65536, drift="mean", center_over=16), peers=(OURS,)),
    NamedCase("C-d384", _model(32768, d=384), peers=_WITHOUT_COMPILED),
    NamedCase("C-d1024", _model(32768, d=1024), peers=_WITHOUT_COMPILED),
    NamedCase("C-d4096", _model(32768, d=4096), peers=_WITHOUT_COMPILED),
    NamedCase("E", _model(1 << 20, n=1024), 25.0),
)


def find_cases(labels: Sequence[str]) -> tuple[NamedCase, ...]:
    """In the order of CASES; ValueError names a label that is none."""
    unknown = set(labels) - {one.label for one in CASES}
    if unknown:
        known = ",".join(one.label for one in CASES)
        raise ValueError(f"cases: expected any of {known}, got {','.join(sorted(unknown))}")
    return tuple(one for one in CASES if one.label in labels)


def with_sweep(
    named: Sequence[NamedCase], case: Case, sizes: Sequence[int]
) -> tuple[NamedCase, ...]:
    """The cases and the sizes of a sweep that are not among them, E or any larger one last."""
    known = {one.case for one in named}
    sweep = [
        NamedCase(f"F={slots}", case.with_slots(slots), peers=_WITHOUT_COMPILED)
        for slots in sizes
        if case.with_slots(slots) not in known
    ]
    largest = max(sizes, default=0)
    before = [one for one in named if one.case.slots <= largest or not sweep]
    after = [one for one in named if one not in before]
    return (*before, *sweep, *after)


def banks_in_rotation(case: Case, cache_bytes: int) -> int:
    """Banks whose bytes together are at least twice the cache's, so that none stays in it."""
    return max(1, math.ceil(2 * cache_bytes / case.bank_bytes()))


class Rotation:
    """Full banks of one peer and local batches, both taken in turns."""

    def __init__(self, peer: Peer, case: Case, device: Device, banks: int) -> None:
        case = peer.case(case)
        vectors = make_vectors(case, case.slots, 0, device.name)
        self.steppers = []
        for _ in range(banks):
            stepper = peer.build(case, device.name)
            stepper.fill(*vectors)
            self.steppers.append(stepper)
        self._batches = Batches(case, device=device.name)
        self._next = 0

    def step(self) -> torch.Tensor:
        """One step on the next bank; returns its loss. The gradients are dropped."""
        stepper = self.steppers[self._next]
        self._next = (self._next + 1) % len(self.steppers)
        return stepper.step(*self._batches.next())[0]


@dataclass(frozen=True)
class HostFloor:
    """What no eager step of this host is faster than: `(x * 2).sum().backward()`, x one number."""

    times: StepTimes
    calling: StepTimes  # with the backward in the calling thread


def measure_host_floor(device: Device, seconds: float) -> HostFloor:
    """Both for so many seconds."""
    x = torch.ones(1, device=device.name, requires_grad=True)

    def step() -> None:
        (x * 2).sum().backward()

    times = time_steps(device, step, seconds)
    with backward_in_calling_thread():
        return HostFloor(times, time_steps(device, step, seconds))


def measure_ceilings(device: Device, size: int = 8192, copied: int = 2 << 30) -> Ceilings:
    """The best of 20 bursts each.

    Args:
        device: where.
        size: of the square bf16 matrices multiplied.
        copied: bytes of the buffer that is copied; counted twice, as read and as written.
    """
    source = torch.ones(copied // 4, device=device.name)
    copy = functools.partial(torch.empty_like(source).copy_, source)
    copies = call_rate(device, copy)
    multiplied = square_product_rate(device, size, torch.bfloat16)
    del source, copy
    device.release()
    return Ceilings(
        {f"copy of {copied / 2**20:.0f} MiB, read + written": 2 * copied * copies},
        {f"{size}^3 bf16": multiplied},
    )
