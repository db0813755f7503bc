"""A table rebuilt from scores that torch's library has computed, and by portable kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from tolerances import Kernels, Sizes, bounds
from torch.nn.functional import normalize

import contaccum_ext as ca
from contaccum_ext import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# capacity, enqueued, d, m, dtype, other arguments
CASES = {
    "float32": (600, 700, 48, 2, torch.float32, {}),
    "float64, odd sizes": (333, 400, 33, 3, torch.float64, {}),
    "partly filled": (600, 250, 48, 1, torch.float32, {}),
    "empty": (64, 0, 16, 1, torch.float32, {}),
    "one block": (40, 50, 16, 2, torch.float32, {"layout": ca.BankLayout(8, 40, 40)}),
    "groups of one, a short last block": (
        101,
        130,
        16,
        2,
        torch.float32,
        {"layout": ca.BankLayout(1, 2, 10)},
    ),
    "groups wider than a warp": (
        900,
        990,
        16,
        3,
        torch.float32,
        {"layout": ca.BankLayout(25, 25, 75)},
    ),
    "bfloat16 that tensor cores do not take": (600, 700, 33, 2, torch.bfloat16, {}),
    "float16 that tensor cores do not take": (600, 700, 33, 1, torch.float16, {}),
    "expected scores": (600, 700, 48, 2, torch.float32, {"learn_temperature": True}),
    "expected scores, float64": (333, 400, 33, 1, torch.float64, {"learn_temperature": True}),
    "both directions": (300, 350, 48, 2, torch.float32, {"symmetric": True}),
    "several chunks": (20000, 30000, 64, 2, torch.float32, {}),
}


def filled(name: str, with_ids: bool) -> ca.DualMemoryBank:
    capacity, enqueued, d, m, dtype, options = CASES[name]
    torch.manual_seed(0)
    bank = ca.DualMemoryBank(capacity, d, m, dtype, "cuda", "mean", **options)
    given = torch.float64 if dtype == torch.float64 else torch.float32
    for begin in range(0, enqueued, 1000):
        count = min(1000, enqueued - begin)
        vectors = normalize(torch.randn(count, 1 + m, d, device="cuda", dtype=given), dim=-1)
        ids = torch.randint(-1, 40, (count, m), device="cuda") if with_ids else None
        bank.enqueue(vectors[:, 0], vectors[:, 1:].contiguous(), ids)
    return bank


def rebuilt(bank: ca.DualMemoryBank, with_ids: bool) -> dict[str, torch.Tensor]:
    """All that the table holds at a temperature of 0.1, after a step that enqueues nothing."""
    bank, m = copy.deepcopy(bank), bank.passages_per_query
    given = torch.float64 if bank.dtype == torch.float64 else torch.float32
    vectors = normalize(torch.ones(1, 1 + m, bank.dim, device="cuda", dtype=given), dim=-1)
    ids = torch.full((1, m), -1, device="cuda") if with_ids else None
    for x in (bank, bank.mirror):  # nothing of the old table may do for the new one
        for buffer in () if x is None else (x.block_lse, x.group_lse, x.row_state):
            buffer.fill_(torch.nan)
    both = bank.mirror is not None
    loss = ca.contaccum_loss(
        vectors[:, 0], vectors[:, 1:], bank, 0.1, ids, enqueue=False, symmetric=both
    )
    found = {"loss": loss.detach()}
    for name, x in (("bank", bank), ("mirror", bank.mirror)):
        if x is None:
            continue
        slots = x.slots()
        found |= {f"{name} table": x.table(), f"{name} rows": entries(x)[:, slots]}
        found |= {f"{name} groups": x.group_lse[:, slots]}
        if x.learn_temperature:
            found |= {f"{name} expected": x.expected[:, slots]}
    return found


def entries(bank: ca.DualMemoryBank) -> torch.Tensor:
    """(5, C) what row_state holds, as log-sum-exps and scores."""
    rows = bank.row_state
    fresh = rows[ops.FRESH_MAX] + rows[ops.FRESH_SUM].log()
    names = (ops.ROW_LSE, ops.BASE_LSE, ops.OLD_LSE, ops.POSITIVE)
    return torch.stack([fresh, *(rows[name] for name in names)])


@pytest.mark.parametrize("with_ids", [False, True], ids=["no ids", "ids"])
@pytest.mark.parametrize("name", CASES)
def test_products_rebuild_the_table_that_portable_kernels_do(name, with_ids, allow_kernels):
    bank = filled(name, with_ids)
    found = []
    for family in ("library", "portable"):
        allow_kernels(family)
        found.append(rebuilt(bank, with_ids))
    m, averaged = bank.passages_per_query, bank.layout.offset_block
    sizes = Sizes(1, m, bank.dim, len(bank), 10.0, 1.01, 1.0, 1.0, averaged)
    bound = bounds(sizes, bank.dtype, Kernels("cuda"))
    atol = {"loss": bound.loss, "bank expected": bound.expected}
    for key, portable in found[1].items():
        # Groups that head's block has no use for are left as they were, by both.
        equal = {"rtol": 0, "atol": 2 * atol.get(key, bound.table), "equal_nan": True}
        torch.testing.assert_close(found[0][key], portable, **equal)
    assert len(bank) == 0 or found[1]["bank rows"][1].isfinite().all()
