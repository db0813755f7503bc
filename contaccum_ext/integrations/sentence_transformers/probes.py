"""A few texts that are encoded again when the weights have changed, so that banks can follow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from contaccum_ext.integrations.sentence_transformers.encoding import (
    Forward,
    own_forward,
    without_training,
)
from contaccum_ext.integrations.sentence_transformers.features import (
    Features,
    join,
    row_count,
    split,
)
from contaccum_ext.integrations.sentence_transformers.weights import bit_sums

logger = logging.getLogger(__name__)

Move = tuple[list[Tensor], list[Tensor]]  # for each column (R, D) before and after


class ProbeSet:
    """Probes for batches of 1 + m columns: `count` anchors, about as many passages in all.

    Args:
        columns: 1 + m.
        count: R.
        at_once: rows encoded at a time, at most.
    """

    def __init__(self, columns: int, count: int, at_once: int) -> None:
        each = -(-count // (columns - 1))
        self.missing = [count] + [each] * (columns - 1)
        self.batches: list[list[Features]] = [[] for _ in range(columns)]
        self.at_once = at_once
        self.last: list[Tensor] | None = None

    @property
    def complete(self) -> bool:
        return not any(self.missing)

    def take(self, columns: Sequence[Mapping[str, Any]]) -> None:
        """The first of a batch's rows, as many as are missing, before a model changes them."""
        for k, features in enumerate(columns):
            if self.missing[k]:
                self.batches[k] += split(features, self.missing[k], self.at_once)
                self.missing[k] = max(0, self.missing[k] - row_count(features))
        if self.complete:
            self.batches = [join(batches, self.at_once) for batches in self.batches]

    def renew(self, encode: Callable[[Features], Tensor]) -> Move | None:
        """Encode the probes; where they were and are, None if they have not moved."""
        new = [torch.cat([encode(batch) for batch in batches]) for batches in self.batches]
        if not all(vectors.isfinite().all() for vectors in new):
            logger.warning("Probes have embeddings that are not finite: the banks are not moved")
            return None
        old, self.last = self.last, new
        if old is None:
            return None
        old = [vectors.to(now.device) for vectors, now in zip(old, new, strict=True)]
        return None if all(map(torch.equal, old, new)) else (old, new)


class Probes:
    """The first texts that training shows, column by column, for each number of columns.

    Args:
        count: R, anchors per set.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.clear()

    def clear(self) -> None:
        """Forget all texts."""
        self.sets: dict[int, ProbeSet] = {}
        self._weights: list[int] | None = None

    def follow(
        self,
        encoder: SentenceTransformer,
        columns: Sequence[Mapping[str, Any]],
        at_once: int,
    ) -> dict[int, Move]:
        """Take what is missing from a batch, and see where the weights have taken the probes.

        Whether the weights have changed since the last call, the weights themselves say: version
        counters miss the fused optimizers, those in 8 bits, and all that write to ``.data``.

        Args:
            encoder: as it will encode the batch.
            columns: the batch, 1 + m columns.
            at_once: rows that a new set may encode at a time.

        Returns:
            For each m whose probes have moved, their vectors before and after.
        """
        weights = bit_sums(p for p in encoder.parameters() if p.requires_grad)
        changed, self._weights = weights != self._weights, weights
        m = len(columns) - 1
        mine = self.sets.setdefault(m, ProbeSet(1 + m, self.count, at_once))
        if not mine.complete:
            mine.take(columns)
        due = {
            m: probes
            for m, probes in self.sets.items()
            if probes.complete and (changed or probes.last is None)
        }
        if not due:
            return {}
        forward, device = own_forward(encoder), encoder.device
        with without_training(encoder):
            moves = {
                m: probes.renew(partial(_encode, forward, device)) for m, probes in due.items()
            }
        return {m: move for m, move in moves.items() if move is not None}

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """Texts and last vectors; not the weights, which are compared anew."""
        return {
            m: {
                "missing": probes.missing,
                "batches": [[dict(batch) for batch in batches] for batches in probes.batches],
                "at_once": probes.at_once,
                "last": probes.last,
            }
            for m, probes in self.sets.items()
        }

    def load_state_dict(self, state: dict[int, dict[str, Any]]) -> None:
        """Take what ``state_dict`` gave."""
        self.clear()
        for m, stored in state.items():
            probes = self.sets[m] = ProbeSet(1 + m, self.count, stored["at_once"])
            probes.missing, probes.last = list(stored["missing"]), stored["last"]
            probes.batches = [list(batches) for batches in stored["batches"]]


def _encode(forward: Forward, device: torch.device, features: Features) -> Tensor:
    """(rows, D); the model gets a copy, for its modules may change what they are given."""
    copied = {
        name: value.to(device, copy=True) if isinstance(value, Tensor) else value
        for name, value in features.items()
    }
    return forward(copied)["sentence_embedding"]
