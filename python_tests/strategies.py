"""Random banks and random histories: hypothesis draws shapes, options and one seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st

import contaccum_ext as ca

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
    learn: bool = False  # the temperature is a tensor that gets its gradient
    symmetric: bool = False
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
            learn_temperature=self.learn,
            symmetric=self.symmetric,
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
    kinds = ["window", "temperature", "offsets", "reload", "enqueue", "clear", "move", "move"]
    kind = draw(st.sampled_from(["loss"] * 12 + kinds))
    if kind == "move":
        return Step(kind, value=draw(st.sampled_from([False, False, True])))
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
        "center_over": draw(st.sampled_from([None, None, None, 1, 4])),
    }
    return Step(kind, n, options=options)


@st.composite
def histories(draw, setup=None, longest: int = 20) -> tuple[Setup, list[Step]]:
    """A bank, half the time with a window from the start, and enough steps to go round it."""
    drawn = draw(setups() if setup is None else setup)
    window = Step("window", value=draw(st.one_of(st.none(), st.integers(1, drawn.capacity))))
    return drawn, [window, *draw(st.lists(steps(drawn.capacity), min_size=6, max_size=longest))]
