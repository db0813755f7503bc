"""Where a run takes place: how bursts are timed there, memory is counted and graphs are replayed.

The suite's GPU runs know devices by this interface alone, so that a CPU can run them in tests.
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from benchmarks.measure import percentile

Call = Callable[[], object]
_LONGEST_BURST = 64  # steps


@dataclass(frozen=True)
class StepTimes:
    """Bursts of steps back to back, seconds a step."""

    elapsed: tuple[float, ...] = ()  # device clock, from before the first step to after the last
    issued: tuple[float, ...] = ()  # host clock, until the last call has returned
    steps: int = 0  # in all bursts together

    def __add__(self, other: StepTimes) -> StepTimes:
        return StepTimes(
            self.elapsed + other.elapsed, self.issued + other.issued, self.steps + other.steps
        )

    @property
    def median(self) -> float:
        return percentile(self.elapsed, 50)

    @property
    def p20(self) -> float:
        return percentile(self.elapsed, 20)

    @property
    def p80(self) -> float:
        return percentile(self.elapsed, 80)

    @property
    def host(self) -> float:
        return percentile(self.issued, 50)


class Device(Protocol):
    name: str  # torch's

    def label(self) -> str:
        """For the names of result files."""

    def describe(self) -> dict[str, str]:
        """For the head of the results."""

    def burst(self, call: Call, count: int) -> tuple[float, float]:
        """Seconds that `count` calls take on the device, and until the last one returned."""

    def peak_extra(self, call: Call, count: int) -> int | None:
        """Bytes allocated at the peak of `count` calls beyond those before; None if unknown."""

    def graph(self, call: Call, count: int) -> Call | None:
        """One call that replays `count` calls; None where there are no graphs."""

    def cache_bytes(self) -> int:
        """Of the largest cache."""

    def total_bytes(self) -> int: ...

    def free_bytes(self) -> int:
        """What a new tensor could have."""

    def release(self) -> None:
        """Give back memory that is cached for reuse."""


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's garbage collector, whose pauses are none of the steps' doing."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def backward_in_calling_thread() -> contextlib.AbstractContextManager[object]:
    """Autograd then hands nothing over to a thread of the device's, as it does by default."""
    return torch.autograd.set_multithreading_enabled(False)


class CpuDevice:
    """For tests of the suite: no events, no graphs, no counter of allocations."""

    name = "cpu"

    def label(self) -> str:
        return "cpu"

    def describe(self) -> dict[str, str]:
        return {}

    def burst(self, call: Call, count: int) -> tuple[float, float]:
        with _no_collection():
            start = time.perf_counter()
            for _ in range(count):
                call()
            seconds = time.perf_counter() - start
        return seconds, seconds

    def peak_extra(self, call: Call, count: int) -> int | None:
        return None

    def graph(self, call: Call, count: int) -> Call | None:
        return None

    def cache_bytes(self) -> int:
        return 0  # one bank is enough

    def total_bytes(self) -> int:
        return 4 << 30

    def free_bytes(self) -> int:
        return 4 << 30

    def release(self) -> None:
        pass


class CudaDevice:
    """The current CUDA device. All times are between events on the current stream."""

    name = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise SystemExit("benchmarks: --device cuda, but torch finds no CUDA device")
        self._properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def label(self) -> str:
        """'NVIDIA H100 80GB HBM3' -> 'h100-cuda'."""
        words = self._properties.name.lower().removeprefix("nvidia ").split()
        return f"{words[0]}-cuda"

    def describe(self) -> dict[str, str]:
        properties = self._properties
        found = {
            "gpu": properties.name,
            "gpu memory": f"{properties.total_memory / 2**30:.1f} GiB",
            "L2 cache": f"{self.cache_bytes() / 2**20:.0f} MiB",
            "cuda of torch": str(torch.version.cuda),
        }
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit"]
        try:
            told = subprocess.run(
                [*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
            )
            found["driver, highest clock, power limit"] = told.stdout.strip().splitlines()[0]
        except (OSError, subprocess.TimeoutExpired, IndexError):
            found["driver, highest clock, power limit"] = "unknown"
        return found

    def burst(self, call: Call, count: int) -> tuple[float, float]:
        torch.cuda.synchronize()
        with _no_collection():
            self._start.record()
            start = time.perf_counter()
            for _ in range(count):
                call()
            issued = time.perf_counter() - start
            self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3, issued

    def peak_extra(self, call: Call, count: int) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def graph(self, call: Call, count: int) -> Call | None:
        # What a first call sets up (library handles, lazily loaded kernels) may not be captured.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
        return graph.replay

    def cache_bytes(self) -> int:
        return self._properties.L2_cache_size

    def total_bytes(self) -> int:
        return self._properties.total_memory

    def free_bytes(self) -> int:
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + cached

    def release(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def open_device(name: str) -> Device:
    """'cpu' or 'cuda'."""
    return CudaDevice() if name == "cuda" else CpuDevice()


def told(error: Exception) -> str:
    """A line on an error: its kind and the first line of what it says."""
    said = (str(error).strip().splitlines() or [""])[0][:160]
    kind = "not installed" if isinstance(error, ImportError) else type(error).__name__
    return f"{kind}: {said}"


def time_steps(
    device: Device,
    call: Call,
    seconds: float,
    *,
    warmup: int = 3,
    burst_seconds: float = 0.02,
) -> StepTimes:
    """Repeat bursts of steps for about `seconds`, at least three of them.

    A burst is as long as `burst_seconds`, so that its start, where the device waits for the first
    launch, weighs little. A step that takes a quarter of `seconds` or more is timed three times,
    after one for warmth.
    """
    for _ in range(warmup):
        if device.burst(call, 1)[0] >= seconds / 4:
            break
    trial, trial_issued = device.burst(call, 1)
    if trial >= seconds / 4:
        return _bursts(device, call, [(trial, trial_issued)], 1, 0.0)
    trial = min(trial, device.burst(call, 4)[0] / 4)
    count = max(1, min(_LONGEST_BURST, round(burst_seconds / max(trial, 1e-6))))
    return _bursts(device, call, [], count, seconds)


def _bursts(
    device: Device, call: Call, found: Sequence[tuple[float, float]], count: int, seconds: float
) -> StepTimes:
    times, end = list(found), time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        times.append(device.burst(call, count))
    return StepTimes(
        tuple(elapsed / count for elapsed, _ in times),
        tuple(issued / count for _, issued in times),
        count * len(times),
    )
