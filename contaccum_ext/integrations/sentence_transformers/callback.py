"""The banks' part in a run of the Trainer: their size, their place in checkpoints, the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from contaccum_ext.bank_size import width_warnings
from contaccum_ext.files import replace_file
from contaccum_ext.integrations.sentence_transformers.memory import BankMemory
from contaccum_ext.integrations.sentence_transformers.readings import Readings
from contaccum_ext.integrations.sentence_transformers.weights import fingerprint

logger = logging.getLogger(__name__)

_FORMAT = 1


class ContAccumCallback(TrainerCallback):
    """Makes the banks of a loss part of the training state.

    - A run begins with empty banks; those of size "auto" learn how large an update is, and with
      drift="auto" which correction suits their age.
    - Each checkpoint gets the banks, in a file that is complete or not there. Resuming from it
      restores them, and training goes on as if it had never stopped.
    - Filled slots are in the log, and signs of drift: how the scores of the oldest slots in use
      differ from those of the newest and, with drift="transport", the slots in use and how stale
      they are. Banks too wide for their drift correction are warned of, at the beginning or when
      the signs say so.

    Args:
        loss: the loss given to the Trainer: one of this package's, a loss around it, or a dict.
        resume: where a resumed run finds its banks. "auto": in the checkpoint
            ``output_dir/checkpoint-N``, or in ``args.resume_from_checkpoint``; otherwise the
            directory given to ``train(resume_from_checkpoint=...)``; None: begin with empty banks.

    Raises:
        ValueError: the loss has no banks.
        RuntimeError: when training begins, the checkpoint has no banks, or those of other weights,
            or of a loss with other settings.
    """

    def __init__(
        self, loss: nn.Module | Mapping[str, nn.Module], resume: str | Path | None = "auto"
    ) -> None:
        self.resume = resume
        self.memories = _memories(loss)
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
        update_size = (batch or args.train_batch_size) * args.gradient_accumulation_steps
        for memory in self.memories.values():
            memory.begin_run(update_size, _length(train_dataloader))
        self._readings.begin_run(update_size)
        self._warn(update_size)
        if state.global_step and self.resume is not None and self._have_banks():
            assert model is not None  # the Trainer gives it
            self._restore(self._candidates(args, state), state.global_step, model)

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
        content = {
            "format": _FORMAT,
            "weights": _fingerprint(model),
            "banks": {name: memory.state_dict() for name, memory in self.memories.items()},
        }
        replace_file(directory / _file_name(args), lambda file: torch.save(content, file))

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
        for message in said:
            logger.warning(message)

    def _have_banks(self) -> bool:
        return any(memory.capacity for memory in self.memories.values())

    def _warn(self, update_size: int) -> None:
        for memory in self.memories.values():
            if memory.capacity:
                for message in width_warnings(memory.capacity, update_size, memory.drift):
                    logger.warning(message)

    def _candidates(self, args: TrainingArguments, state: TrainerState) -> list[Path]:
        """Files that may hold the banks. The Trainer does not tell where it has resumed from."""
        if self.resume != "auto":
            return [Path(str(self.resume)) / _file_name(args)]
        directories = [_checkpoint(args, state)]
        if args.resume_from_checkpoint:
            directories.append(Path(args.resume_from_checkpoint))
        return [directory / _file_name(args) for directory in directories]

    def _restore(self, candidates: list[Path], step: int, model: nn.Module) -> None:
        weights, reasons = _fingerprint(model), []
        for path in candidates:
            if not path.is_file():
                reasons.append(f"{path}: no such file")
                continue
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content.get("format") != _FORMAT:
                reasons.append(f"{path}: expected format {_FORMAT}, got {content.get('format')}")
            elif content["weights"] != weights:
                reasons.append(f"{path}: saved with other weights than those resumed from")
            else:
                self._load(path, content["banks"])
                return
        raise RuntimeError(
            f"resume: the run goes on from step {step}, but its banks were not found "
            f"({'; '.join(reasons)}). Give ContAccumCallback the checkpoint's directory as "
            f"`resume`, or resume=None to go on with empty banks."
        )

    def _load(self, path: Path, banks: dict[str, dict[str, Any]]) -> None:
        if banks.keys() != self.memories.keys():
            raise RuntimeError(
                f"{path}: expected the banks of {sorted(self.memories)}, got {sorted(banks)}"
            )
        for name, memory in self.memories.items():
            try:
                memory.load_state_dict(banks[name])
            except RuntimeError as error:
                raise RuntimeError(
                    f"{path}: the banks were saved with other settings than this run's: {error}"
                ) from None
            logger.info(f"Banks restored from {path}: {memory.filled()} slots filled")


def _memories(loss: nn.Module | Mapping[str, nn.Module]) -> dict[str, BankMemory]:
    """The banks of a loss, of losses inside it or of a dict of losses, by where they are."""
    losses = loss if isinstance(loss, Mapping) else {"": loss}
    return {
        f"{name}.{place}".strip("."): module
        for name, part in losses.items()
        for place, module in part.named_modules()
        if isinstance(module, BankMemory)
    }


def _length(dataloader: DataLoader | None) -> int | None:
    """Rows of the training set; None where nobody knows."""
    try:
        return len(dataloader.dataset)  # type: ignore[union-attr, arg-type]
    except (AttributeError, TypeError):
        return None


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _file_name(args: TrainingArguments) -> str:
    """Every process has banks of its own."""
    rank = f"_{args.process_index}" if args.world_size > 1 else ""
    return f"contaccum_banks{rank}.pt"


def _fingerprint(model: nn.Module) -> int:
    return fingerprint(model.parameters())
