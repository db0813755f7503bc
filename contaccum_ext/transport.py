"""Transport of a bank: what an optimizer step does to a few probes is done to all that is banked.

Probes are texts that are encoded again after every step. A ridge regression of their displacement
says where the step has taken the other vectors of the same encoder, those in the bank among them.
It needs no texts of the bank and no pass over it but one product with a matrix an update.
What it gets wrong of the mean, which a model could flee along, is put right by the running means of
``drift="mean"``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from contaccum_ext import validation
from contaccum_ext.bank import DualMemoryBank
from contaccum_ext.displacement import Displacement, fit_all
from contaccum_ext.staleness import SlotStaleness

Vectors = tuple[Tensor, Tensor]  # of queries and of passages

# Slots moved at once bound the memory beside the bank; a GPU needs more of them to be busy.
_CHUNKS = {"cpu": 1 << 10, "cuda": 1 << 16}


@torch.no_grad()
def transport(
    bank: DualMemoryBank,
    old_queries: Tensor,
    new_queries: Tensor,
    old_passages: Tensor,
    new_passages: Tensor,
    *,
    ridge: float = 0.1,
    normalize: bool = True,
    rebuild: bool = True,
) -> Tensor:
    """Move all banked vectors as an optimizer step has moved the probes.

    A `Displacement` is fitted to each side's probes. With ``drift="mean"``, which is the safer one,
    it turns what a vector has beyond its stored mean, and takes the running mean along, from where
    the next batches correct it: a vector that counted as ``v - mean_then + mean_now`` counts as
    ``(I + slope)(v - mean_then)`` and the image of ``mean_now``. With ``drift="none"`` each vector
    is replaced by its image; errors of the fit then add up unchecked, and with dot products models
    have fled along them (docs/drift.md).

    Scores of local vectors are always with moved ones. Those among banked vectors are in the table,
    which by default is rebuilt when the bank is next used, in O(F^2). With ``rebuild=False`` it
    stays as it is: a score in it is of the vectors as they were when it was last computed, at a
    rebuild, when the younger of the two came, or while head passed by a block before it
    (``LaggingScores`` of the reference says it exactly).

    Args:
        bank: with either drift.
        old_queries: (R, d) floating, R >= 1 probes encoded before the step. Without dropout: what
            it changes is no displacement.
        new_queries: (R, d) the same, encoded after the step.
        old_passages: (R', d) or (R', m, d) floating, likewise before it.
        new_passages: (R', d) or (R', m, d) likewise after it.
        ridge: in units of the mean eigenvalue of the probes' Gram matrix; larger trusts them less.
        normalize: for encoders that bring their vectors to length 1: with ``drift="none"`` moved
            ones are brought there too. With "mean" it makes no difference.
        rebuild: whether scores among banked vectors follow at once.

    Returns:
        () the larger of the two ``Displacement.error``: how far moved vectors may be off, in
        spreads.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. The bank is
            unchanged then.
    """
    validation.instance("bank", bank, DualMemoryBank)
    ridge = validation.positive("ridge", ridge)
    validation.instance("rebuild", rebuild, bool)
    pairs = [
        _pair(bank, "queries", old_queries, new_queries),
        _pair(bank, "passages", old_passages, new_passages),
    ]
    _check_finite(old_queries, new_queries, old_passages, new_passages)
    dtype = bank.means.dtype
    fields = [field.each(lambda x: x.to(dtype)) for field in fit_all(pairs, ridge)]
    if bank.drift == "mean":
        _turn(bank, fields)
    else:
        _move(bank, fields, normalize)
    bank.vectors_changed(rebuild)
    return torch.stack([field.error for field in fields]).max()


def transport_slots(slots: SlotStaleness, old: Vectors, new: Vectors, **options: Any) -> None:
    """`transport` the bank whose slots these are, and note how stale that makes them.

    The table is rebuilt once a 32nd of the bank has been written since it last was.

    Args:
        slots: of the bank; they set its window.
        old: queries (R, d) and passages (R', d) or (R', m, d) of the probes before the step.
        new: the same after it.
        options: ridge and normalize of `transport`.
    """
    slots.note_written()
    rebuild = slots.rebuild_due()
    error = transport(slots.bank, old[0], new[0], old[1], new[1], rebuild=rebuild, **options)
    slots.age(float(error), rebuild)


def _chunks(bank: DualMemoryBank) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the ring, and (slots,) their positions."""
    size = _CHUNKS[bank.device.type]
    for begin in range(0, bank.capacity, size):
        part = slice(begin, min(begin + size, bank.capacity))
        yield part, torch.arange(part.start, part.stop, device=bank.device)


def _move(bank: DualMemoryBank, fields: list[Displacement], normalize: bool) -> None:
    """Replace every vector by its image."""
    for part, slots in _chunks(bank):
        for field, vectors in zip(fields, (bank.bank_queries, bank.bank_passages), strict=True):
            moved = field(vectors[part])
            if normalize:
                moved = nn.functional.normalize(moved, dim=-1)
            _store(vectors[part], moved, slots < bank.cursor[1])


def _turn(bank: DualMemoryBank, fields: list[Displacement]) -> None:
    """Turn vectors about their stored means, and bring them to where the mean is now."""
    of_queries, of_passages = fields
    now = torch.cat([of_queries(bank.means[0, :1]), of_passages(bank.means[0, 1:])])
    for part, slots in _chunks(bank):
        filled = slots < bank.cursor[1]
        then = bank.means[bank.layout.mean_rows(bank.capacity, slots, bank.cursor[0])]
        queries, passages = bank.bank_queries[part], bank.bank_passages[part]
        _store(queries, of_queries.turn(queries - then[:, 0]) + now[0], filled)
        _store(passages, of_passages.turn(passages - then[:, 1:]) + now[1:], filled)
    bank.means.copy_(torch.where(bank.cursor[1] > 0, now, bank.means))


def _store(vectors: Tensor, moved: Tensor, filled: Tensor) -> None:
    there = filled.view(-1, *[1] * (vectors.dim() - 1))
    vectors.copy_(torch.where(there, moved.to(vectors.dtype), vectors))


def _pair(bank: DualMemoryBank, name: str, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    for side, tensor in (("old", old), ("new", new)):
        validation.instance(f"{side}_{name}", tensor, Tensor)
        if tensor.dim() not in (2, 3) or tensor.shape[-1] != bank.dim or tensor.numel() == 0:
            raise ValueError(
                f"{side}_{name}: expected shape (probes, {bank.dim}), got {tuple(tensor.shape)}"
            )
        if tensor.device != bank.device:
            raise ValueError(f"{side}_{name}: expected device {bank.device}, got {tensor.device}")
    if old.shape != new.shape:
        raise ValueError(
            f"new_{name}: expected the probes of old_{name}, shape {tuple(old.shape)}, got "
            f"{tuple(new.shape)}"
        )
    return old.detach().flatten(0, -2), new.detach().flatten(0, -2)


def _check_finite(*probes: Tensor) -> None:
    """Of `transport`, in its order; read back from the device once."""
    names = ("old_queries", "new_queries", "old_passages", "new_passages")
    finite = torch.stack([torch.isfinite(x).all() for x in probes]).tolist()
    for name, fine in zip(names, finite, strict=True):
        if not fine:
            raise ValueError(f"{name}: expected finite values")


class BankTransport:
    """Transports a bank from one optimizer step to the next, and leaves out what it cannot follow.

    Call it with the probes' vectors after every step, and once before the first::

        follow = BankTransport(bank)
        follow(encode(probe_queries), encode(probe_passages))  # without gradients and dropout
        ...
        optimizer.step()
        follow(encode(probe_queries), encode(probe_passages))

    The errors of the maps that a slot has been through add up to its staleness. Slots beyond the
    limit are left out by the bank's window and cost nothing. They do not come back; the window
    widens with newer slots once the model moves more slowly.

    Args:
        bank: with ``drift="mean"`` and ``mean_decay(K, predicted=True)``, or "none"; see
            `transport`.
        ridge: larger trusts the probes less; see `transport`.
        normalize: for encoders that bring their vectors to length 1; see `transport`.
        limit: staleness in use, in spreads of fresh vectors; None sets no window.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; for what
            `transport` checks, at the second call.
    """

    def __init__(
        self,
        bank: DualMemoryBank,
        ridge: float = 0.1,
        normalize: bool = True,
        limit: float | None = None,
    ) -> None:
        self.bank, self.ridge, self.normalize = bank, ridge, normalize
        self._slots = SlotStaleness(bank, limit)
        self._last: Vectors | None = None

    def __call__(self, queries: Tensor, passages: Tensor) -> None:
        """Take the probes as they are now: queries (R, d), passages (R', d) or (R', m, d)."""
        now = (queries.detach().clone(), passages.detach().clone())
        if self._last is None:
            self._slots.note_written()
        else:
            options = {"ridge": self.ridge, "normalize": self.normalize}
            transport_slots(self._slots, self._last, now, **options)
        self._last = now

    @property
    def started(self) -> bool:
        """Whether the probes have been looked at: the next call moves the bank."""
        return self._last is not None

    @property
    def widest(self) -> int | None:
        """Newest slots that may be in use from the next step on; None for all. May be set."""
        return self._slots.widest

    @widest.setter
    def widest(self, slots: int | None) -> None:
        self._slots.widest = None if slots is None else validation.count("widest", slots)

    @property
    def staleness(self) -> float:
        """Of the oldest slot in use, in spreads of fresh vectors; 0 before the first step."""
        return self._slots.staleness

    def within_limit(self) -> int | None:
        """Newest slots that are not too stale for the limit; None if all of them are fresh enough.

        The bank's window is that, in whole blocks of its layout: one at least.
        """
        return self._slots.within_limit()

    def state_dict(self) -> dict[str, Any]:
        """The probes' last vectors and the bank's staleness."""
        if self._last is None:
            return {}
        queries, passages = self._last
        return {"queries": queries, "passages": passages, "slots": self._slots.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what ``state_dict`` gave."""
        device = self.bank.device
        self._last = (state["queries"].to(device), state["passages"].to(device)) if state else None
        self._slots.load_state_dict(state.get("slots", {}))
