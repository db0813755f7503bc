"""The raw operator checks all that it is handed: compilers and exporters may call it too."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from test_op_refusals import D, M, N, assert_refused, bank_with, good, ids

# The raw operator: (position in the schema, replacement, word of the message).
RAW = {
    "queries of rank 1": (0, torch.zeros(D), "queries"),
    "passages of rank 2": (1, torch.zeros(N, D), "passages"),
    "bank_queries of another d": (4, torch.zeros(7, D + 1), "bank_passages"),
    "bank_queries strided": (4, torch.zeros(D, 7).t(), "bank_queries: expected a contiguous"),
    "bank_queries int": (4, torch.zeros(7, D, dtype=torch.int64), "bank_queries"),
    "bank_passages of another dtype": (5, torch.zeros(7, M, D).half(), "bank_passages"),
    "bank_passages without m": (5, torch.zeros(7, 0, D), "bank_passages"),
    "bank_ids of another shape": (6, ids("cpu", 7, M + 1), "bank_ids"),
    "bank_ids int32": (6, ids("cpu", 7, M, dtype=torch.int32), "bank_ids"),
    "cursor of three": (7, ids("cpu", 3), "cursor"),
    "cursor beyond the ring": (7, torch.tensor([7, 7]), "cursor"),
    "cursor negative": (7, torch.tensor([-1, 7]), "cursor"),
    "cursor of more slots than there are": (7, torch.tensor([0, 8]), "cursor"),
    "cursor of a gap": (7, torch.tensor([2, 4]), "cursor"),
    "block_lse of another capacity": (8, torch.zeros(2, 6), "block_lse"),
    "group_lse of another layout": (9, torch.zeros(3, 7), "group_lse"),
    "row_state short": (10, torch.zeros(5, 7), "row_state"),
    "means short": (11, torch.zeros(3, 1 + M, D), "means"),
    "companions of rank 2": (3, torch.zeros(N, D), "companions"),
    "companions of another d": (3, torch.zeros(N, 1, D + 1), "companions"),
    "companions of another dtype": (3, torch.zeros(N, 1, D).half(), "companions"),
    "expected of another layout": (12, torch.zeros(9, 7), "expected"),
    "expected of another dtype": (12, torch.zeros(10, 7).half(), "expected"),
    "layout of two": (13, [1, 2], "layout"),
    "layout that does not divide": (13, [2, 3, 6], "layout"),
    "layout of negative blocks": (13, [1, 1, -1], "expected"),
    "scale zero": (14, 0.0, "scale"),
    "scale nan": (14, math.nan, "scale"),
    "drift_decay one": (20, 1.0, "drift_decay"),
    "drift_decay nan": (20, math.nan, "drift_decay"),
    "rebuild unknown": (24, 3, "rebuild"),
    "the scale's gradient without expected scores": (22, True, "expected"),
}


def raw_arguments(bank, device: str = "cpu") -> list:
    y = bank.layout
    flags = [1.0, -1, False, True, True, False, -1.0, True, False, True, 0]
    sizes = [y.group, y.offset_block, y.block]
    return [*good(device).values(), None, None, *bank.buffers_in_order(), sizes, *flags]


@pytest.mark.parametrize("name", RAW)
def test_the_raw_operator_refuses(name):
    position, value, word = RAW[name]
    bank = bank_with("cpu")
    arguments = raw_arguments(bank)
    arguments[position] = value
    call = torch.ops.contaccum_ext.banked_loss_
    assert_refused(bank, lambda: call(*arguments), RuntimeError, [word])
    assert call(*raw_arguments(bank))[0].isfinite()


ZERO_LAYOUT = """
import torch
from test_op_raw import raw_arguments
from test_op_refusals import bank_with
arguments = raw_arguments(bank_with("cpu"))
arguments[13] = {layout}
try:
    torch.ops.contaccum_ext.banked_loss_(*arguments)
except RuntimeError as error:
    assert "layout" in str(error), error
else:
    raise SystemExit("accepted")
"""


@pytest.mark.parametrize("layout", [[1, 0, 0], [1, 1, 0]])
def test_the_raw_operator_refuses_a_layout_of_nothing(layout):
    """In a process of its own: dividing by zero would end this one."""
    code = f"import sys; sys.path[:0] = {sys.path!r}\n" + ZERO_LAYOUT.format(layout=layout)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
