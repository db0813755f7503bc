"""Every refused loss names the argument, what was expected and what came, and writes nothing."""

from __future__ import annotations

import math

import pytest
import torch

import contaccum_ext as ca

D, M, N = 4, 2, 3


def bank_with(device, ids: bool = False, slots: int = 5, dtype=torch.float32, **options):
    torch.manual_seed(0)
    bank = ca.DualMemoryBank(7, D, M, dtype, device, layout=ca.BankLayout(1, 2, 4), **options)
    kind = {"dtype": dtype, "device": device}
    if slots:
        given = torch.arange(slots * M, device=device).view(slots, M) if ids else None
        bank.enqueue(torch.randn(slots, D, **kind), torch.randn(slots, M, D, **kind), given)
    return bank


def good(device, dtype=torch.float32):
    return {
        "queries": torch.randn(N, D, dtype=dtype, device=device),
        "passages": torch.randn(N, M, D, dtype=dtype, device=device),
    }


def ids(device, *shape: int, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype, device=device)


# name: (arguments to replace in a good call, exception, what its message must contain)
CASES = {
    "queries rank 1": ({"queries": torch.zeros(D)}, ValueError, ["queries", "(n, d)", "(4,)"]),
    "queries rank 3": ({"queries": torch.zeros(1, N, D)}, ValueError, ["queries", "(1, 3, 4)"]),
    "queries other d": (
        {"queries": torch.zeros(N, D + 1)},
        RuntimeError,
        ["queries", "(3, 4)", "(3, 5)"],
    ),
    "no queries": ({"queries": torch.zeros(0, D)}, RuntimeError, ["queries", "at least one"]),
    "an empty batch": (
        {"queries": torch.zeros(0, D), "passages": torch.zeros(0, M, D)},
        RuntimeError,
        ["queries", "at least one", "(0, 4)"],
    ),
    "queries int": (
        {"queries": torch.zeros(N, D, dtype=torch.int64)},
        RuntimeError,
        ["queries", "float32", "int64"],
    ),
    "queries bool": (
        {"queries": torch.zeros(N, D, dtype=torch.bool)},
        RuntimeError,
        ["queries", "bool"],
    ),
    "queries complex": (
        {"queries": torch.zeros(N, D, dtype=torch.complex64)},
        RuntimeError,
        ["queries", "float32"],
    ),
    "queries a list": ({"queries": [[0.0] * D] * N}, TypeError, ["queries", "tensor", "list"]),
    "queries None": ({"queries": None}, TypeError, ["queries", "tensor", "NoneType"]),
    "queries on meta": (
        {"queries": torch.zeros(N, D, device="meta")},
        ValueError,
        ["queries", "device", "meta"],
    ),
    "passages rank 1": (
        {"passages": torch.zeros(D)},
        ValueError,
        ["passages", "(n, m, d)", "(4,)"],
    ),
    "passages rank 4": (
        {"passages": torch.zeros(N, M, D, 1)},
        ValueError,
        ["passages", "(3, 2, 4, 1)"],
    ),
    "passages without m": (
        {"passages": torch.zeros(N, D)},
        RuntimeError,
        ["passages", "(3, 2, 4)"],
    ),
    "passages other n": (
        {"passages": torch.zeros(N + 1, M, D)},
        RuntimeError,
        ["passages", "(3, 2, 4)", "(4, 2, 4)"],
    ),
    "passages other m": (
        {"passages": torch.zeros(N, M + 1, D)},
        RuntimeError,
        ["passages", "(3, 2, 4)", "(3, 3, 4)"],
    ),
    "passages other d": (
        {"passages": torch.zeros(N, M, D - 1)},
        RuntimeError,
        ["passages", "(3, 2, 4)", "(3, 2, 3)"],
    ),
    "passages int": (
        {"passages": torch.zeros(N, M, D, dtype=torch.int32)},
        RuntimeError,
        ["passages", "float32", "int32"],
    ),
    "passages other dtype than queries": (
        {"passages": torch.zeros(N, M, D, dtype=torch.bfloat16)},
        RuntimeError,
        ["passages", "float32", "bfloat16"],
    ),
    "passages a float": ({"passages": 1.0}, TypeError, ["passages", "tensor", "float"]),
    "passages on meta": (
        {"passages": torch.zeros(N, M, D, device="meta")},
        ValueError,
        ["passages", "device", "meta"],
    ),
    "float64 into a float32 bank": (
        {
            "queries": torch.zeros(N, D, dtype=torch.float64),
            "passages": torch.zeros(N, M, D, dtype=torch.float64),
        },
        RuntimeError,
        ["queries", "float32", "float64"],
    ),
    "temperature zero": ({"temperature": 0.0}, ValueError, ["temperature", "positive", "0.0"]),
    "temperature negative": ({"temperature": -0.5}, ValueError, ["temperature", "-0.5"]),
    "temperature nan": ({"temperature": math.nan}, ValueError, ["temperature", "nan"]),
    "temperature inf": ({"temperature": math.inf}, ValueError, ["temperature", "inf"]),
    "temperature too small to invert": ({"temperature": 1e-320}, None, ["temperature"]),
    "temperature a bool": ({"temperature": True}, TypeError, ["temperature", "number", "bool"]),
    "temperature a string": ({"temperature": "1"}, TypeError, ["temperature", "number", "str"]),
    "temperature None": ({"temperature": None}, TypeError, ["temperature", "NoneType"]),
    "row_weighting misspelt": (
        {"row_weighting": "locl"},
        ValueError,
        ["row_weighting", "local", "all", "locl"],
    ),
    "banks misspelt": ({"banks": "passage"}, ValueError, ["banks", "passages", "'passage'"]),
    "bank a module": ({"bank": torch.nn.Linear(2, 2)}, TypeError, ["bank", "Linear"]),
    "bank the class": ({"bank": ca.DualMemoryBank}, TypeError, ["bank", "DualMemoryBank"]),
    "bank a ContAccumLoss": (
        {"bank": ca.ContAccumLoss(7, D, M)},
        TypeError,
        ["bank", "ContAccumLoss"],
    ),
    "ids for a bank without": (
        {"passage_ids": ids("cpu", N, M)},
        ValueError,
        ["passage_ids", "without ids", "clear"],
    ),
}

# The same, for a bank that was filled with ids.
ID_CASES = {
    "none": (None, ValueError, ["passage_ids", "with ids", "clear"]),
    "rank 1": (ids("cpu", N * M), RuntimeError, ["passage_ids", "(3, 2)", "(6,)"]),
    "other n": (ids("cpu", N - 1, M), RuntimeError, ["passage_ids", "(3, 2)", "(2, 2)"]),
    "other m": (ids("cpu", N, M - 1), RuntimeError, ["passage_ids", "(3, 2)", "(3, 1)"]),
    "int32": (ids("cpu", N, M, dtype=torch.int32), RuntimeError, ["passage_ids", "int64", "int32"]),
    "float": (ids("cpu", N, M, dtype=torch.float32), RuntimeError, ["passage_ids", "int64"]),
    "a list": ([[0] * M] * N, TypeError, ["passage_ids", "tensor", "list"]),
    "on meta": (ids("meta", N, M), ValueError, ["passage_ids", "device", "meta"]),
}


def state(bank) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in bank.state_dict().items()}


def assert_same_state(bank, before) -> None:
    for name, tensor in bank.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def assert_refused(bank, call, kind, words) -> None:
    """kind None: any of the three promised types."""
    before = state(bank)
    with pytest.raises(kind or (TypeError, ValueError, RuntimeError)) as caught:
        call()
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert_same_state(bank, before)


@pytest.mark.parametrize("drift", ["none", "mean"])
@pytest.mark.parametrize("name", CASES)
def test_a_bad_argument_is_refused(device, name, drift):
    changed, kind, words = CASES[name]
    bank = bank_with(device, drift=drift)
    # Another temperature and window than the table's: a refused call must not even rebuild it.
    bank.window = 2
    arguments = {**good(device), "bank": bank, "temperature": 0.5}
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for name, value in changed.items()
    }
    arguments.update(moved)
    assert_refused(bank, lambda: ca.contaccum_loss(**arguments), kind, words)
    # And with gradients wanted, through autograd.
    if isinstance(arguments["queries"], torch.Tensor) and arguments["queries"].is_floating_point():
        arguments["queries"].requires_grad_()
        assert_refused(bank, lambda: ca.contaccum_loss(**arguments), kind, words)
    assert ca.contaccum_loss(**good(device), bank=bank).isfinite()


@pytest.mark.parametrize("name", ID_CASES)
def test_bad_ids_are_refused(device, name):
    given, kind, words = ID_CASES[name]
    bank = bank_with(device, ids=True)
    if isinstance(given, torch.Tensor) and not given.is_meta:
        given = given.to(device)
    call = {**good(device), "bank": bank, "passage_ids": given}
    assert_refused(bank, lambda: ca.contaccum_loss(**call), kind, words)
    call["passage_ids"] = ids(device, N, M)
    assert ca.contaccum_loss(**call).isfinite()


def test_ids_may_change_after_clear(device):
    bank = bank_with(device, ids=True)
    bank.clear()
    assert bank.has_ids is None
    ca.contaccum_loss(**good(device), bank=bank)
    assert bank.has_ids is False


def test_a_loss_that_enqueues_nothing_decides_nothing_about_ids(device):
    bank = bank_with(device, slots=0)
    ca.contaccum_loss(**good(device), bank=bank, passage_ids=ids(device, N, M), enqueue=False)
    assert bank.has_ids is None
    ca.contaccum_loss(**good(device), bank=bank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_into_a_float64_bank_are_refused(device, dtype):
    bank = bank_with(device, dtype=torch.float64)
    call = {**good(device, dtype), "bank": bank}
    assert_refused(bank, lambda: ca.contaccum_loss(**call), RuntimeError, ["queries", "float64"])


def test_enqueue_refuses_as_the_loss_does(device):
    bank = bank_with(device)
    q, p = good(device).values()
    assert_refused(bank, lambda: bank.enqueue(q[:, 1:], p), RuntimeError, ["queries", "(3, 3)"])
    assert_refused(bank, lambda: bank.enqueue(q, p[:, :1]), RuntimeError, ["passages", "(3, 1, 4)"])
    assert_refused(bank, lambda: bank.enqueue(q, p, ids(device, N, M)), ValueError, ["passage_ids"])


BAD_BANKLESS = [
    *("queries rank 1", "no queries", "queries int", "queries None", "queries a list"),
    *("passages other n", "passages other d", "passages int", "passages a float"),
    "temperature zero",
]


@pytest.mark.parametrize("name", BAD_BANKLESS)
def test_the_same_refusals_without_a_bank(name):
    changed, kind, _ = CASES[name]
    with pytest.raises(kind, match=next(iter(changed))):
        ca.contaccum_loss(**{**good("cpu"), **changed}, bank=None)
