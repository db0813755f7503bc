"""The banks' part in a run of the Trainer: their size, their place in checkpoints, the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from contaccum_ext.bank_size import width_warnings
from contaccum_ext.drift_signs import EVERY
from contaccum_ext.integrations.sentence_transformers.bank_files import (
    BankFile,
    raise_together,
    summarize,
)
from contaccum_ext.integrations.sentence_transformers.memory import BankMemory
from contaccum_ext.integrations.sentence_transformers.readings import Readings
from contaccum_ext.integrations.sentence_transformers.weights import fingerprint

logger = logging.getLogger(__name__)


class ContAccumCallback(TrainerCallback):
    """Makes the banks of a loss part of the training state.

    - A run begins with empty banks; those of size "auto" learn how large an update is (they are
      four of them, or eight small ones), with drift="auto" which correction suits their age, and
      without drift_decay which one suits the number of batches in an update
      (`contaccum_ext.mean_decay`). From eight batches on means of "mean" need not anticipate.
    - Each checkpoint gets the banks, in a file that is complete or not there. Resuming from it
      restores them, and training goes on as if it had never stopped.
    - Of several processes each has banks of the rows that it has seen, and a file of its own. As
      many processes must resume; what is wrong in one of them is raised in all.
    - Filled slots are in the log, and signs of drift: how the scores of the oldest slots in use
      differ from those of the newest and, with drift="transport", the slots in use and how stale
      they are. Banks too wide for their drift correction are warned of, at the beginning or when
      the signs say so; they are looked at every tenth update, and with each line of the log.

    Args:
        loss: the loss given to the Trainer: one of this package's, a loss around it, or a dict.
        resume: where a resumed run finds its banks. "auto": in the checkpoint
            ``output_dir/checkpoint-N``, or in ``args.resume_from_checkpoint``; otherwise the
            directory given to ``train(resume_from_checkpoint=...)``; None: begin with empty banks.

    Raises:
        ValueError: the loss has no banks.
        RuntimeError: when training begins, the checkpoint has no banks, or those of other weights,
            of another number of processes, or of a loss with other settings, or its file of them is
            damaged.
    """

    def __init__(
        self, loss: nn.Module | Mapping[str, nn.Module], resume: str | Path | None = "auto"
    ) -> None:
        self.resume = resume
        self.memories = _memories(loss)
        self._drawn = {name: _drawn(loss, memory) for name, memory in self.memories.items()}
        self._readings = Readings(self.memories)
        if not self.memories:
            raise ValueError(
                f"loss: expected a ContAccumLoss, a CachedContAccumLoss or a loss around one, "
                f"got {type(loss).__name__}"
            )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        """Empty the banks and size them, or restore them."""
        # A search for the batch size that fits in memory leaves its result in the state.
        batch = state.train_batch_size if args.auto_find_batch_size else args.train_batch_size
        batch = batch or args.train_batch_size
        if getattr(args.accelerator_config, "split_batches", False):
            batch //= args.world_size
        update_size = batch * args.gradient_accumulation_steps
        rows, datasets = _training_set(train_dataloader)
        share = None if rows is None else -(-rows // args.world_size)
        for name, memory in self.memories.items():
            # Fewer than there are is the safe side: means that lag too much do harm.
            batches = args.gradient_accumulation_steps * self._drawn[name] / datasets
            memory.begin_run(update_size, share, max(1, int(batches)))
        self._readings.begin_run(update_size)
        if args.process_index == 0:
            self._warn(update_size)
        if state.global_step and self.resume is not None and self._have_banks():
            assert model is not None  # the Trainer gives it
            candidates = self._candidates(args, state)
            raise_together(self._restore(_file(args), candidates, state.global_step, model))

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the banks to the checkpoint that the Trainer has just written."""
        directory = _checkpoint(args, state)
        # Without the optimizer's state it is no checkpoint that training could go on from.
        if args.save_only_model or not self._have_banks():
            return
        if not directory.is_dir():  # a hyperparameter search has directories of its own
            logger.warning(f"{directory} does not exist: the banks are not saved")
            return
        assert model is not None  # the Trainer gives it
        banks = {name: memory.state_dict() for name, memory in self.memories.items()}
        _file(args).write(directory, _fingerprint(model), banks)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Count batches anew, since the last update of an epoch may have had fewer, and epochs."""
        for memory in self.memories.values():
            memory.begin_update(state.epoch or 0.0)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Look for signs of drift, where the log is written too seldom to tell of them in time."""
        if state.global_step % EVERY == 0 and not control.should_log:  # the log looks by itself
            self._say(args, self._readings.take()[1])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add what the banks show to the lines about training, and say what it means."""
        if logs is None or "loss" not in logs or not state.log_history:
            return
        values, said = self._readings.take()
        for name, value in values.items():
            logs[name] = state.log_history[-1][name] = value
        self._say(args, said)

    def _say(self, args: TrainingArguments, messages: list[str]) -> None:
        whose = f"process {args.process_index}: " if args.world_size > 1 else ""
        for message in messages:
            logger.warning(f"{whose}{message}")

    def _have_banks(self) -> bool:
        return any(memory.capacity for memory in self.memories.values())

    def _warn(self, update_size: int) -> None:
        for memory in self.memories.values():
            if memory.capacity:
                messages = width_warnings(
                    memory.capacity,
                    update_size,
                    memory.drift,
                    centered=memory.center_over is not None,
                )
                for message in messages:
                    logger.warning(message)

    def _candidates(self, args: TrainingArguments, state: TrainerState) -> list[Path]:
        """Directories that may hold the banks. The Trainer does not tell where it resumed from."""
        if self.resume != "auto":
            return [Path(str(self.resume))]
        directories = [_checkpoint(args, state)]
        if args.resume_from_checkpoint:
            directories.append(Path(args.resume_from_checkpoint))
        return directories

    def _restore(
        self, file: BankFile, candidates: list[Path], step: int, model: nn.Module
    ) -> str | None:
        """Fill the banks from the first of the directories that has them; or why that failed.

        It does not raise: the other processes would wait for this one.
        """
        try:
            weights = _fingerprint(model)
        except Exception as error:
            return f"resume: the model's weights cannot be read ({summarize(error)})"
        reasons = []
        for directory in candidates:
            found = file.read(directory, weights)
            if not isinstance(found, str):
                return self._load(directory / file.name, found)
            reasons.append(found)
        return (
            f"resume: the run goes on from step {step}, but its banks were not found "
            f"({'; '.join(reasons)}). Give ContAccumCallback the checkpoint's directory as "
            f"`resume`, or resume=None to go on with empty banks."
        )

    def _load(self, path: Path, banks: dict[str, dict[str, Any]]) -> str | None:
        if banks.keys() != self.memories.keys():
            wanted, came = sorted(self.memories), sorted(map(str, banks))
            return f"{path}: expected the banks of {wanted}, got {came}"
        for name, memory in self.memories.items():
            try:
                memory.load_state_dict(banks[name])
                logger.info(f"Banks restored from {path}: {memory.filled()} slots filled")
            except RuntimeError as error:
                return f"{path}: the banks were saved with other settings than this run's: {error}"
            except Exception as error:
                return f"{path}: the banks cannot be restored ({summarize(error)})"
        return None


def _memories(loss: nn.Module | Mapping[str, nn.Module]) -> dict[str, BankMemory]:
    """The banks of a loss, of losses inside it or of a dict of losses, by where they are."""
    losses = loss if isinstance(loss, Mapping) else {"": loss}
    return {
        f"{name}.{place}".strip("."): module
        for name, part in losses.items()
        for place, module in part.named_modules()
        if isinstance(module, BankMemory)
    }


def _drawn(loss: nn.Module | Mapping[str, nn.Module], memory: BankMemory) -> float:
    """The part of a loss's batches that each bank of a memory sees: sizes may be drawn by lot."""
    part = 1.0
    for one in loss.values() if isinstance(loss, Mapping) else [loss]:
        for outer in one.modules():
            if isinstance(outer, MatryoshkaLoss) and any(m is memory for m in outer.modules()):
                sizes, drawn = len(outer.matryoshka_dims), outer.n_dims_per_step
                part *= drawn / sizes if 0 < drawn < sizes else 1
    return part


def _training_set(dataloader: DataLoader | None) -> tuple[int | None, int]:
    """Rows, None where nobody knows, and how many data sets they come from."""
    dataset = getattr(dataloader, "dataset", None)
    try:
        rows = len(dataset)  # type: ignore[arg-type]
    except (TypeError, AttributeError):  # the latter from what hands len() on to a part without
        rows = None
    return rows, len(dataset.datasets) if isinstance(dataset, ConcatDataset) else 1


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _file(args: TrainingArguments) -> BankFile:
    return BankFile(args.process_index, args.world_size)


def _fingerprint(model: nn.Module) -> int:
    return fingerprint(model.parameters())
