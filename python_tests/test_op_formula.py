"""The published formula on numbers worked out by hand, and in-batch cross entropy.

ContAccum (arXiv 2406.12356), equations 8 and 9: for queries x_i and passages y_j, local ones and
banked ones alike,

    L = -1 / (n + F) sum_i log( exp(<x_i, y_i> / tau) / sum_j exp(<x_i, y_j> / tau) )

Nothing here but the calls under test uses torch: plain Python and math.exp.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch.nn.functional import cross_entropy

import contaccum_ext as ca
from contaccum_ext import reference

Vector = tuple[float, ...]

# Two local pairs and two banked ones. Scores, the target in brackets, columns p1 p2 b1 b2:
#   q1: [1] 0  1  0      a1: 2  2 [1] 1
#   q2:  1 [2] 0  1      a2: 2  0  2 [0]
QUERIES, PASSAGES = [(1.0, 0.0), (0.0, 1.0)], [(1.0, 1.0), (0.0, 2.0)]
BANKED_QUERIES, BANKED_PASSAGES = [(1.0, 1.0), (2.0, 0.0)], [(1.0, 0.0), (0.0, 1.0)]

E = math.e
# Each row's softmax denominator and log-loss, on paper: log(denominator) - target score.
ROW_LOSSES = [
    math.log(2 * E + 2) - 1,  # 1.0064088681
    math.log(E**2 + 2 * E + 1) - 2,  # 2 log(1 + e) - 2 = 0.6265233750
    math.log(2 * E**2 + 2 * E) - 1,  # log(2e + 2) = 2.0064088681
    math.log(2 * E**2 + 2) - 0,  # 2.8200751916
]
PAPER_LOSS = 1.6148540756989247  # their mean
# e.g. dq1 = 1/4 (P(b1) b1 + P(b2) b2 + P(p1) p1 + P(p2) p2 - p1) with P = (e, 1, e, 1) / (2e + 2)
PAPER_DQ = [[-0.06723535534249878, -0.0577646446575012], [0.06723535534249878, -0.1344707106849976]]
# e.g. dp1 = 1/4 (.3655 q1 + .1966 q2 + .3655 a1 + .4404 a2 - q1)
PAPER_DP = [[0.15296391415197186, 0.1405353056391211], [0.1548007305055294, -0.02500601632411864]]


def dot(x: Vector, y: Vector) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def published_loss(queries, passages, banked_queries, banked_passages, tau: float) -> float:
    """Equations 8 and 9, word by word. passages: one list per query, the positive first."""
    rows = queries + banked_queries
    of_row = passages + banked_passages
    columns = [column for group in of_row for column in group]
    total = 0.0
    for i, row in enumerate(rows):
        denominator = sum(math.exp(dot(row, column) / tau) for column in columns)
        total -= math.log(math.exp(dot(row, of_row[i][0]) / tau) / denominator)
    return total / len(rows)


def tensor(rows, device, **options):
    return torch.tensor(rows, dtype=torch.float64, device=device, **options)


def bank_of(queries, passages, device, capacity=None):
    q, p = tensor(queries, device), tensor(passages, device)
    p = p[:, None] if p.dim() == 2 else p
    bank = ca.DualMemoryBank(capacity or len(q), *p.shape[:0:-1], torch.float64, device)
    bank.enqueue(q, p)
    return bank


def test_the_numbers_worked_out_by_hand_agree_with_the_formula():
    by_loops = published_loss(
        QUERIES, [[p] for p in PASSAGES], BANKED_QUERIES, [[p] for p in BANKED_PASSAGES], 1.0
    )
    assert by_loops == pytest.approx(PAPER_LOSS, rel=1e-14)
    assert sum(ROW_LOSSES) / 4 == pytest.approx(PAPER_LOSS, rel=1e-14)


@pytest.mark.parametrize("function", [ca.contaccum_loss, reference.contaccum_loss])
def test_the_worked_example(device, function):
    bank = bank_of(BANKED_QUERIES, BANKED_PASSAGES, device)
    q = tensor(QUERIES, device, requires_grad=True)
    p = tensor(PASSAGES, device, requires_grad=True)
    loss = function(q, p, bank, 1.0, row_weighting="all", enqueue=False)
    assert loss.item() == pytest.approx(1.6148540756989247, rel=1e-13)
    loss.backward()
    for got, wanted in ((q.grad, PAPER_DQ), (p.grad, PAPER_DP)):
        torch.testing.assert_close(got, tensor(wanted, device), rtol=1e-12, atol=1e-14)
    # Row weights 1/n: the same sum over four rows, divided by two.
    local = function(q, p, bank, 1.0, row_weighting="local", enqueue=False)
    assert local.item() == pytest.approx(2 * 1.6148540756989247, rel=1e-13)


def test_worked_example_of_one_query_and_an_empty_bank(device):
    """One column, its own: probability 1, loss 0, no gradient; then the pair is in the bank."""
    bank = ca.DualMemoryBank(3, 2, dtype=torch.float64, device=device)
    q = tensor([[1.0, 2.0]], device, requires_grad=True)
    p = tensor([[3.0, -1.0]], device, requires_grad=True)
    loss = ca.contaccum_loss(q, p, bank)
    loss.backward()
    assert loss.item() == 0.0
    assert not q.grad.any() and not p.grad.any()
    # Both rows now see both columns, of equal score: log 2 each.
    loss = ca.contaccum_loss(q, p, bank, row_weighting="all", enqueue=False)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-14)


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_the_formula_in_plain_loops(device, m, tau):
    """Loss against loops over math.exp, gradients against central differences of those loops."""
    rng = random.Random(m)
    n, filled, d = 3, 4, 2

    def vectors(count):
        return [tuple(rng.uniform(-1, 1) for _ in range(d)) for _ in range(count)]

    queries, passages = vectors(n), [vectors(m) for _ in range(n)]
    banked_queries, banked_passages = vectors(filled), [vectors(m) for _ in range(filled)]
    bank = bank_of(banked_queries, banked_passages, device)
    q = tensor(queries, device, requires_grad=True)
    p = tensor(passages, device, requires_grad=True)
    loss = ca.contaccum_loss(q, p, bank, tau, row_weighting="all")
    loss.backward()
    rest = (banked_queries, banked_passages, tau)
    assert loss.item() == pytest.approx(published_loss(queries, passages, *rest), rel=1e-13)

    def moved(vector: Vector, k: int, by: float) -> Vector:
        return (*vector[:k], vector[k] + by, *vector[k + 1 :])

    h = 1e-5
    for i in range(n):
        for k in range(d):
            up, down = (
                published_loss(
                    [moved(x, k, step) if j == i else x for j, x in enumerate(queries)],
                    passages,
                    *rest,
                )
                for step in (h, -h)
            )
            assert q.grad[i, k].item() == pytest.approx((up - down) / (2 * h), abs=1e-9)
            for c in range(m):
                up, down = (
                    published_loss(
                        queries,
                        [
                            [moved(y, k, step) if (j, b) == (i, c) else y for b, y in enumerate(g)]
                            for j, g in enumerate(passages)
                        ],
                        *rest,
                    )
                    for step in (h, -h)
                )
                assert p.grad[i, c, k].item() == pytest.approx((up - down) / (2 * h), abs=1e-9)


@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("function", [ca.contaccum_loss, reference.contaccum_loss])
def test_without_a_bank_it_is_cross_entropy_on_the_in_batch_matrix(device, function, dtype, m):
    torch.manual_seed(m)
    n, d, tau = 7, 19, 0.5
    q = torch.randn(n, d, dtype=dtype, device=device, requires_grad=True)
    p = torch.randn(n, m, d, dtype=dtype, device=device, requires_grad=True)
    target = m * torch.arange(n, device=device)
    expected = cross_entropy(q @ p.reshape(n * m, d).T / tau, target)
    given = function(q, p, None, tau)
    # Scores reach 40; their rounding moves probabilities by 40 eps.
    tolerance = {"rtol": 40 * torch.finfo(dtype).eps, "atol": 40 * torch.finfo(dtype).eps}
    torch.testing.assert_close(given, expected, **tolerance)
    got, wanted = (torch.autograd.grad(loss, (q, p)) for loss in (given, expected))
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_a_bank_narrow_inputs_are_summed_in_float32(device, dtype):
    torch.manual_seed(0)
    n, m, d = 6, 2, 33
    q = torch.randn(n, d, device=device).to(dtype).requires_grad_()
    p = torch.randn(n, m, d, device=device).to(dtype).requires_grad_()
    loss = ca.contaccum_loss(q, p)
    exact = [x.detach().double().requires_grad_() for x in (q, p)]
    target = m * torch.arange(n, device=device)
    expected = cross_entropy(exact[0] @ exact[1].reshape(n * m, d).T, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=40 * torch.finfo(torch.float32).eps)
    grads = torch.autograd.grad(loss, (q, p))
    for g, e in zip(grads, torch.autograd.grad(expected, exact), strict=True):
        assert g.dtype == dtype  # one rounding, to the type of the inputs
        torch.testing.assert_close(g.double(), e, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("row_weighting", ["local", "all"])
def test_without_a_bank_ids_leave_out_false_negatives(device, row_weighting):
    """Rows 0 and 2 share their positive: each leaves the other's column out, by deleting it."""
    torch.manual_seed(0)
    q, p = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 1, 5, dtype=torch.float64)
    scores = q @ p[:, 0].T
    kept = {0: [0, 1], 1: [0, 1, 2], 2: [1, 2]}
    rows = [scores[i, columns].logsumexp(0) - scores[i, i] for i, columns in kept.items()]
    ids = torch.tensor([[4], [-1], [4]], device=device)
    loss = ca.contaccum_loss(q.to(device), p.to(device), None, 1.0, ids, row_weighting)
    assert loss.item() == pytest.approx(sum(rows).item() / 3, rel=1e-13)


def test_one_local_row_weighs_the_same_whatever_is_banked(device):
    """row_weighting: 1/n keeps a local row's weight, 1/(n + F) lets it shrink with the bank."""
    q, p = tensor([[1.0, 0.0]], device), tensor([[1.0, 0.0]], device)
    zeros = [(0.0, 0.0)] * 5  # every banked score is 0, so the two weightings differ by a factor
    bank = bank_of(zeros, zeros, device)
    local = ca.contaccum_loss(q, p, bank, row_weighting="local", enqueue=False)
    paper = ca.contaccum_loss(q, p, bank, row_weighting="all", enqueue=False)
    row = math.log(math.e + 5) - 1  # the local row
    banked = 5 * math.log(6)  # five rows of six equal scores
    assert local.item() == pytest.approx(row + banked, rel=1e-14)
    assert paper.item() == pytest.approx((row + banked) / 6, rel=1e-14)
