"""What a batch is scored against: itself and, as the settings say, the memory banks."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from contaccum_ext.bank import DualMemoryBank
from contaccum_ext.bank_size import auto_bank_size, correction_options, mean_decay
from contaccum_ext.drift_signs import EVERY, DriftWatch, ScoreShift, score_shift
from contaccum_ext.functional import contaccum_loss
from contaccum_ext.losses import LearnedTemperature
from contaccum_ext.training.diagnostics import BankAges, Look, look
from contaccum_ext.training.positive_bank import positive_bank_loss
from contaccum_ext.transport import BankTransport

if TYPE_CHECKING:
    from contaccum_ext.training.config import TrainConfig


class Scoring:
    """The loss of what is scored together, and the bank it may be scored against.

    Args:
        config: settings of the run.
        banks: "both", "passages" or "queries" as in `contaccum_loss`; None for no bank.
        dim: embedding size d.
        training_queries: size of the training set; bounds the automatic bank size.
        device: where the loss is computed.
        batches: scored in an update.
    """

    def __init__(
        self,
        config: TrainConfig,
        banks: str | None,
        dim: int,
        training_queries: int,
        device: torch.device,
        batches: int,
    ) -> None:
        self.config = config
        self.banks = banks
        self.learned: LearnedTemperature | None = None
        if config.learn_temperature:
            self.learned = LearnedTemperature(config.temperature, device=device)
        self.temperature = config.temperature  # of this update
        self.bank: DualMemoryBank | None = None
        self.transport: BankTransport | None = None
        self.drift = "none"
        self.center_over: int | None = None
        if banks is not None:
            capacity = config.bank_capacity(training_queries)
            self.drift = config.drift_for(capacity)
            self.center_over = batches if config.centers_for(capacity) else None
            follows = self.drift == "transport"
            self.bank = DualMemoryBank(
                capacity,
                dim,
                passages_per_query=1 + config.hard_negatives * config.bank_hard_negatives,
                device=device,
                drift_decay=mean_decay(batches, predicted=follows),
                learn_temperature=config.learn_temperature,
                symmetric=config.symmetric,
                **correction_options(self.drift, batches),
            )
            if follows:
                self.transport = BankTransport(
                    self.bank, config.drift_ridge, config.normalize, config.drift_limit
                )
        self.ages = BankAges(0 if self.bank is None else self.bank.capacity)
        self.look: Look | None = None  # of the last micro-batch of this update, if it was wanted
        self.shift: ScoreShift | None = None  # likewise, when all of it was enqueued
        self._looked = False  # for a shift, in this update
        self._watch = DriftWatch()
        self._update = 0
        self._narrow_from = self._first_narrow_update(training_queries)

    def begin_update(self, update: int) -> None:
        """Prepare the bank for update `update`, counted from 0."""
        self._update = update
        self.look = self.shift = None
        self._looked = False
        if self.learned is not None:
            self.temperature = self.learned.value
        if self.bank is None:
            return
        self.bank.begin_update()
        if self._narrow_from is not None:
            self._narrow(update >= self._narrow_from)
        if self.config.clear_bank_every_update:
            self.bank.clear()
            self.ages.clear()

    def _first_narrow_update(self, training_queries: int) -> int | None:
        """From which on no more slots than an automatic bank has take part; None: there is none."""
        size = self.config.update_size
        if self.bank is None or self.bank.capacity <= auto_bank_size(size):
            return None
        epochs = self.config.wide_epochs_for(self.bank.capacity)
        return None if epochs is None else epochs * -(-training_queries // size)

    def _narrow(self, narrow: bool) -> None:
        assert self.bank is not None
        widest = auto_bank_size(self.config.update_size) if narrow else None
        if self.transport is None:
            self.bank.window = widest
        else:
            self.transport.widest = widest

    def loss(
        self, queries: Tensor, passages: Tensor, passage_ids: Tensor, last: bool = False
    ) -> Tensor:
        """() fp32 loss against the bank as it was, then enqueue.

        Args:
            queries: (n, d).
            passages: (n, m, d), positive first.
            passage_ids: (n, m) int64.
            last: no other batch of this update follows; this one is looked at, when it is time to.
        """
        if self.bank is None:
            return self.in_batch_loss(queries, passages, passage_ids)
        every = self.config.diagnostics_every
        waiting = self._update < self.config.bank_warmup_updates
        due = last and not waiting
        wanted = due and bool(every) and (self._update + 1) % every == 0
        if wanted:
            ages, ids = self.ages.of_slots(self._update), self._ids(passage_ids)
            batch = (queries, passages, ids)
            self.look = look(*batch, self.bank, ages, self.temperature, self.banks or "both")
        self.ages.enqueue(self._update, len(queries))
        if waiting:
            # The bank fills while it waits, and costs no update of negatives when it comes in.
            with torch.no_grad():
                self._against_bank(queries, passages, passage_ids)
            return self.in_batch_loss(queries, passages, passage_ids)
        loss = self._against_bank(queries, passages, passage_ids)
        if due and (wanted or (self._update + 1) % EVERY == 0) and self.banks != "queries":
            self.shift = score_shift(self.bank, self.config.update_size)
            self._looked = True
        return loss

    def in_batch_loss(self, queries: Tensor, passages: Tensor, passage_ids: Tensor) -> Tensor:
        """() fp32 loss of a batch against itself alone."""
        ids, symmetric = self._ids(passage_ids), self.config.symmetric
        return contaccum_loss(queries, passages, None, self._tau(), ids, symmetric=symmetric)

    def observed(self) -> dict[str, Any]:
        """What was looked at in this update, by the names of UpdateMetrics."""
        seen = {} if self.look is None else asdict(self.look)
        if self.shift is not None:
            seen |= {"bank_score_gap": self.shift.gap, "bank_score_spread": self.shift.spread}
        return seen

    def warnings(self) -> list[str]:
        """What the update has shown of drift, in words, once for each thing."""
        said = self._watch.scores(self.shift, self.drift) if self._looked else []
        if self.bank is not None and self.transport is not None:
            fresh = self.transport.within_limit()
            said += self._watch.window(self.bank, fresh, self.config.update_size)
        return said

    def window(self) -> int | None:
        """Filled slots in use; None without a bank."""
        return None if self.bank is None else self.bank.used

    def oldest(self) -> int | None:
        """Age of the oldest slot in updates; None without a bank or with an empty one."""
        return self.ages.oldest(self._update)

    def parameters(self) -> list[nn.Parameter]:
        """What is learned here, beside the encoders."""
        return [] if self.learned is None else list(self.learned.parameters())

    def state_dict(self) -> dict[str, Any]:
        """All that later losses depend on."""
        bank = None if self.bank is None else self.bank.state_dict()
        probes = {} if self.transport is None else self.transport.state_dict()
        learned = {} if self.learned is None else self.learned.state_dict()
        ages = self.ages.state()
        return {"bank": bank, "ages": ages, "probes": probes, "temperature": learned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        if self.bank is not None:
            self.bank.load_state_dict(state["bank"])
        if self.learned is not None:
            self.learned.load_state_dict(state["temperature"])
        if self.transport is not None:
            self.transport.load_state_dict(state["probes"])
        self.ages.set_state(state["ages"])

    def _against_bank(self, queries: Tensor, passages: Tensor, passage_ids: Tensor) -> Tensor:
        assert self.bank is not None and self.banks is not None
        settings: dict[str, Any] = {
            "temperature": self._tau(),
            "passage_ids": self._ids(passage_ids),
            "row_weighting": self.config.row_weighting,
            "banks": self.banks,
            "center_over": self.center_over,
        }
        if passages.shape[1] > self.bank.passages_per_query:
            return positive_bank_loss(queries, passages, self.bank, **settings)
        settings["symmetric"] = self.config.symmetric
        return contaccum_loss(queries, passages, self.bank, **settings)

    def _tau(self) -> float | Tensor:
        """The temperature, with its graph where it is learned and a gradient is wanted."""
        if self.learned is None or not torch.is_grad_enabled():
            return self.temperature
        return self.learned()

    def _ids(self, passage_ids: Tensor) -> Tensor | None:
        return passage_ids if self.config.mask_false_negatives else None
