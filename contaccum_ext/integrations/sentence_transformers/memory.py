"""The banks of a loss, made when the first batch shows what they have to hold."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from contaccum_ext.bank import DualMemoryBank
from contaccum_ext.bank_size import (
    auto_bank_size,
    auto_drift,
    auto_wide_epochs,
    centers_gradients,
    correction_options,
    mean_decay,
)
from contaccum_ext.functional import contaccum_loss
from contaccum_ext.integrations.sentence_transformers.identity import stack_identities
from contaccum_ext.integrations.sentence_transformers.probes import Move, Probes
from contaccum_ext.integrations.sentence_transformers.settings import BankSettings
from contaccum_ext.integrations.sentence_transformers.vectors import move_to, place, widen
from contaccum_ext.staleness import SlotStaleness
from contaccum_ext.transport import transport_slots

logger = logging.getLogger(__name__)

# Of running means, per batch, as long as nobody says how many batches make an update: means that
# lag by an update do harm (docs/drift.md), so these anticipate. Those that probes predict do not
# lag: this decay was tried with updates of 1, 4 and 16 batches.
MEAN_DECAY, PREDICTED_MEAN_DECAY = 0.5, 0.9
UNKNOWN_RUN_SLOTS = 1024  # of an automatic bank as long as nobody says how large an update is


class BankMemory(nn.Module):
    """One bank for each shape of batch: embedding size d and passages per query m.

    Batches of another shape come from ``MatryoshkaLoss`` or from data sets with other columns.
    Banks, and with drift="transport" the probes and how stale slots are, are in ``state_dict``;
    ``load_state_dict`` makes them anew.
    """

    def __init__(self, settings: BankSettings) -> None:
        super().__init__()
        self.settings = settings
        self.banks = nn.ModuleDict()
        self.staleness: dict[str, SlotStaleness] = {}  # of transported banks
        self._update_size: int | None = None
        self._training_queries: int | None = None
        self._micro_batches: int | None = None
        self.probes = self._new_probes()

    def begin_run(
        self, update_size: int, training_queries: int | None, micro_batches: int | None = None
    ) -> None:
        """Forget everything; what is automatic follows from these numbers.

        Args:
            update_size: examples that this process contributes to an optimizer update.
            training_queries: rows of the training set that it sees; None if unknown.
            micro_batches: how many batches of an update each bank sees; None if unknown.
        """
        self.banks.clear()
        self.staleness.clear()
        self._update_size, self._training_queries = update_size, training_queries
        self._micro_batches = micro_batches
        self.probes = self._new_probes()

    def _new_probes(self) -> Probes | None:
        used = self.drift == "transport" and self.capacity > 0
        return Probes(self.settings.drift_probes) if used else None

    @property
    def capacity(self) -> int:
        """Slots of each bank made from now on."""
        if not isinstance(self.settings.bank_size, str):
            return self.settings.bank_size
        if self._update_size is None:
            return UNKNOWN_RUN_SLOTS
        return auto_bank_size(self._update_size, self._training_queries)

    @property
    def drift(self) -> str:
        """Correction of banks made from now on: "none", "mean" or "transport"."""
        if self.settings.drift != "auto":
            return self.settings.drift
        if self._update_size is None:
            return "transport"  # which is right for all ages
        return auto_drift(self.capacity, self._update_size)

    @property
    def drift_decay(self) -> float:
        """Decay per batch of the running means of banks made from now on."""
        if self.settings.drift_decay is not None:
            return self.settings.drift_decay
        predicted = self.probes is not None
        if self._micro_batches is None:
            return PREDICTED_MEAN_DECAY if predicted else MEAN_DECAY
        return mean_decay(self._micro_batches, predicted)

    @property
    def center_over(self) -> int | None:
        """Batches over which gradients of passages sum to zero, one if unknown; None for as is."""
        wanted, size = self.settings.center_gradients, self._update_size or 0
        if wanted == "auto":
            wanted = centers_gradients(self.drift, self.capacity, size)
        return (self._micro_batches or 1) if wanted else None

    def begin_update(self, epochs: float) -> None:
        """Note how much of training is over: then a large bank may be used in part only.

        Args:
            epochs: passes over the training set so far.
        """
        wide: int | str | None = self.settings.wide_epochs
        if isinstance(wide, str):
            wide = auto_wide_epochs(self.drift, self.settings.row_weighting)
        most = auto_bank_size(self._update_size or self.capacity)
        narrow = wide is not None and epochs >= wide and most < self.capacity
        for name, bank in self.banks.items():
            assert isinstance(bank, DualMemoryBank)
            bank.begin_update()
            if name in self.staleness:
                self.staleness[name].widest = most if narrow else None
            elif wide is not None:
                bank.window = most if narrow else None

    def forward(
        self,
        columns: Sequence[Tensor],
        identities: Sequence[Tensor | None],
        scale: float,
        learning: bool,
    ) -> Tensor:
        """() loss of a batch.

        Args:
            columns: 1 + m embeddings (n, d): queries, positives, hard negatives.
            identities: for each passage column (n,) int64 ids or None.
            scale: scores are multiplied by it.
            learning: use the bank and enqueue; otherwise the plain in-batch loss, nothing masked.
        """
        if len(columns) < 2:
            raise ValueError(
                f"sentence_features: expected at least 2 columns (anchor, positive), "
                f"got {len(columns)}"
            )
        device = columns[0].device
        where = place(device)
        queries, *passages = (self._prepare(column.to(where)) for column in columns)
        stacked = torch.stack(passages, 1)  # (n, m, d)
        ids = None
        if learning and self.settings.mask_duplicates:
            ids = stack_identities(identities, len(queries), where)
        loss = contaccum_loss(
            queries,
            stacked,
            self._bank(stacked) if learning else None,
            temperature=1.0 / scale,
            passage_ids=ids,
            row_weighting=self.settings.row_weighting,
            symmetric=self.settings.symmetric,
            center_over=self.center_over,
        )
        return loss.to(device)

    def follow(self, moves: Mapping[int, Move], unit: bool) -> None:
        """Move the banks as probes have been moved, and leave out what these cannot follow.

        Args:
            moves: for each m the probes' embeddings (R, D) before and after, one per column; banks
                of a smaller size hold the first of the D numbers.
            unit: banked vectors have length 1.
        """
        for name, bank in self.banks.items():
            assert isinstance(bank, DualMemoryBank)
            if bank.passages_per_query in moves:
                (old_queries, *old), (new_queries, *new) = (
                    [self._shorten(column, bank.dim, unit) for column in columns]
                    for columns in moves[bank.passages_per_query]
                )
                move_to(bank, new_queries.device)
                transport_slots(
                    self.staleness[name],
                    (old_queries, torch.cat(old)),
                    (new_queries, torch.cat(new)),
                    ridge=self.settings.drift_ridge,
                    normalize=unit,
                )

    def _shorten(self, column: Tensor, dim: int, unit: bool) -> Tensor:
        """Probes (R, D) as a bank of size d would hold them: (R, d)."""
        column = widen(column.to(place(column.device)))[:, :dim]
        return nn.functional.normalize(column, dim=-1) if unit else column

    def _prepare(self, column: Tensor) -> Tensor:
        column = widen(column)
        return nn.functional.normalize(column, dim=-1) if self.settings.normalize else column

    def _bank(self, passages: Tensor) -> DualMemoryBank | None:
        """The bank for passages (n, m, d), on their device; None where banks are switched off."""
        if self.capacity == 0:
            return None
        _, m, dim = passages.shape
        name = f"{dim}x{m}"
        if name not in self.banks:
            self._add_bank(name, passages)
            logger.info(f"New bank: {self.capacity} slots of {1 + m} vectors of size {dim}")
        bank = self.banks[name]
        assert isinstance(bank, DualMemoryBank)
        move_to(bank, passages.device)
        return bank

    def _add_bank(self, name: str, like: Tensor) -> None:
        """An empty bank for passages such as these (rows, m, d)."""
        _, m, dim = like.shape
        bank = DualMemoryBank(
            self.capacity,
            dim,
            m,
            like.dtype,
            like.device,
            drift_decay=self.drift_decay,
            symmetric=self.settings.symmetric,
            **correction_options(self.drift, self._micro_batches),
        )
        self.banks[name] = bank
        if self.probes is not None:
            self.staleness[name] = SlotStaleness(bank, self.settings.drift_limit)

    def filled(self) -> dict[str, int]:
        """Filled slots of each bank by its shape, dxm (reads the device)."""
        return {name: len(bank) for name, bank in self.banks.items()}  # type: ignore[arg-type]

    def get_extra_state(self) -> dict[str, Any]:
        """What must be the same for a stored bank to mean the same, and the probes."""
        state = self._identity()
        if self.probes is None:
            return state
        stale = {name: slots.state_dict() for name, slots in self.staleness.items()}
        return state | {"probes": self.probes.state_dict(), "staleness": stale}

    def _identity(self) -> dict[str, Any]:
        settings = self.settings
        identity = {
            "bank_size": self.capacity,
            "drift": self.drift,
            "mask_duplicates": settings.mask_duplicates,
            "normalize": settings.normalize,
            "symmetric": settings.symmetric,
        }
        if self.drift != "none":
            identity["drift_decay"] = self.drift_decay
        return identity if self.probes is None else identity | {"drift_probes": self.probes.count}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what is the probes'; the rest was compared before anything was loaded."""
        if self.probes is not None:
            self.probes.load_state_dict(state["probes"])
            for name, slots in self.staleness.items():
                slots.load_state_dict(state["staleness"][name])

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, extra, errors):
        """Refuse the banks of another setting, then make those that are to be filled."""
        here, stored = self._identity(), state_dict.get(f"{prefix}_extra_state")
        hints = {
            name: f"; {chosen!r} is settled when ContAccumCallback begins a run"
            for name in ("bank_size", "drift", "drift_decay")
            if (chosen := getattr(self.settings, name)) in ("auto", None)
        }
        differences = [
            f"{prefix}{name}: expected {value!r}, got {stored.get(name)!r}{hints.get(name, '')}"
            for name, value in here.items()
            if stored is not None and stored.get(name) != value
        ]
        if not differences and self.probes is not None:
            differences = [
                f"{prefix}{name}: expected those of drift='transport', got none"
                for name in ("probes", "staleness")
                if name not in (stored or {})
            ]
        errors.extend(differences)
        if differences:
            return
        self.banks.clear()
        self.staleness.clear()
        for key, tensor in state_dict.items():
            name, _, buffer = key.removeprefix(f"{prefix}banks.").partition(".")
            if key.startswith(f"{prefix}banks.") and buffer == "bank_passages":
                self._add_bank(name, tensor)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, extra, errors)

    def extra_repr(self) -> str:
        """Say what ``repr`` shows beside the banks."""
        return f"{self.settings}"
