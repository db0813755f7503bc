"""What a bank, a layout and a state refuse, and that refusing changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from test_op_refusals import D, M, assert_refused, assert_same_state, bank_with, good, state
from torch import nn

import contaccum_ext as ca

CONSTRUCTORS = {
    "capacity zero": ({"capacity": 0}, ValueError, ["capacity", "0"]),
    "capacity negative": ({"capacity": -3}, ValueError, ["capacity", "-3"]),
    "capacity a float": ({"capacity": 4.0}, TypeError, ["capacity", "int", "float"]),
    "capacity a bool": ({"capacity": True}, TypeError, ["capacity", "int", "bool"]),
    "capacity None": ({"capacity": None}, TypeError, ["capacity", "NoneType"]),
    "dim zero": ({"dim": 0}, ValueError, ["dim", "0"]),
    "dim a string": ({"dim": "4"}, TypeError, ["dim", "str"]),
    "passages_per_query zero": ({"passages_per_query": 0}, ValueError, ["passages_per_query", "0"]),
    "dtype int64": ({"dtype": torch.int64}, TypeError, ["dtype", "float32", "int64"]),
    "dtype complex": ({"dtype": torch.complex64}, TypeError, ["dtype", "complex64"]),
    "dtype float8": ({"dtype": torch.float8_e4m3fn}, TypeError, ["dtype", "float8"]),
    "drift misspelt": ({"drift": "means"}, ValueError, ["drift", "none", "mean", "means"]),
    "drift None": ({"drift": None}, ValueError, ["drift", "None"]),
    "drift_decay one": ({"drift_decay": 1.0}, ValueError, ["drift_decay", "1.0"]),
    "drift_decay negative": ({"drift_decay": -0.1}, ValueError, ["drift_decay", "-0.1"]),
    "drift_decay nan": ({"drift_decay": math.nan}, ValueError, ["drift_decay", "nan"]),
    "drift_decay a string": ({"drift_decay": "0.9"}, TypeError, ["drift_decay", "str"]),
    "layout a tuple": ({"layout": (1, 1, 1)}, TypeError, ["layout", "BankLayout", "tuple"]),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_a_bad_constructor_argument_is_refused(name):
    changed, kind, words = CONSTRUCTORS[name]
    with pytest.raises(kind) as caught:
        ca.DualMemoryBank(**{"capacity": 4, "dim": D, **changed})
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "sizes",
    [(0, 1, 1), (1, 0, 1), (1, 1, 0), (2, 3, 6), (2, 4, 6), (-1, 1, 1), (1, -1, 1), (1, 1, -1)],
)
def test_a_layout_of_nothing_or_that_does_not_divide_is_refused(sizes):
    with pytest.raises(ValueError, match="layout: expected group"):
        ca.BankLayout(*sizes)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(0, ValueError), (-1, ValueError), (2.0, TypeError), ("all", TypeError), (True, TypeError)],
)
def test_a_bad_window_is_refused(device, value, kind):
    bank = bank_with(device)
    bank.window = 4
    assert_refused(bank, lambda: setattr(bank, "window", value), kind, ["window", "expected"])


def offsets(q=(4, D), p=(4, M, D)):
    return torch.ones(q), torch.ones(p)


OFFSETS = {
    "queries of other blocks": (
        *offsets(q=(3, D)),
        ValueError,
        ["query_offsets", "(4, 4)", "(3, 4)"],
    ),
    "queries of other d": (*offsets(q=(4, D + 1)), ValueError, ["query_offsets", "(4, 5)"]),
    "passages of other m": (*offsets(p=(4, 1, D)), ValueError, ["passage_offsets", "(4, 1, 4)"]),
    "passages of rank 2": (*offsets(p=(4, D)), ValueError, ["passage_offsets", "(4, 2, 4)"]),
    "queries nan": (offsets()[0] * math.nan, offsets()[1], ValueError, ["query_offsets", "finite"]),
    "passages inf": (
        offsets()[0],
        offsets()[1] * math.inf,
        ValueError,
        ["passage_offsets", "finite"],
    ),
    "queries a list": (
        [[0.0] * D] * 4,
        offsets()[1],
        TypeError,
        ["query_offsets", "tensor", "list"],
    ),
    "passages None": (offsets()[0], None, TypeError, ["passage_offsets", "tensor", "NoneType"]),
}


@pytest.mark.parametrize("name", OFFSETS)
def test_bad_offsets_are_refused(device, name):
    q, p, kind, words = OFFSETS[name]
    bank = bank_with(device)
    assert_refused(bank, lambda: bank.set_offsets(q, p), kind, words)


def test_offsets_by_hand_beside_running_means_are_refused(device):
    bank = bank_with(device, drift="mean")
    assert_refused(bank, lambda: bank.set_offsets(*offsets()), ValueError, ["drift", "mean"])


def other_state(**changed):
    shape = {"capacity": 7, "dim": D, "passages_per_query": M, "layout": ca.BankLayout(1, 2, 4)}
    return ca.DualMemoryBank(**{**shape, **changed}).state_dict()


STATES = {
    "another capacity": (other_state(capacity=6), ["bank_queries", "(7, 4)", "(6, 4)"]),
    "another dim": (other_state(dim=5), ["bank_queries", "(7, 5)"]),
    "another m": (other_state(passages_per_query=1), ["bank_passages", "(7, 1, 4)"]),
    "another dtype": (other_state(dtype=torch.bfloat16), ["bank_queries", "float32", "bfloat16"]),
    "another layout": (
        other_state(layout=ca.BankLayout(1, 1, 2)),
        ["block_lse", "(2, 7)", "(4, 7)", "layout=BankLayout(1, 1, 2)"],
    ),
    # Nine slots make two blocks, two groups and two offset blocks of either layout.
    "a layout of the same shapes": (
        other_state(capacity=9, layout=ca.BankLayout(4, 8, 8)),
        ["layout.group", "layout=BankLayout(4, 8, 8)"],
    ),
    # Its means are no running means: every banked vector would be shifted by the mean itself.
    "means of another lag": (other_state(drift="mean", drift_decay=0.5), ["drift_decay"]),
    "without drift correction": (other_state(drift="none"), ["drift"]),
    "nothing": ({}, ["bank_queries", "missing"]),
    "no cursor": ({k: v for k, v in other_state().items() if k != "cursor"}, ["cursor", "missing"]),
    "no extra state": (
        {k: v for k, v in other_state().items() if k != "_extra_state"},
        ["_extra_state", "missing"],
    ),
    "a short extra state": ({**other_state(), "_extra_state": torch.zeros(3)}, ["_extra_state"]),
    "an extra state of another kind": ({**other_state(), "_extra_state": None}, ["_extra_state"]),
    "a buffer that is no tensor": ({**other_state(), "cursor": [0, 0]}, ["cursor"]),
}


def target_for(name: str, device: str) -> ca.DualMemoryBank:
    if name == "a layout of the same shapes":
        return ca.DualMemoryBank(9, D, M, device=device, layout=ca.BankLayout(3, 6, 6))
    corrected = name in ("without drift correction", "means of another lag")
    return bank_with(device, drift="mean" if corrected else "none")


def test_a_layout_is_named_only_where_it_differs(device):
    with pytest.raises(RuntimeError) as caught:
        bank_with(device).load_state_dict(other_state(capacity=6))
    assert "layout=" not in str(caught.value)


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_another_bank_is_refused(device, name):
    given, words = STATES[name]
    bank = target_for(name, device)
    kind = (RuntimeError, TypeError, ValueError)
    assert_refused(bank, lambda: bank.load_state_dict(given), kind, words)


def test_strict_false_is_no_way_around(device):
    """Half a bank is no bank: missing buffers are refused whatever `strict` says."""
    bank = bank_with(device)
    half = {"cursor": torch.zeros(2, dtype=torch.int64)}
    words = ["bank_queries", "missing"]
    assert_refused(bank, lambda: bank.load_state_dict(half, strict=False), RuntimeError, words)


def test_a_refused_state_within_a_model_leaves_the_bank(device):
    model = nn.ModuleDict({"tower": nn.Linear(2, 2), "bank": bank_with(device)})
    before = state(model["bank"])
    given = model.state_dict()
    given["bank.bank_queries"] = torch.zeros(6, D)
    with pytest.raises(RuntimeError, match=r"bank\.bank_queries"):
        model.load_state_dict(given)
    assert_same_state(model["bank"], before)


@pytest.mark.parametrize("cursor", [[7, 7], [-1, 7], [0, 8], [3, 2], [0, -1]])
def test_a_corrupted_cursor_is_refused_at_the_next_call(cursor):
    """On the CPU: reading it from a GPU would make every step wait, so kernels clamp it there."""
    device = "cpu"
    bank = bank_with(device)
    given = state(bank)
    given["cursor"] = torch.tensor(cursor)
    bank.load_state_dict(given)
    call = {**good(device), "bank": bank}
    words = ["cursor", "7", str(cursor[0]), str(cursor[1])]
    assert_refused(bank, lambda: ca.contaccum_loss(**call), RuntimeError, words)
