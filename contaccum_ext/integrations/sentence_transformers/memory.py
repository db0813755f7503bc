"""The banks of a loss, made when the first batch shows what they have to hold."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from contaccum_ext import validation
from contaccum_ext.bank import DualMemoryBank
from contaccum_ext.bank_size import auto_bank_size
from contaccum_ext.functional import contaccum_loss
from contaccum_ext.ops import op_runs_on

logger = logging.getLogger(__name__)

UNKNOWN_RUN_SLOTS = 1024  # of an automatic bank as long as nobody says how large an update is


@dataclass(frozen=True)
class BankSettings:
    """What does not change during the life of a loss.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    size: int | str  # slots; 0 for no bank; "auto"
    drift: str  # "mean" or "none"
    row_weighting: str  # "local" or "all"
    mask_duplicates: bool
    normalize: bool  # cosine scores

    def __post_init__(self) -> None:
        number = isinstance(self.size, int) and not isinstance(self.size, bool) and self.size >= 0
        if self.size != "auto" and not number:
            raise ValueError(
                f"bank_size: expected 'auto' or a number of slots >= 0, got {self.size!r}"
            )
        validation.choice("drift", self.drift, ("mean", "none"))
        validation.choice("row_weighting", self.row_weighting, ("local", "all"))


class BankMemory(nn.Module):
    """One bank for each shape of batch: embedding size d and passages per query m.

    Batches of another shape come from ``MatryoshkaLoss`` or from data sets with other columns.
    Banks are in ``state_dict`` and are made anew by ``load_state_dict``.
    """

    def __init__(self, settings: BankSettings) -> None:
        super().__init__()
        self.settings = settings
        self.banks = nn.ModuleDict()
        self._update_size: int | None = None
        self._training_queries: int | None = None

    def begin_run(self, update_size: int, training_queries: int | None) -> None:
        """Forget everything; automatic banks get the size that suits these numbers.

        Args:
            update_size: examples that this process contributes to an optimizer update.
            training_queries: rows of the training set; None if unknown.
        """
        self.banks.clear()
        self._update_size, self._training_queries = update_size, training_queries

    @property
    def capacity(self) -> int:
        """Slots of each bank made from now on."""
        if not isinstance(self.settings.size, str):
            return self.settings.size
        if self._update_size is None:
            return UNKNOWN_RUN_SLOTS
        return auto_bank_size(self._update_size, self._training_queries)

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
        # Where the op has no kernel for the device, the few embeddings travel to the CPU.
        place = device if op_runs_on(device) else torch.device("cpu")
        queries, *passages = (self._prepare(column.to(place)) for column in columns)
        stacked = torch.stack(passages, 1)  # (n, m, d)
        ids = None
        if learning and self.settings.mask_duplicates:
            ids = _stack_identities(identities, len(queries), place)
        loss = contaccum_loss(
            queries,
            stacked,
            self._bank(stacked) if learning else None,
            temperature=1.0 / scale,
            passage_ids=ids,
            row_weighting=self.settings.row_weighting,
        )
        return loss.to(device)

    def _prepare(self, column: Tensor) -> Tensor:
        if column.dtype.itemsize < 4:  # as sentence-transformers does before it computes scores
            column = column.float()
        return nn.functional.normalize(column, dim=-1) if self.settings.normalize else column

    def _bank(self, passages: Tensor) -> DualMemoryBank | None:
        """The bank for passages (n, m, d), on their device; None where banks are switched off."""
        if self.capacity == 0:
            return None
        _, m, dim = passages.shape
        name = f"{dim}x{m}"
        if name not in self.banks:
            self.banks[name] = self._new_bank(passages)
            logger.info(f"New bank: {self.capacity} slots of {1 + m} vectors of size {dim}")
        bank = self.banks[name]
        assert isinstance(bank, DualMemoryBank)
        if bank.cursor.device != passages.device:  # restored, or the model has moved
            bank.to(passages.device)
        return bank

    def _new_bank(self, like: Tensor) -> DualMemoryBank:
        """An empty bank for passages such as these (rows, m, d)."""
        _, m, dim = like.shape
        return DualMemoryBank(
            self.capacity, dim, m, like.dtype, like.device, drift=self.settings.drift
        )

    def filled(self) -> dict[str, int]:
        """Filled slots of each bank by its shape, dxm (reads the device)."""
        return {name: len(bank) for name, bank in self.banks.items()}  # type: ignore[arg-type]

    def get_extra_state(self) -> dict[str, Any]:
        """What must be the same for a stored bank to mean the same."""
        return {
            "bank_size": self.capacity,
            "drift": self.settings.drift,
            "mask_duplicates": self.settings.mask_duplicates,
            "normalize": self.settings.normalize,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Nothing to take over: it has been found to be the same before anything was loaded."""

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, extra, errors):
        """Refuse the banks of another setting, then make those that are to be filled."""
        here, stored = self.get_extra_state(), state_dict.get(f"{prefix}_extra_state")
        differences = [
            f"{prefix}{name}: expected {value!r}, got {stored.get(name)!r}"
            for name, value in here.items()
            if stored is not None and stored.get(name) != value
        ]
        errors.extend(differences)
        if differences:
            return
        self.banks.clear()
        for key, tensor in state_dict.items():
            start, _, buffer = key.rpartition(".")
            if start.startswith(f"{prefix}banks.") and buffer == "bank_passages":
                self.banks[start.removeprefix(f"{prefix}banks.")] = self._new_bank(tensor)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, extra, errors)

    def extra_repr(self) -> str:
        """Say what ``repr`` shows beside the banks."""
        return f"{self.settings}"


def _stack_identities(
    identities: Sequence[Tensor | None], rows: int, device: torch.device
) -> Tensor:
    """(n, m) int64; -1, which equals nothing, in columns that have no identities."""
    unknown = torch.full((rows,), -1, dtype=torch.int64, device=device)
    return torch.stack([unknown if ids is None else ids.to(device) for ids in identities], 1)
