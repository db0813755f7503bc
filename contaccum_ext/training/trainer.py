"""The training loop."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from contaccum_ext.training.bank_width import bank_warnings
from contaccum_ext.training.checkpoint import Checkpoint, save_checkpoint
from contaccum_ext.training.config import TrainConfig
from contaccum_ext.training.data import Batch, Collator, Draw, Sampler, fingerprint
from contaccum_ext.training.diagnostics import peak_memory, reset_peak_memory
from contaccum_ext.training.encoder import DualEncoder
from contaccum_ext.training.methods import METHODS, Accumulated
from contaccum_ext.training.metrics import DivergedError, UpdateMetrics
from contaccum_ext.training.optimization import (
    GradientNorms,
    LinearSchedule,
    build_optimizer,
    clip_gradients,
    warmup_updates,
)
from contaccum_ext.training.precision import autocast_dtype, gradient_scaler
from contaccum_ext.training.probes import Probes
from contaccum_ext.training.random_state import random_state, seed_everything, set_random_state
from contaccum_ext.training.run_directory import RunDirectory, refuse_several_processes
from contaccum_ext.training.run_log import RunLog

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from contaccum_ext.datasets.base import RetrievalDataset


class Trainer:
    """Trains a dual encoder with one of the methods.

    Args:
        model: trained in place.
        tokenizer: for queries and passages.
        dataset: its train part is trained on.
        config: all settings.
        output: directory for metrics.jsonl and the checkpoints.

    Raises:
        TrainingDataError: the data set does not fit the settings.
        EncoderError: the model cannot do what the settings ask for.
        RunError: there are several processes, by ``torch.distributed`` or by ``WORLD_SIZE``.
    """

    def __init__(
        self,
        model: DualEncoder,
        tokenizer: PreTrainedTokenizerBase,
        dataset: RetrievalDataset,
        config: TrainConfig,
        output: str | Path,
    ) -> None:
        refuse_several_processes()
        seed_everything(config.seed)
        self.device = resolve_device(config.device)
        self.model = model.to(self.device)
        self.model.prepare_training(config)
        self.scaler = gradient_scaler(config, self.device)
        self.tokenizer = tokenizer
        self.config = config
        self.run = RunDirectory(output)
        self.data = fingerprint(dataset)
        self.sampler = Sampler(dataset, config)
        self.collate = Collator(tokenizer, dataset.corpus, config)
        self.method = METHODS[config.method](
            config, model.query.dim, len(dataset.train), self.device
        )
        self.total = config.max_updates or config.epochs * self.sampler.updates_per_epoch
        self.schedule = LinearSchedule(
            config.learning_rate, warmup_updates(self.total, config), self.total
        )
        self.optimizer = build_optimizer(
            model, config.learning_rate, config.weight_decay, self.method.scoring.parameters()
        )
        self.probes = self._choose_probes()
        self.done = 0  # updates, skipped ones among them
        self.skipped = 0
        if self.method.bank is not None:
            for message in bank_warnings(config, self.method.bank.capacity):
                warnings.warn(message, stacklevel=2)

    def train(self, progress: bool = True) -> list[UpdateMetrics]:
        """Run the remaining updates and write the final checkpoint.

        Args:
            progress: show a progress bar.

        Returns:
            The metrics of each update run, as written to metrics.jsonl.
        """
        self.model.train()
        history = []
        bar = tqdm(
            total=self.total,
            initial=self.done,
            desc=self.config.method,
            unit="update",
            mininterval=0.5,
            disable=not progress,
        )
        if self.done == 0:
            self.run.begin(self.config, self.data)
        with bar, RunLog(self.run, self.done, self.config.tensorboard) as log:
            while self.done < self.total:
                metrics = self.update()
                history.append(metrics)
                log.write(metrics)
                loss = metrics.in_batch_loss
                bar.set_postfix_str(
                    f"loss {'skipped' if loss is None else f'{loss:.3f}'}, "
                    f"lr {metrics.learning_rate:.1e}, {metrics.queries_per_second:.0f} queries/s",
                    refresh=False,
                )
                bar.update()
                every = self.config.checkpoint_every
                if every and self.done % every == 0 and self.done < self.total:
                    log.flush()
                    self._save(self.run.checkpoint(self.done), self.state_dict())
                    self.run.prune(self.config.keep_checkpoints)
        self._save(self.run.final)
        return history

    def update(self) -> UpdateMetrics:
        """One optimizer update over n*K examples.

        Raises:
            DivergedError: loss or gradient is not finite and `on_nonfinite` is "stop"; the weights
                are left as they were.
        """
        started = time.perf_counter()
        reset_peak_memory(self.device)
        draws = self.sampler.update(self.done)
        learning_rate = self.schedule.at(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

        self.optimizer.zero_grad(set_to_none=True)
        batches = self._micro_batches(draws)
        scoring = self.method.scoring
        may_skip = self.config.on_nonfinite == "skip"
        before = copy.deepcopy(scoring.state_dict()) if may_skip else None
        scoring.begin_update(self.done)
        if scoring.transport is not None and not scoring.transport.started:
            self._follow()
        found = self.method.accumulate(self._encode, batches, self.scaler.scale)
        norms = None if found.non_finite else self._step()
        if norms is None:
            problem = self._problem(found, batches)
            if self.config.on_nonfinite == "stop":
                raise DivergedError(f"{problem}; lower learning_rate, or raise temperature")
            warnings.warn(f"skipped: {problem}", stacklevel=2)
            self.skipped += 1
            if before is not None:
                scoring.load_state_dict(before)
        else:
            self._follow()
            for message in scoring.warnings():
                warnings.warn(f"update {self.done + 1}: {message}", stacklevel=2)
        self.done += 1

        return UpdateMetrics(
            update=self.done,
            loss=found.loss if norms else None,
            in_batch_loss=found.in_batch_loss if norms else None,
            learning_rate=learning_rate,
            grad_norm_query=norms.query if norms else None,
            grad_norm_passage=norms.passage if norms else None,
            grad_norm_ratio=norms.ratio if norms else None,
            queries_per_second=len(draws) / (time.perf_counter() - started),
            bank_filled=0 if self.method.bank is None else len(self.method.bank),
            skipped=self.skipped,
            loss_scale=self.scaler.get_scale() if self.scaler.is_enabled() else None,
            bank_oldest=scoring.oldest(),
            bank_window=scoring.window(),
            bank_staleness=scoring.transport.staleness if scoring.transport else None,
            peak_memory=peak_memory(self.device),
            temperature=scoring.temperature,
            **({} if norms is None else scoring.observed()),
        )

    def _choose_probes(self) -> Probes | None:
        if self.method.scoring.transport is None:
            return None
        draws = self.sampler.probes(self.config.drift_probes)
        return Probes(draws, self.collate, self.config.local_batch_size, self.device)

    def _follow(self) -> None:
        """Let the bank follow the weights as they are now."""
        scoring = self.method.scoring
        if self.probes is None or scoring.transport is None:
            return
        with self._autocast():
            vectors = self.probes.encode(self.model)
        scoring.transport(*(v.to(self.method.loss_device) for v in vectors))

    def _step(self) -> GradientNorms | None:
        """Clip and apply the gradients; None where they are not finite and nothing was done."""
        self.scaler.unscale_(self.optimizer)
        others = self.method.scoring.parameters()
        norms = clip_gradients(self.model, self.config.max_grad_norm, others)
        # Too large a loss scale is found out by trying: the scaler halves it, and the run goes on.
        overflowed = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if norms.finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if norms.finite:
            return norms
        self.skipped += overflowed
        return GradientNorms(None, None) if overflowed else None

    def _problem(self, found: Accumulated, batches: Sequence[Batch]) -> str:
        """Which micro-batch is not finite, in words."""
        where = f"update {self.done + 1}"
        if not found.non_finite:
            return f"{where}: the gradient is not finite, although the loss ({found.loss:g}) is"
        first = found.non_finite[0]
        return (
            f"{where}, micro-batch {first + 1} of {len(batches)}: the loss or its representations "
            f"are not finite, queries {', '.join(batches[first].query_ids)}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights."""
        return {
            "updates": self.done,
            "skipped": self.skipped,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "scoring": self.method.scoring.state_dict(),
            "random": random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as if never stopped; the model must hold the weights saved with the state.

        Args:
            state: what `state_dict` gave, to a trainer of the same settings and data.
        """
        self.done, self.skipped = state["updates"], state["skipped"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.method.scoring.load_state_dict(state["scoring"])
        set_random_state(state["random"])

    def _micro_batches(self, draws: Sequence[Draw]) -> list[Batch]:
        size = self.method.micro_batch_size(self.config)
        return [
            self.collate(draws[start : start + size]).to(self.device)
            for start in range(0, len(draws), size)
        ]

    def _encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with self._autocast():
            return self.model(batch)

    def _autocast(self) -> torch.autocast:
        dtype = autocast_dtype(self.config)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _save(self, path: Path, state: dict[str, Any] | None = None) -> None:
        save_checkpoint(
            Checkpoint(self.model, self.tokenizer, self.config, self.done, path, self.data), state
        )


def resolve_device(name: str) -> torch.device:
    """The device of a `device` setting; auto takes CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
