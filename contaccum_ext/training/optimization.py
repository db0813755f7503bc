"""AdamW parameter groups, the learning rate schedule, gradient norms and clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from contaccum_ext.training.encoder import DualEncoder

if TYPE_CHECKING:
    from contaccum_ext.training.config import TrainConfig


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    others: Iterable[nn.Parameter] = (),
) -> torch.optim.AdamW:
    """AdamW without weight decay on biases, normalisation weights and temperature (all <= 1-d)."""
    parameters = [p for p in (*model.parameters(), *others) if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


@dataclass(frozen=True)
class LinearSchedule:
    """Linear warm-up from 0 to the peak, then linear decay to 0 after the last update.

    Args:
        peak: highest learning rate.
        warmup: updates with rising learning rate; update `warmup` is the first at the peak.
        total: updates in all.
    """

    peak: float
    warmup: int
    total: int

    def at(self, update: int) -> float:
        """Learning rate of update `update`, counted from 0."""
        if update < self.warmup:
            return self.peak * (update + 1) / (self.warmup + 1)
        return self.peak * (self.total - update) / max(1, self.total - self.warmup)


@dataclass(frozen=True)
class GradientNorms:
    """L2 norms of the accumulated gradients, before clipping."""

    query: float | None  # None where fp16 overflowed
    passage: float | None  # None with one shared encoder too
    others: float = 0.0  # of what is learned beside the encoders; not clipped

    @property
    def finite(self) -> bool:
        """Whether no gradient is infinite or not a number."""
        return math.isfinite((self.query or 0.0) + (self.passage or 0.0) + self.others)

    @property
    def ratio(self) -> float | None:
        """Passage encoder's norm over the query encoder's; near 1 when training is balanced."""
        if self.passage is None or not self.query:
            return None
        return self.passage / self.query


def clip_gradients(
    model: DualEncoder, max_norm: float, others: Sequence[nn.Parameter] = ()
) -> GradientNorms:
    """Measure each encoder's gradient norm and clip both together to `max_norm`.

    Args:
        model: its gradients are clipped.
        max_norm: L2, of both encoders together.
        others: parameters whose gradients are measured only.
    """
    query = _norm(model.query.parameters())
    passage = None if model.shared else _norm(model.passage.parameters())
    total = query if passage is None else torch.hypot(query, passage)
    nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, total)
    of_passages = None if passage is None else passage.item()
    return GradientNorms(query.item(), of_passages, _norm(others).item() if others else 0.0)


def _norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def warmup_updates(total: int, config: TrainConfig) -> int:
    """Updates of warm-up for a run of `total`: as set, or a share of them, rounded down."""
    if config.warmup_updates is not None:
        return config.warmup_updates
    return math.floor(total * config.warmup_ratio)
