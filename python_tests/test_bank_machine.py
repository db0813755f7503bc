"""DualMemoryBank against a plain list, under any order of operations."""

from __future__ import annotations

import copy
import io
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scratch_tables import scratch_table
from strategies import MAX_ID, NARROW, TEMPERATURES, examples, layouts
from tolerances import Kernels, Sizes, assert_scalar, assert_table, bounds
from torch import Tensor

import contaccum_ext as ca
from contaccum_ext import reference
from contaccum_ext.reference import accumulation_dtype

LARGEST = 6.0  # no component of randn's few thousand draws is larger


class Slot(NamedTuple):
    query: Tensor  # (d,)
    passages: Tensor  # (m, d)
    ids: Tensor  # (m,)


def bits(bank: ca.DualMemoryBank) -> dict[str, Tensor]:
    """All state of a bank, copied."""
    return {name: tensor.clone() for name, tensor in bank.state_dict().items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class BankAgainstList(RuleBasedStateMachine):
    """The list holds the newest `capacity` slots enqueued, rounded as the bank rounded them."""

    device = "cpu"

    @initialize(
        capacity=st.integers(1, 20),
        d=st.integers(1, 18),
        m=st.integers(1, 3),
        layout=st.one_of(st.none(), layouts),
        ids=st.booleans(),
        wide=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def begin(self, capacity, d, m, layout, ids, wide, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.ids, self.wide, self.temperature = ids, wide, 1.0
        dtype = torch.float64 if wide else torch.float32
        self.loss_fn = ca.ContAccumLoss(capacity, d, m, dtype=dtype, device=self.device)
        if layout is not None:
            self.loss_fn.bank = ca.DualMemoryBank(capacity, d, m, dtype, self.device, layout=layout)
        self.slots: list[Slot] = []
        self.written = 0
        self.table_scale: float | None = None  # None: no table yet, or one of vectors since rounded

    @property
    def bank(self) -> ca.DualMemoryBank:
        return self.loss_fn.bank

    def batch(self, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
        m, d = self.bank.passages_per_query, self.bank.dim
        kind = {"generator": self.generator, "dtype": torch.float64 if self.wide else torch.float32}
        q, p = torch.randn(n, d, **kind), torch.randn(n, m, d, **kind)
        ids = torch.randint(-1, MAX_ID, (n, m), generator=self.generator)
        return q.to(self.device), p.to(self.device), ids.to(self.device) if self.ids else None

    def append(self, q: Tensor, p: Tensor, ids: Tensor | None) -> None:
        if ids is None:
            ids = torch.full(p.shape[:2], -1, device=self.device)
        rounded = (q.to(self.bank.dtype), p.to(self.bank.dtype), ids)
        self.slots += [Slot(*parts) for parts in zip(*rounded, strict=True)]
        self.slots = self.slots[-self.bank.capacity :]
        self.written += len(q)

    def tolerances(self, n: int):
        norm = LARGEST * self.bank.dim**0.5
        sizes = Sizes(
            n,
            self.bank.passages_per_query,
            self.bank.dim,
            len(self.slots),
            scale=1 / min(TEMPERATURES),
            norm=norm,
            component=LARGEST,
            row_weight=1 / n,
        )
        return bounds(sizes, self.bank.dtype, Kernels(self.bank.bank_queries.device))

    @rule(n=st.integers(1, 25))
    def enqueue(self, n):
        batch = self.batch(n)
        self.bank.enqueue(*batch)
        self.append(*batch)
        if self.table_scale is None:
            self.table_scale = 1.0

    @rule(n=st.integers(1, 9), enqueue=st.booleans(), grad=st.booleans())
    def loss(self, n, enqueue, grad):
        q, p, ids = self.batch(n)
        q.requires_grad_(grad)
        arguments = (q, p, self.bank, self.temperature, ids)
        same = reference.contaccum_loss(*arguments, enqueue=False)
        exact = reference.contaccum_loss(*arguments, enqueue=False, compute_dtype=torch.float64)
        before = self.bank.queries()
        ours = ca.contaccum_loss(*arguments, enqueue=enqueue)
        assert_scalar("loss", ours, same, exact, self.tolerances(n).loss)
        if enqueue:
            self.append(q.detach(), p, ids)
        else:
            assert torch.equal(self.bank.queries(), before)
        self.table_scale = 1 / self.temperature

    @rule(n=st.integers(1, 9))
    def train_mode_loss(self, n):
        q, p, ids = self.batch(n)
        self.loss_fn.train()
        self.loss_fn.temperature = self.temperature
        self.loss_fn(q, p, ids)
        self.append(q, p, ids)
        self.table_scale = 1 / self.temperature

    @rule(n=st.integers(1, 9))
    def eval_mode_loss(self, n):
        q, p, ids = self.batch(n)
        before = bits(self.bank)
        loss = self.loss_fn.eval()(q, p, ids)
        assert torch.equal(loss, ca.contaccum_loss(q, p, None, self.loss_fn.temperature, ids))
        assert same_bits(before, bits(self.bank))

    @rule()
    def clear(self):
        self.bank.clear()
        self.slots, self.written, self.table_scale = [], 0, None

    @rule(value=st.sampled_from(TEMPERATURES))
    def change_temperature(self, value):
        self.temperature = value

    @rule(value=st.one_of(st.none(), st.integers(1, 25)))
    def window(self, value):
        self.bank.window = value

    @rule()
    def save_and_load(self):
        file = io.BytesIO()
        torch.save(self.loss_fn.state_dict(), file)
        file.seek(0)
        b = self.bank
        self.loss_fn.bank = ca.DualMemoryBank(
            b.capacity, b.dim, b.passages_per_query, b.dtype, self.device, layout=b.layout
        )
        self.loss_fn.load_state_dict(torch.load(file))
        assert same_bits(bits(b), bits(self.bank))

    @rule()
    def deepcopy(self):
        self.loss_fn = copy.deepcopy(self.loss_fn)

    @precondition(lambda self: not self.wide)
    @rule(dtype=st.sampled_from(NARROW))
    def cast(self, dtype):
        """`.to(dtype)` rounds the representations; the table is made anew at the next call."""
        changed = dtype != self.bank.dtype
        self.loss_fn.to(dtype)
        assert self.bank.dtype == dtype
        self.slots = [Slot(s.query.to(dtype), s.passages.to(dtype), s.ids) for s in self.slots]
        if changed:
            self.table_scale = None

    def refuse(self, *arguments, **options):
        before = bits(self.bank)
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            ca.contaccum_loss(*arguments, **options)
        assert same_bits(before, bits(self.bank))

    @rule()
    def refused(self):
        q, p, ids = self.batch(2)
        self.refuse(q[:, :0], p, self.bank, 1.0, ids)
        self.refuse(q, p[:1], self.bank, 1.0, ids)
        self.refuse(q, p, self.bank, 0.0, ids)
        self.refuse(q, p, self.bank, 1.0, ids, banks="every")

    @precondition(lambda self: self.slots)
    @rule()
    def refused_mixture_of_ids(self):
        q, p, _ = self.batch(2)
        other = None if self.ids else torch.zeros_like(p[..., 0], dtype=torch.int64)
        self.refuse(q, p, self.bank, 1.0, other)

    @invariant()
    def contents(self):
        if not hasattr(self, "slots"):
            return
        bank, m, d = self.bank, self.bank.passages_per_query, self.bank.dim
        assert len(bank) == len(self.slots) == min(self.written, bank.capacity)
        assert bank.queries().shape == (len(self.slots), d)
        assert bank.passages().shape == (len(self.slots), m, d)
        got = zip(bank.queries(), bank.passages(), bank.passage_ids(), strict=True)
        for slot, banked in zip(self.slots, got, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(slot, banked, strict=True))
        assert bank.has_ids is (self.ids if self.slots else None)
        assert bank.block_lse.dtype == bank.means.dtype == accumulation_dtype(bank.dtype)

    @invariant()
    def invariant_t(self):
        if getattr(self, "table_scale", None) is None:
            return
        exact = scratch_table(self.bank, self.written, self.table_scale)
        assert_table(self.bank.table(), exact, self.tolerances(1).table)


def test_bank_against_list(device):
    machine = type("Machine", (BankAgainstList,), {"device": device})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples(60), stateful_step_count=25)
    )
