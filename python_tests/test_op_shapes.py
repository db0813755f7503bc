"""Shapes beyond one tile, one task or one pass, against the oracle.

Histories with small banks never leave the first tile. The sizes here were chosen by the limits in
csrc/cpu: 64 rows and 128 columns to a tile, 64 local rows to a task, 32 partial sums, 16 MiB for
them.
"""

from __future__ import annotations

import pytest
import torch
from strategies import Setup, Step
from twins import Twins

import contaccum_ext as ca

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

CASES = {
    # n * m * d * 4 bytes > 16 MiB / 8: dp in two passes, 128 columns at a time. Offsets are not
    # zero: the slots of the first batch remember another mean than that of now.
    "two passes": (Setup(200, 384, 2, None, F32, F32, "none", True, 0.2), [100, 1500, 1500]),
    "two passes, drift": (Setup(150, 384, 2, None, F32, F32, "mean", False, 0.2), [70, 50, 1500]),
    "two passes, fp64": (Setup(90, 150, 2, None, F64, F64, "mean", True, 0.3), [50, 30, 1010, 30]),
    "two passes, no bank to speak of": (Setup(1, 384, 1, None, F32, F32, size=0.2), [1500, 1500]),
    # a batch as large as the bank, or just smaller
    "batch larger than the bank": (Setup(256, 24, 1, None, F64, F64), [300, 300, 255, 256, 257]),
    "batch about two blocks smaller": (
        Setup(256, 8, 1, None, F64, F64, "mean"),
        [256, 127, 128, 129],
    ),
    # a slot's passages fill a tile or more
    "m = 130": (Setup(9, 5, 130, ca.BankLayout(1, 2, 4), F64, F64, "mean", True), [4, 3, 1, 9, 5]),
    "m = 128": (Setup(9, 5, 128, ca.BankLayout(1, 2, 4), F64, F64), [4, 3, 1, 9, 5]),
    "m = 65": (Setup(20, 5, 65, None, F64, F64, "mean"), [8, 8, 8, 3]),
    # more local rows than a task has, more blocks than splits
    "n = 64, 65, 129": (
        Setup(300, 12, 1, ca.BankLayout(1, 2, 4), F64, F64, "mean"),
        [64, 65, 129] * 2,
    ),
    "blocks of one slot": (
        Setup(100, 6, 2, ca.BankLayout(1, 1, 1), F64, F64, "mean", True),
        [30, 40, 50],
    ),
    "one block": (
        Setup(100, 6, 2, ca.BankLayout(5, 25, 200), F64, F64, "mean", True),
        [30, 40, 50],
    ),
    "wide vectors": (Setup(40, 1030, 1, None, BF16, F32, "none", False, 0.1), [16, 16, 16]),
}


@pytest.mark.parametrize("name", CASES)
def test_shapes_beyond_one_tile(device, name):
    setup, sizes = CASES[name]
    twins = Twins(setup, device)
    for n in sizes:
        twins.run(Step("loss", n))


@pytest.mark.parametrize("capacity", [1023, 2048])
def test_default_layout_through_more_than_a_lap(device, capacity):
    """Blocks of 128 slots, groups of 8: upkeep of every kind, of every block."""
    twins = Twins(Setup(capacity, 8, 1, None, F64, F64, "mean", True), device)
    twins.run(Step("enqueue", capacity - 100))
    for n in (37, 41, 22, 150, 8, 8, 300, 5):
        twins.run(Step("loss", n))
    assert twins.oracle.written > capacity


def test_a_window_of_a_large_bank(device):
    twins = Twins(Setup(700, 8, 2, None, F64, F64, "mean"), device)
    twins.run(Step("enqueue", 800))
    for window in (1, 200, 500, None, 64):
        twins.run(Step("window", value=window))
        twins.run(Step("loss", 33))
    assert twins.bank.window < 300
