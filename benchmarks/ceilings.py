"""What the machine can do at best, measured in the same run as what it is compared with.

A ceiling is the best of several methods and repetitions: a lower one would flatter us.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case, floor_seconds
from benchmarks.device import Device
from benchmarks.measure import time_calls

_BLOCK = 8192  # bank rows of the skinny shapes: more only adds memory traffic to the product


@dataclass(frozen=True)
class Ceilings:
    """Bytes and operations per second, by method; a later round can only raise them."""

    reading: dict[str, float]
    multiplying: dict[str, float]

    def best_reading(self) -> tuple[str, float]:
        return max(self.reading.items(), key=lambda item: item[1])

    def best_multiplying(self) -> tuple[str, float]:
        return max(self.multiplying.items(), key=lambda item: item[1])

    def floor(self, case: Case) -> float:
        """Seconds below which no step of this case can be."""
        return floor_seconds(case, self.best_reading()[1], self.best_multiplying()[1])

    def raised_by(self, other: Ceilings) -> Ceilings:
        return Ceilings(
            _larger(self.reading, other.reading), _larger(self.multiplying, other.multiplying)
        )


def _larger(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    return {key: max(a.get(key, 0.0), b.get(key, 0.0)) for key in {**a, **b}}


def measure_reading(case: Case, seconds: float) -> dict[str, float]:
    """Bytes per second of reading a buffer as large as both banks once; {method: rate}.

    All methods read it as float32, whatever the bank holds: only bytes matter here.
    """
    rows = max(1, case.bank_bytes() // (4 * case.d))
    buffer = torch.randn(rows, case.d)
    flat, vector = buffer.view(-1), torch.randn(case.d)
    methods: dict[str, Callable[[], Tensor]] = {
        "sum": flat.sum,
        "norm": flat.norm,
        "amax": flat.amax,
        "dot": lambda: torch.dot(flat, flat),
        "matrix x vector": lambda: buffer @ vector,
    }
    size = buffer.numel() * buffer.element_size()
    each = seconds / len(methods)
    return {name: size / _best(call, each) for name, call in methods.items()}


def matmul_shapes(case: Case) -> dict[str, tuple[int, int, int]]:
    """(rows, inner, columns) of the products timed: large squares, and those of the op itself."""
    block, local = min(case.slots, _BLOCK), case.n * case.m
    return {
        "1024^3": (1024, 1024, 1024),
        "2048^3": (2048, 2048, 2048),
        f"{block} x {case.d} x 1024": (block, case.d, 1024),
        f"scores {block} x {case.d} x {local}": (block, case.d, local),
        f"weighted sum {local} x {block} x {case.d}": (local, block, case.d),
    }


def measure_multiplying(case: Case, seconds: float) -> dict[str, float]:
    """Operations per second of the library's matrix product, in float32 and in the bank's dtype."""
    dtypes = {"fp32": torch.float32, case.dtype: case.torch_dtype}
    if case.dtype == "fp64":
        del dtypes["fp32"]  # fp64 work cannot be done at fp32's rate
    shapes = matmul_shapes(case)
    each = seconds / (len(shapes) * len(dtypes))
    rates = {}
    for dtype_name, dtype in dtypes.items():
        for shape_name, (rows, inner, columns) in shapes.items():
            a = torch.randn(rows, inner).to(dtype)
            b = torch.randn(inner, columns).to(dtype)
            out = torch.empty(rows, columns, dtype=dtype)
            best = _best(functools.partial(torch.mm, a, b, out=out), each)
            rates[f"{dtype_name} {shape_name}"] = 2 * rows * inner * columns / best
    return rates


def square_product_rate(device: Device, size: int, dtype: torch.dtype, bursts: int = 20) -> float:
    """Operations per second of the library's product of two square matrices, at best.

    Args:
        device: where.
        size: of both matrices; random, since zeros draw less power and let the clock rise.
        dtype: of both.
        bursts: of five products each; the fastest counts.
    """
    a, b = (torch.randn(size, size, device=device.name).to(dtype) for _ in range(2))
    call = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
    return 2 * size**3 * call_rate(device, call, bursts)


def call_rate(device: Device, call: Callable[[], object], bursts: int = 20) -> float:
    """Calls per second in the fastest of bursts of five."""
    device.burst(call, 3)
    return 5 / min(device.burst(call, 5)[0] for _ in range(bursts))


def _best(call: Callable[[], object], seconds: float) -> float:
    return min(time_calls(call, seconds, warmup=2).wall)
