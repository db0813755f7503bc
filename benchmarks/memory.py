"""Peak memory of a step beyond the bank, its table and the batch, a fresh process for each case.

How a few MiB are resolved:

- The kernel keeps the largest resident size of a process (VmHWM in /proc/self/status). It misses
  nothing between two samples, and writing 5 to /proc/self/clear_refs sets it back to the present
  size; so its growth over a few steps is the steps' own peak, exact to some pages. ru_maxrss is the
  same number without a way to set it back: filling the bank would hide the steps. It is the
  fallback where /proc cannot be written; growth below the earlier peak then reads as 0 (`exact` is
  False).
- The allocator must return what is freed, or steps would live on pages that the filling left: the
  child runs with fixed thresholds for mapping and trimming, and trims before it counts.
- A large matrix product and steps on a bank of 64 slots come first, so that thread stacks, code
  pages and most of the library's own buffers, which do not grow with the bank, are there before.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cases import Batches, Case, make_vectors
from benchmarks.peers import Peer, find

# Bytes; larger allocations are pages of their own and returned when freed.
_SMALLEST_MAPPED = 1 << 16
# At n = 8 so many steps go from one block of the table into the next. A quadratic peer has no table
# and its steps are alike.
_STEPS, _QUADRATIC_STEPS = 130, 2


@dataclass(frozen=True)
class PeakMemory:
    extra_bytes: int
    table_bytes: int
    steps: int
    exact: bool


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure_peak(peer: Peer, case: Case, threads: int, limit_seconds: float) -> PeakMemory:
    """Run the case in a child and return its peak; RuntimeError says how the child ended."""
    order = {"peer": peer.name, "case": dataclasses.asdict(case), "threads": threads}
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": str(_SMALLEST_MAPPED),
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    try:
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", json.dumps(order)],
            env=environment,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=limit_seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"memory: not done in {limit_seconds:.0f} s") from error
    if child.returncode != 0:
        last = child.stderr.strip().splitlines()[-1:] or [""]
        raise RuntimeError(f"memory: the child ended with {child.returncode}: {last[0]}")
    return PeakMemory(**json.loads(child.stdout.splitlines()[-1]))


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: no {field}")


class _Peak:
    """Growth of the peak resident size since construction."""

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status_bytes("VmRSS")
            self.exact = True
        except OSError:
            self._before = self._largest()
            self.exact = False

    @staticmethod
    def _largest() -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def growth(self) -> int:
        largest = _status_bytes("VmHWM") if self.exact else self._largest()
        return max(0, largest - self._before)


def _measure_here(peer: Peer, case: Case) -> PeakMemory:
    batches = Batches(case)
    square = torch.randn(2048, 2048)
    torch.mm(square, square, out=torch.empty_like(square))
    del square
    small = case.with_slots(min(64, case.slots))
    warm = peer.build(small)
    warm.fill(*make_vectors(small, small.slots, seed=0))
    for _ in range(3):
        warm.step(*batches.next())
    del warm
    stepper = peer.build(case)
    vectors = make_vectors(case, case.slots, seed=0)
    stepper.fill(*vectors)
    del vectors
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    steps = _QUADRATIC_STEPS if peer.quadratic_copies else _STEPS
    peak = _Peak()
    for _ in range(steps):
        stepper.step(*batches.next())
    return PeakMemory(peak.growth(), stepper.table_bytes(), steps, peak.exact)


def refusal(peer: Peer, case: Case) -> str | None:
    """Why the case is not run for want of memory, computed from its matrices; None if it fits."""
    needed = peer.peak_bytes(case)
    if needed <= 0.85 * available_bytes():
        return None
    return f"out of memory: would need {needed / 2**30:.1f} GiB"


def main(order: str) -> None:
    """The child: one case, its result as a line of JSON."""
    wanted = json.loads(order)
    torch.set_num_threads(wanted["threads"])
    result = _measure_here(find(wanted["peer"]), Case(**wanted["case"]))
    print(json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
    main(sys.argv[1])
