"""How far a result may be from the float64 oracle. Every bound of the tests is derived here.

The rule, for a result r of the op, t of plain PyTorch in the same precision and x of the float64
oracle:

    |r - x| <= 2 |t - x| + atol                                                    (elementwise)

atol is what the op's own arithmetic may add. None of it was fitted to what the op happens to do.
Notation: u the unit roundoff of the accumulation type (half its eps), d, n, m, F as everywhere,
R = n + F rows, N = R m columns, X the largest norm of a vector (offset included), S = scale X^2 the
largest |score| (Cauchy-Schwarz), w the row weight.

- A sum of k terms, roundings taken as independent: relative error g(k) = 6 sqrt(k) u, against the
  sum of magnitudes, exceeded with probability below 2k exp(-18) (Higham and Mary 2019, "A new
  approach to probabilistic rounding error analysis").
- Score: a dot product of d terms, one product with the scale, one sum with the offset's part:
      e_s = g(d + 3) S
- Offsets: the running mean is a mean of n terms, then a decaying average that forgets 0.1 a step,
  so that rounding errors add up to at most 10 times one step's three roundings. A block of k slots
  keeps the average of at most k such means, updated with three roundings each. In all
      e_mean = (g(n + 3 k) + 30 u) X, which moves a score by scale X e_mean. Added to e_s.
- Log-sum-exp: arguments of exp are differences of magnitude 2 S, rounded once (2 u S); exp within
  4 u; each of up to N terms takes one product and one sum, 5 g(N). Partial log-sum-exps are stored
  rounded, at magnitude L = S + log N, on the way group, block, base, row, and again when finished:
  at most 6 times.
      e_lse = e_s + 2 u S + 4 u + 5 g(N) + 6 u L
- Loss: a sum over rows of lse - score, in float64, rounded at the end:
      R w (e_lse + e_s + 2 u L) + u |loss|
- Probability: exp(score - lse), relative
      e_P = e_s + e_lse + 2 u S + 4 u
- dq = scale w (sum_j P_j column_j - p), sum_j P_j = 1; V the largest component, or the largest norm
  X when the error of a whole row is meant:
      scale w ((e_P + g(N) + 4 u) V + e_mean)
- dp = scale w (sum_i P_i row_i - q): the same with a mass M of at most R for a column:
      scale w M ((e_P + g(R) + 4 u) V + e_mean)
- Kernels on tensor cores, and products by torch's library on CUDA, round the weights P_ij that they
  multiply by, the target's apart, to the bank's dtype: relative u_s, and below its normal numbers
  half its smallest subnormal t_s. Again independent (Hoeffding): with Q the root of the largest sum
  of squared weights in a row, or in a column, 1 and sqrt(R) at most, this adds to e_P
      e_W = 6 (u_s Q + sqrt(N) t_s / 2), with R for N in dp
- A gradient returned in a narrower type is rounded once more: u_in |x| + half its smallest
  subnormal.

- Products by the library may round their operands, where torch is allowed to: tf32 has 10 bits
  after the first, and what is cut off is below r = 2^-10 of a number. A product of two is then off
  by 2 r + r^2 of itself: e_s grows by (2 r + r^2) S, in the loss and in the table, and e_P, for the
  products with probabilities, by 2 r + r^2. Targets' scores are not among those products.

- Expected score, of a block or a row: a sum of P_ij s_ij, one product and one sum a term. The table
  keeps it beside the log-sum-exp, on the same way; on each of its at most 6 stations it is a mean
  with weights exp(lse_k - lse), off by 2 e_lse, and is rounded at magnitude S:
      e_E = e_s + S (e_P + 5 g(N) + 6 (2 e_lse + 4 u + u))
- Gradient of the temperature: -scale (sum_l <q_l, dq_l> + w sum_i (E_i - s_i)), l over local and i
  over banked rows:
      scale (n X (dq's bound for a row + g(d) scale w 2 X) + F w (e_E + e_s + 2 u S)) + u |value|
  The last for the sum, in float64, rounded at the end; 3 u more for the product with the upstream
  factor and with -scale^2.

- Centered gradients: what is taken from each of k = n m rows is (owed + sum of dp) / (left k): so
  many batches are left in an update, and so much earlier ones have left. With E the error of owed,
  dp's bound for each row, and a sum of k + 4 roundings, it is off by
      (E + k dp's bound + g(k + 4) (|owed| + sum |dp|)) / (left k)
  which is added to dp's bound, and E becomes (left - 1) / left of the parenthesis. In L2 all k d
  numbers may be off by as much.

In L2 the rows of dq are taken together (sqrt(n) times a row's bound), likewise the columns of dp,
except that all of them share the mass R, and sqrt(R) for Q, since a row's sum is 1. That is sharper
than what elementwise bounds imply. An error of relative size r in L2 turns a vector by an angle of
sine at most r: cosine >= sqrt(1 - r^2).

Where the op itself computes in float64 the oracle is no more exact than it is: both get atol.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from contaccum_ext.layout import accumulation_dtype

EPS64 = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Sizes:
    """What the bounds depend on."""

    n: int
    m: int
    d: int
    filled: int  # banked rows in use
    scale: float
    norm: float  # X
    component: float  # V
    row_weight: float
    averaged: int = 0  # k, the slots that share an offset; 0 where there are no offsets
    row_spread: float = 1.0  # Q of a row
    column_spread: float = math.inf  # Q of a column
    column_mass: float = math.inf  # M


@dataclass(frozen=True)
class Bounds:
    """Absolute tolerances; `*_l2` for the norm of the whole tensor."""

    loss: float
    table: float
    offset: float
    dq: float
    dq_l2: float
    dp: float
    dp_l2: float
    expected: float
    temperature: float


@dataclass(frozen=True)
class Kernels:
    """What multiplies, besides the CPU's kernels."""

    device: str | torch.device = "cpu"
    library: bool = False  # torch's, wherever possible
    operand: float = 0.0  # r, what the library may cut off an operand


def bounds(s: Sizes, storage: torch.dtype, kernels: Kernels) -> Bounds:
    """The terms of the module's docstring, in its order, for a bank of that dtype."""
    accumulation = accumulation_dtype(storage)
    u = torch.finfo(accumulation).eps / 2
    rows = s.n + s.filled
    columns = rows * s.m
    largest = s.scale * s.norm**2

    def g(k: int) -> float:
        return 6 * math.sqrt(k) * u

    e_mean = (g(s.n + 3 * s.averaged) + 30 * u) * s.norm if s.averaged else 0.0
    e_operand = 2 * kernels.operand + kernels.operand**2
    e_plain = (g(s.d + 3) + e_operand) * largest
    e_s = e_plain + s.scale * s.norm * e_mean
    stored = largest + math.log(columns)
    e_sum = 2 * u * largest + 4 * u + 5 * g(columns) + 6 * u * stored
    e_lse = e_s + e_sum
    e_p = e_s + e_lse + 2 * u * largest + 4 * u + e_operand
    unit = s.scale * s.row_weight
    loss = rows * s.row_weight * (e_lse + e_s + 2 * u * stored)

    def e_w(spread: float, terms: int) -> float:
        if torch.device(kernels.device).type == "cpu" or storage.itemsize > 2:
            return 0.0
        if not kernels.library and (s.d % 8 or s.d > 1024):
            return 0.0
        kind = torch.finfo(storage)
        half_subnormal = kind.smallest_normal * kind.eps / 2
        return 6 * (kind.eps / 2 * spread + math.sqrt(terms) * half_subnormal)

    def dq(v: float) -> float:
        return unit * ((e_p + g(columns) + 4 * u + e_w(s.row_spread, columns)) * v + e_mean)

    def dp(v: float, together: int = 1) -> float:
        mass = min(rows, math.sqrt(together) * s.column_mass)
        spread = min(math.sqrt(rows), math.sqrt(together) * s.column_spread)
        return unit * (
            mass * ((e_p + g(rows) + 4 * u) * v + e_mean) + e_w(spread, rows * together) * v
        )

    e_expected = e_s + largest * (e_p + 5 * g(columns) + 6 * (2 * e_lse + 5 * u))
    of_local = s.n * s.norm * (dq(s.norm) + g(s.d) * unit * 2 * s.norm)
    of_banked = s.filled * s.row_weight * (e_expected + e_s + 2 * u * largest)
    temperature = s.scale * (of_local + of_banked)
    largest_temperature = s.scale * rows * s.row_weight * 2 * largest

    both = 2.0 if accumulation == torch.float64 else 1.0
    return Bounds(
        loss=both * loss,
        table=both * (e_plain + e_sum),  # offsets never enter the table
        offset=both * e_mean,
        dq=both * dq(s.component),
        dq_l2=both * math.sqrt(s.n) * dq(s.norm),
        dp=both * dp(s.component),
        dp_l2=both * dp(s.norm, s.n * s.m),
        expected=both * e_expected,
        temperature=both * (temperature + 4 * u * largest_temperature),
    )


def assert_scalar(name: str, ours: Tensor, same: Tensor, exact: Tensor, atol: float) -> None:
    """ours, same and exact: () of the op, of same-precision PyTorch, of float64."""
    x = exact.double()
    rounding = torch.finfo(ours.dtype).eps / 2 * x.abs()
    allowed = 2 * (same.double() - x).abs() + atol + rounding
    error = (ours.double() - x).abs()
    assert error <= allowed, (
        f"{name} {ours.item()} is {error:.3g} off {x:.9g}, allowed {allowed:.3g}"
    )


def assert_gradient(
    name: str,
    ours: Tensor,
    same: Tensor,
    exact: Tensor,
    atol: float,
    atol_l2: float,
    rounded: Tensor | None = None,
) -> None:
    """The rule elementwise, in relative L2, and for the direction.

    rounded: magnitudes of what is rounded to a narrower type on the way, added up, where that is
        more than the gradient: two directions and their sum.
    """
    assert ours.shape == exact.shape, (name, ours.shape, exact.shape)
    kind = torch.finfo(ours.dtype)
    g, x, t = (v.detach().double().flatten() for v in (ours, exact, same))
    of, times = (x.abs(), 1) if rounded is None else (rounded.double().flatten(), 3)
    rounding = kind.eps / 2 * of + times * kind.smallest_normal * kind.eps / 2
    error, allowed = (g - x).abs(), 2 * (t - x).abs() + atol + rounding
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{name}[{worst}]: {g[worst]} for {x[worst]}, off by {error[worst]:.3g}, "
        f"allowed {allowed[worst]:.3g}"
    )
    size = x.norm()
    l2 = 2 * (t - x).norm() + atol_l2 + rounding.norm()
    assert (g - x).norm() <= l2, f"{name}: L2 error {(g - x).norm():.3g}, allowed {l2:.3g}"
    if l2 < size:  # otherwise every direction is allowed
        cosine = (g @ x) / (g.norm() * size)
        # The cosine is itself three sums over all components, rounded in float64.
        least = math.sqrt(1 - (l2 / size).item() ** 2) - 3 * 6 * math.sqrt(g.numel()) * EPS64 / 2
        assert cosine >= least, f"{name}: cosine {cosine}, expected at least {least}"


def assert_table(ours: Tensor, exact: Tensor, atol: float) -> None:
    """A table's entries: empty log-sum-exps are -inf on both sides, the others within atol."""
    assert ours.shape == exact.shape, (ours.shape, exact.shape)
    empty = exact == -math.inf
    assert torch.equal(ours == -math.inf, empty)
    error = (ours.double() - exact)[~empty].abs()
    assert error.numel() == 0 or error.max() <= atol, f"table off by {error.max():.3g} > {atol:.3g}"
