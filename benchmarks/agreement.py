"""Whether a peer computes what it is timed for: against the oracle in float64, on a small case."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import TEMPERATURE, Case, make_vectors
from benchmarks.peers import OURS, Peer, Stepper
from contaccum_ext import reference

_SLOTS, _N, _STEPS = 512, 8, 3
# bfloat16 gradients are within a hundredth; anything wrong is of the order of one.
LIMIT = 0.1


@dataclass(frozen=True)
class Errors:
    """Relative errors, the worst of all steps: of the loss, and of dq and dp by their L2 norm."""

    loss: float
    dq: float
    dp: float

    @property
    def small(self) -> bool:
        return all(math.isfinite(e) and e < LIMIT for e in (self.loss, self.dq, self.dp))

    def worse_of(self, other: Errors) -> Errors:
        # Not max(): it may lose a nan.
        pairs = zip((self.loss, self.dq, self.dp), (other.loss, other.dq, other.dp), strict=True)
        return Errors(*(a if math.isnan(a) or a >= b else b for a, b in pairs))


def measure_errors(peer: Peer, like: Case, device: str) -> Errors:
    """Steps on a full bank of 512 slots; from the second on, what was enqueued counts as well.

    Positives are no more alike than negatives: then every column has a part in the result.

    Args:
        peer: on a case with d, m, dtype and corrections as in `like`, which only ours knows.
        like: its slots and n are left aside.
        device: of the peer; the oracle is on the CPU.
    """
    drift, over = (like.drift, like.center_over) if peer.name == OURS.name else ("none", None)
    case = peer.case(Case(_SLOTS, _N, like.d, like.m, like.dtype, drift, over))
    stepper = peer.build(case, device)
    bank = reference.DualMemoryBank(_SLOTS, case.d, case.m, torch.float64, drift=drift)
    queries, passages = _unrelated(case, _SLOTS, 0, device)
    stepper.fill(queries, passages)
    bank.enqueue(queries.double().cpu(), passages.double().cpu())
    worst = Errors(0.0, 0.0, 0.0)
    for step in range(_STEPS):
        batch = _unrelated(case, _N, 2 * step + 2, device)
        worst = worst.worse_of(_step_errors(stepper, bank, *batch, over))
    return worst


def _unrelated(case: Case, count: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    queries, _ = make_vectors(case, count, seed, device)
    _, passages = make_vectors(case, count, seed + 1, device)
    return queries, passages


def _step_errors(
    stepper: Stepper,
    bank: reference.DualMemoryBank,
    queries: Tensor,
    passages: Tensor,
    over: int | None,
) -> Errors:
    q = queries.double().cpu().requires_grad_()
    p = passages.double().cpu().requires_grad_()
    loss = reference.contaccum_loss(q, p, bank, TEMPERATURE, center_over=over)
    wanted = (loss, *torch.autograd.grad(loss, (q, p)))
    got = stepper.step(queries.requires_grad_(), passages.requires_grad_())
    errors = [
        float((g.double().cpu() - w).norm() / w.norm())
        for g, w in zip(got, (w.detach() for w in wanted), strict=True)
    ]
    return Errors(*errors)
