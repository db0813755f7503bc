"""Random banks and random histories, and the pair of banks that runs through them.

hypothesis draws shapes, options and one seed; torch makes the data. `Twins` gives every call of a
history to the op and to the oracle and compares all there is to compare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from tolerances import Bounds, Kernels, Sizes, assert_gradient, assert_loss, assert_table, bounds
from torch import Tensor

import contaccum_ext as ca
from contaccum_ext import reference
from contaccum_ext.reference import accumulation_dtype

NARROW = (torch.float32, torch.bfloat16, torch.float16)
TEMPERATURES = (1.0, 0.2, 3.0, 0.05)
MAX_ID = 6  # few ids: many false negatives


def examples(count: int) -> int:
    """`count` in the profile `ci`, in proportion more where a profile has more."""
    return count * settings.default.max_examples // 100


@dataclass(frozen=True)
class Setup:
    """All that is fixed for one history."""

    capacity: int
    d: int
    m: int
    layout: ca.BankLayout | None = None
    bank_dtype: torch.dtype = torch.float64
    input_dtype: torch.dtype = torch.float64
    drift: str = "none"
    ids: bool = False
    size: float = 1.0  # standard deviation of a component
    seed: int = 0

    def bank(self, device: str) -> ca.DualMemoryBank:
        return ca.DualMemoryBank(
            self.capacity,
            self.d,
            self.m,
            self.bank_dtype,
            device,
            self.drift,
            layout=self.layout,
        )


@dataclass(frozen=True)
class Step:
    """One operation of a history: its kind, and what that kind needs."""

    kind: str
    n: int = 1
    value: Any = None
    options: dict[str, Any] = field(default_factory=dict)


layouts = st.builds(
    lambda group, offsets, blocks: ca.BankLayout(group, group * offsets, group * offsets * blocks),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 2),
)

# float64 banks twice: they show the smallest errors
dtypes = st.sampled_from(
    [(torch.float64, torch.float64)] * 4 + [(bank, given) for bank in NARROW for given in NARROW]
)


small = st.integers(1, 40)


@st.composite
def setups(draw, capacities=small, dims=small) -> Setup:
    bank_dtype, input_dtype = draw(dtypes)
    return Setup(
        capacity=draw(capacities),
        d=draw(st.one_of(st.sampled_from([1, 15, 16, 17, 33]), dims)),
        m=draw(st.integers(1, 3)),
        layout=draw(st.one_of(st.none(), layouts, layouts, layouts)),
        bank_dtype=bank_dtype,
        input_dtype=input_dtype,
        drift=draw(st.sampled_from(["none", "mean"])),
        ids=draw(st.booleans()),
        size=draw(st.sampled_from([1.0, 1.0, 0.1, 4.0])),
        seed=draw(st.integers(0, 2**31)),
    )


@st.composite
def steps(draw, capacity: int) -> Step:
    """Mostly losses; small batches mostly, now and then one larger than the bank."""
    kinds = ["loss"] * 12 + ["window", "temperature", "offsets", "reload", "enqueue", "clear"]
    kind = draw(st.sampled_from(kinds))
    if kind == "window":
        return Step(kind, value=draw(st.one_of(st.none(), st.integers(1, capacity))))
    if kind == "temperature":
        return Step(kind, value=draw(st.sampled_from(TEMPERATURES)))
    if kind in ("offsets", "reload", "clear"):
        return Step(kind)
    sizes = st.one_of(st.integers(1, 9), st.integers(1, 9), st.integers(1, capacity + 20))
    n = draw(sizes)
    if kind == "enqueue":
        return Step(kind, n)
    options = {
        "row_weighting": draw(st.sampled_from(["local", "all"])),
        "enqueue": draw(st.sampled_from([True] * 7 + [False])),
        "banks": draw(st.sampled_from(["both", "both", "both", "passages", "queries"])),
    }
    return Step(kind, n, options=options)


@st.composite
def histories(draw, setup=None, longest: int = 20) -> tuple[Setup, list[Step]]:
    """A bank, half the time with a window from the start, and enough steps to go round it."""
    drawn = draw(setups() if setup is None else setup)
    window = Step("window", value=draw(st.one_of(st.none(), st.integers(1, drawn.capacity))))
    return drawn, [window, *draw(st.lists(steps(drawn.capacity), min_size=6, max_size=longest))]


class ExactBank(reference.DualMemoryBank):
    """The oracle's bank with running means in float64, whatever the bank's dtype."""

    def clear(self) -> None:
        super().clear()
        self.mean = self.mean.double()


def scratch_table(bank: ca.DualMemoryBank, written: int, scale: float) -> Tensor:
    """Invariant T from its definition: (F, blocks) float64, from the banked vectors and ids alone.

    `written` is the number of slots ever written, from which the ring positions follow.
    """
    q, p, ids = bank.queries().double(), bank.passages().double(), bank.passage_ids()
    filled, width = len(ids), bank.layout.block
    slot = (torch.arange(written - filled, written) % bank.capacity).to(q.device)
    scores = scale * torch.einsum("id,jkd->ijk", q, p)
    same = (ids[:, :1, None] == ids) & (ids[:, :1, None] != -1)
    index = torch.arange(filled)
    same[index, index, 0] = False  # the target itself stays
    scores = scores.masked_fill(same, -math.inf)
    columns = [scores[:, slot // width == b].flatten(1) for b in range(bank.block_lse.shape[0])]
    empty = scores.new_full((filled,), -math.inf)
    return torch.stack([c.logsumexp(1) if c.shape[1] else empty for c in columns], 1)


class Twins:
    """A bank and its oracle; `run` gives one step to both and compares them."""

    def __init__(self, setup: Setup, device: str, library: bool = False) -> None:
        s = self.setup = setup
        self.device, self.kernels = device, Kernels(device, library)
        self.bank = setup.bank(device)
        self.oracle = ExactBank(
            s.capacity, s.d, s.m, s.bank_dtype, s.drift, layout=self.bank.layout
        )
        self.tau = TEMPERATURES[setup.seed % 2]
        self.averaged = self.bank.layout.offset_block if setup.drift == "mean" else 0
        self.largest_batch = 1
        self.table_scale: float | None = (
            None  # the scale of the last call: what the table holds for
        )
        self.norm = self.component = 0.0  # the largest of any vector or offset so far
        self.generator = torch.Generator().manual_seed(setup.seed)

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * self.setup.size
        return self.measured(x.to(dtype or self.setup.input_dtype)).to(self.device)

    def measured(self, x: Tensor) -> Tensor:
        # twice: a vector and the offset added to it
        self.norm = max(self.norm, 2 * x.double().norm(dim=-1).max().item())
        self.component = max(self.component, 2 * x.double().abs().max().item())
        return x

    def draw_batch(self, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
        s = self.setup
        self.largest_batch = max(self.largest_batch, n)
        q, p = self.draw(n, s.d), self.draw(n, s.m, s.d)
        if not s.ids:
            return q, p, None
        ids = torch.randint(-1, MAX_ID, (n, s.m), generator=self.generator)
        return q, p, ids.to(self.device)

    def bounds(self, row_weight: float = 1.0) -> Bounds:
        s = self.setup
        # The difference of two running means is at most two norms: with the vector three, not two.
        more = 1.5 if s.drift == "mean" else 1.0
        sizes = Sizes(
            n=self.largest_batch,
            m=s.m,
            d=s.d,
            filled=len(self.oracle),
            scale=1 / self.tau,
            norm=more * self.norm,
            component=more * self.component,
            row_weight=row_weight,
            averaged=self.averaged,
        )
        return bounds(sizes, s.bank_dtype, self.kernels)

    def run(self, step: Step) -> None:
        getattr(self, step.kind)(step)
        self.check_bank()

    def loss(self, step: Step) -> None:
        q, p, ids = self.draw_batch(step.n)
        q, p = q.requires_grad_(), p.requires_grad_()
        options, weighted_all = step.options, step.options.get("row_weighting") == "all"
        used = min(self.oracle.effective_window(), len(self.oracle))
        rows = step.n + (used if options.get("banks") != "passages" else 0)
        tol = self.bounds(1 / (rows if weighted_all else step.n))

        plain = [x.detach().cpu().requires_grad_() for x in (q, p)]
        exact = [x.detach().cpu().double().requires_grad_() for x in (q, p)]
        given = (self.oracle, self.tau, ids if ids is None else ids.cpu())
        plain_loss = reference.contaccum_loss(*plain, *given, **{**options, "enqueue": False})
        exact_loss = reference.contaccum_loss(
            *exact, *given, **options, compute_dtype=torch.float64
        )
        ours = ca.contaccum_loss(q, p, self.bank, self.tau, ids, **options)

        assert ours.dtype == accumulation_dtype(self.setup.bank_dtype)
        assert_loss(ours.cpu(), plain_loss, exact_loss, tol.loss)
        (dq, dp), (plain_dq, plain_dp), (exact_dq, exact_dp) = (
            torch.autograd.grad(loss, inputs)
            for loss, inputs in ((ours, (q, p)), (plain_loss, plain), (exact_loss, exact))
        )
        assert_gradient("dq", dq.cpu(), plain_dq, exact_dq, tol.dq, tol.dq_l2)
        assert_gradient("dp", dp.cpu(), plain_dp, exact_dp, tol.dp, tol.dp_l2)
        self.table_scale = 1 / self.tau

    def enqueue(self, step: Step) -> None:
        q, p, ids = self.draw_batch(step.n)
        self.bank.enqueue(q, p, ids)
        self.oracle.enqueue(q.cpu(), p.cpu(), ids if ids is None else ids.cpu())
        if self.table_scale is None:
            self.table_scale = 1.0

    def window(self, step: Step) -> None:
        self.bank.window = step.value
        self.oracle.window = step.value

    def temperature(self, step: Step) -> None:
        self.tau = step.value

    def offsets(self, step: Step) -> None:
        if self.setup.drift != "none":
            return
        blocks, s = self.bank.layout.offset_blocks(self.setup.capacity), self.setup
        acc = accumulation_dtype(s.bank_dtype)
        q, p = self.draw(blocks, s.d, dtype=acc), self.draw(blocks, s.m, s.d, dtype=acc)
        self.bank.set_offsets(q, p)
        self.oracle.set_offsets(q.cpu(), p.cpu())
        self.averaged = self.bank.layout.offset_block

    def reload(self, step: Step) -> None:
        """Go on with another bank that got this one's state."""
        fresh = self.setup.bank(self.device)
        fresh.load_state_dict(self.bank.state_dict())
        self.bank = fresh

    def clear(self, step: Step) -> None:
        self.bank.clear()
        self.oracle.clear()
        self.table_scale = None

    def check_bank(self) -> None:
        """Contents to the bit, the window, the offsets and Invariant T."""
        bank, oracle = self.bank, self.oracle
        assert len(bank) == len(oracle)
        assert torch.equal(bank.queries().cpu(), oracle.queries())
        assert torch.equal(bank.passages().cpu(), oracle.passages())
        assert torch.equal(bank.passage_ids().cpu(), oracle.passage_ids())
        assert bank.window == oracle.effective_window()
        tol = self.bounds()
        for ours, exact in (
            (bank.query_offsets(), oracle.query_offsets()),
            (bank.passage_offsets(), oracle.passage_offsets()),
        ):
            assert ours.shape == exact.shape
            error = (ours.double().cpu() - exact.double()).abs()
            assert error.numel() == 0 or error.max() <= tol.offset, (ours, exact)
        if self.table_scale is not None:
            exact = scratch_table(bank, oracle.written, self.table_scale)
            assert_table(bank.table(), exact, tol.table)
