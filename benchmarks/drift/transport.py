"""Move banked vectors along with probes: texts encoded both before and after an optimizer step.

What the step did to the probes is carried over to all banked vectors of the same tower, in place:
the mean displacement, and on top of it a ridge regression of the rest, linear in the vector
or by similarity to the probes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.drift.corrections import Context, Correction, Mean, stacked
from benchmarks.drift.lag import Lag
from benchmarks.drift.loss import BankView

_KERNELS = ("linear", "exp", "mean")


class Displacement:
    """A displacement field fitted to probes.

    With E (R, d) the probes before, D what they moved by, both less their means in Ec and Dc, and
    G the kernel's Gram matrix (Ec Ec^T, or exp((cos - 1) / width) of E):

        v  ->  v + mean(D) + g(v) (G + ridge * trace(G) / R * I)^-1 Dc

    g(v) = (v - mean(E)) Ec^T for the linear kernel. `mean` alone leaves the last term out. As the
    ridge goes to 0, R > d probes in general position make the linear kernel exact for every affine
    map.

    Args:
        old: (R, d) probes before.
        new: (R, d) and after.
        kernel: "linear", "exp" or "mean".
        ridge: relative to the mean eigenvalue of G.
        width: of "exp", in units of cosine.
    """

    def __init__(
        self, old: Tensor, new: Tensor, kernel: str, ridge: float, width: float = 0.1
    ) -> None:
        # float64: the Gram matrix is nearly singular, and TF32 would drown what is small in it.
        old, moved = old.double(), new.double() - old.double()
        self.kernel, self.width = kernel, width
        self.centre, self.shift = old.mean(0), moved.mean(0)
        if kernel == "mean":
            return
        centred = old - self.centre
        self.probes = torch.nn.functional.normalize(old, dim=1)
        gram = centred @ centred.T if kernel == "linear" else self._similarity(self.probes)
        strength = ridge * gram.trace() / len(old)
        identity = torch.eye(len(old), dtype=gram.dtype, device=gram.device)
        factor, _ = torch.linalg.cholesky_ex(gram + strength * identity)
        weights = torch.cholesky_solve(moved - self.shift, factor)  # (R, d)
        self.weights = centred.T @ weights if kernel == "linear" else weights
        # Each probe predicted from the others, in spreads of the probes as they are now.
        free = strength * torch.cholesky_inverse(factor).diagonal() - 1 / len(old)
        left_out = strength * weights / free.clamp(min=1e-9)[:, None]
        others = len(old) / max(1, len(old) - 1)  # a mean without the probe itself
        self.spread = new.double().var(0, correction=0).sum().sqrt()
        # Of doing nothing, of the shift alone, of the map.
        self.errors = torch.stack(
            [_size(moved), _size((moved - self.shift) * others), _size(left_out)]
        )

    def choose(self) -> Tensor:
        """(): the least of the errors, in spreads; what has not the least is no longer done."""
        nothing, shift, whole = self.errors
        self.shift = self.shift * (torch.minimum(shift, whole) < nothing)
        self.weights = self.weights * (whole < torch.minimum(shift, nothing))
        return self.errors.min() / self.spread

    @property
    def error(self) -> Tensor:
        """(): of the map, in spreads."""
        return self.errors[2] / self.spread

    def _similarity(self, directions: Tensor) -> Tensor:
        return ((directions @ self.probes.to(directions).T - 1) / self.width).exp()

    def linear(self, differences: Tensor) -> Tensor:
        """(..., d): what becomes of differences of vectors, by the linear kernel."""
        return differences + differences @ self.weights.to(differences.dtype)

    def __call__(self, vectors: Tensor) -> Tensor:
        """(..., d) moved."""
        kind = vectors.dtype
        moved = vectors + self.shift.to(kind)
        if self.kernel == "linear":
            moved = moved + (vectors - self.centre.to(kind)) @ self.weights.to(kind)
        elif self.kernel == "exp":
            directions = torch.nn.functional.normalize(vectors, dim=-1)
            moved = moved + self._similarity(directions) @ self.weights.to(kind)
        return moved


def _size(vectors: Tensor) -> Tensor:
    return vectors.square().sum(1).mean().sqrt()


class Transport(Correction):
    """Probes are fixed training queries and passages, re-encoded after every step.

    Args:
        context: of the run.
        probes: R, of queries and of passages.
        ridge: see `Displacement`.
        kernel: "linear", "exp" or "mean".
        width: of "exp".
        renormalize: bring moved vectors back to length 1, where vectors have it.
        keep: score banked vectors among themselves as they were when they were enqueued, as an op
            does that keeps such scores in a table; otherwise as they are after all moves.
    """

    def __init__(
        self,
        context: Context,
        probes: int = 64,
        ridge: float = 0.1,
        kernel: str = "linear",
        width: float = 0.1,
        renormalize: bool = True,
        keep: bool = False,
    ) -> None:
        super().__init__(context)
        if kernel not in _KERNELS:
            raise ValueError(f"kernel: expected one of {_KERNELS}, got {kernel!r}")
        self.ridge, self.kernel, self.width = ridge, kernel, width
        self.renormalize = renormalize and context.normalized
        self.old: tuple[Tensor, Tensor] | None = None
        self.kept = (self.history.queries, self.history.passages)
        if keep:
            self.kept = (torch.zeros_like(self.kept[0]), torch.zeros_like(self.kept[1]))
        self.choose(probes)

    def choose(self, probes: int) -> None:
        """Draw the probes: passages are positives and hard negatives in turn."""
        draws = self.context.draws
        generator = np.random.default_rng([self.context.seed, 7919])
        queries = np.unique(draws.queries)
        # What training has shown may be a probe; what is only in the test set may not.
        passages = np.unique(draws.passages)
        self.query_probes = generator.permutation(queries)[:probes]
        self.passage_probes = generator.permutation(passages)[:probes]

    def after_encode(self, update: int, queries: Tensor, passages: Tensor) -> None:
        own = slice(self.history.bank(update).stop, self.history.view(update).stop)
        self.kept[0][own] = self.history.queries[own]
        self.kept[1][own] = self.history.passages[own]

    def before_loss(self, update: int) -> BankView:
        slots = self.history.view(update)
        return BankView(*self._now(update), self.kept[0][slots], self.kept[1][slots])

    def before_step(self, update: int) -> None:
        if self.old is None:
            self.old = self._probe(update)

    def after_step(self, update: int) -> None:
        bank = self.history.bank(update + 1)
        banked = (self.history.queries, self.history.passages)
        for field, vectors in zip(self.fields(update), banked, strict=True):
            moved = field(vectors[bank.start : bank.stop])
            if self.renormalize:
                moved = torch.nn.functional.normalize(moved, dim=-1)
            vectors[bank.start : bank.stop] = moved

    def fields(self, update: int) -> list[Displacement]:
        """What the step did to queries and to passages; asked for once after each step."""
        assert self.old is not None
        old, self.old = self.old, self._probe(update)
        return [
            Displacement(before, now, self.kernel, self.ridge, self.width)
            for before, now in zip(old, self.old, strict=True)
        ]

    def _probe(self, update: int) -> tuple[Tensor, Tensor]:
        """(R, d) queries and (R', d) passages by the weights as they are."""
        return (
            self.context.encode_queries(self.query_probes, False),
            self.context.encode_passages(self.passage_probes, False),
        )


class TransportBatch(Transport):
    """Probes are the queries and passages of the last `batches` micro-batches of the update."""

    def __init__(self, context: Context, batches: int = 4, **options) -> None:
        super().__init__(context, batches * context.history.n, **options)

    def choose(self, probes: int) -> None:
        self.slots = probes

    def before_step(self, update: int) -> None:
        self.old = self._probe(update)

    def _probe(self, update: int) -> tuple[Tensor, Tensor]:
        end = self.history.bank(update + 1).stop
        queries, passages = self.context.encode_slots(np.arange(end - self.slots, end))
        return queries, passages.flatten(0, 1)


class TransportMean(Mean):
    """Follows the running mean as `Mean` does, and turns what a vector has beyond it by probes.

    The mean is that of training's own vectors, which no error of the probes can lead astray; the
    probes of `Transport` say how differences from it change, linearly.

    Args:
        context: of the run.
        probes: R, of queries and of passages.
        ridge: see `Displacement`.
        predict: move the running means, too, as the probes' map says: then they do not lag, and
            what the probes get wrong decays.
        moved: score banked vectors among themselves as they are after all moves, at the update's
            beginning; otherwise as they were enqueued.
        turned: score them turned, about the means at which they were enqueued.
        rebuild, parts: with `moved`, when: `every` and `parts` of `Lag`.
        between: the means correct between updates alone: within one, banked vectors are what they
            were at its beginning and its own what they are.
        options: of `Mean`.
    """

    def __init__(
        self,
        context: Context,
        probes: int = 64,
        ridge: float = 0.1,
        predict: bool = False,
        moved: bool = False,
        turned: bool = False,
        between: bool = False,
        rebuild: int = 1,
        parts: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(context, **options)
        if self.blocks and (turned or between):
            raise ValueError("block: expected None with turned or between")
        self.lag = Lag(self.history.update_size, rebuild, parts)
        self.kept = torch.zeros_like(self.centred) if self.lag else None
        self.between, self.moved_among_themselves = between, moved
        self.enqueued = torch.zeros_like(self.centred) if turned else None  # the means
        self.probe, self.predict = Transport(context, probes, ridge), predict

    def after_encode(self, update: int, queries: Tensor, passages: Tensor) -> None:
        super().after_encode(update, queries, passages)
        own = slice(self.history.bank(update).stop, self.history.view(update).stop)
        vectors = stacked(self.history, own)
        if self.enqueued is not None:
            self.enqueued[own] = vectors - self.centred[own]
        if self.kept is not None and self.means is not None:
            bank = slice(self.history.bank(update).start, own.start)
            if self.lag.due(update, bank.stop - bank.start):
                self.kept[bank] = self.centred[bank] + self.means[0]
            self.kept[own] = vectors

    def before_loss(self, update: int) -> BankView:
        slots = self.history.view(update)
        if self.between:
            assert self.means is not None
            now = self.centred[slots] + self.means[0]
            own = slice(len(now) - self.history.update_size, None)
            now[own] = stacked(self.history, slots)[own]
            vectors = now[:, 0], now[:, 1:].contiguous()
            return BankView(*vectors, *vectors)
        view = super().before_loss(update)
        if self.kept is not None:
            frozen = self.kept[slots]
        elif self.enqueued is not None:
            frozen = self.centred[slots] + self.enqueued[slots]
        else:
            return view
        return replace(view, frozen_queries=frozen[:, 0], frozen_passages=frozen[:, 1:])

    def before_step(self, update: int) -> None:
        self.probe.before_step(update)

    def after_step(self, update: int) -> None:
        self.turn(update, self.probe.fields(update))

    def turn(self, update: int, fields: list[Displacement]) -> None:
        """Apply what the step has done to queries and to passages."""
        assert self.means is not None
        bank = self.history.bank(update + 1)
        slots = slice(bank.start, bank.stop)
        if self.blocks:
            self.centred[slots] += self.blocks.apart(slots)
        for kind, field in zip((slice(0, 1), slice(1, None)), fields, strict=True):
            self.centred[slots, kind] = field.linear(self.centred[slots, kind])
            if self.predict:
                self.means[-1, kind] = field(self.means[-1, kind])
        if self.blocks:
            self.blocks.move(slots, self.means[-1])
