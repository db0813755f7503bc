"""Checkpoints: Hugging Face encoder directories, what evaluation needs, what a resumed run needs.

CHECKPOINT/query_encoder/      config.json, model.safetensors, tokenizer: AutoModel opens it
CHECKPOINT/passage_encoder/    likewise; absent when one encoder is shared
CHECKPOINT/contaccum.json      settings of the run and the number of updates done
CHECKPOINT/training_state.pt   optimizer, bank and random state; absent in the final one
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from contaccum_ext.training.config import ConfigError, TrainConfig
from contaccum_ext.training.encoder import (
    QUERY_DIRECTORY,
    DualEncoder,
    EncoderError,
    load_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FINAL = "final"
SETTINGS_FILE = "contaccum.json"
STATE_FILE = "training_state.pt"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint."""

    model: DualEncoder
    tokenizer: PreTrainedTokenizerBase
    config: TrainConfig
    updates: int  # optimizer updates done
    path: Path

    def training_state(self) -> dict[str, Any]:
        """What `save_checkpoint` was given as `state`.

        Raises:
            EncoderError: the checkpoint is a final one and holds none.
        """
        file = self.path / STATE_FILE
        if not file.is_file():
            raise EncoderError(f"{self.path}: holds no {STATE_FILE}, training cannot go on from it")
        return torch.load(file, map_location="cpu", weights_only=True)


def write_atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a directory so that `target` is at every moment the old one or the new one, complete.

    The new content is written to a temporary directory beside it and flushed to disk before it
    takes the name; an existing directory is moved aside first and removed last. After a failure
    the old one is in place and the temporary one is gone.

    Args:
        target: directory to create or replace.
        write: fills the (existing, empty) directory it is given.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{os.getpid()}.new"
    previous = target.parent / f".{target.name}.{os.getpid()}.old"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        if target.exists():
            target.rename(previous)
        try:
            temporary.rename(target)
        except OSError:
            if previous.exists():
                previous.rename(target)
            raise
        _flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(checkpoint: Checkpoint, state: dict[str, Any] | None = None) -> None:
    """Write a checkpoint to its path, replacing one that is there only when complete.

    Args:
        checkpoint: what to write and where.
        state: tensors and plain values a resumed run needs; None for a final checkpoint.
    """
    settings = {"updates": checkpoint.updates, "config": checkpoint.config.to_dict()}

    def write(directory: Path) -> None:
        checkpoint.model.save(directory, checkpoint.tokenizer)
        (directory / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
        if state is not None:
            torch.save(state, directory / STATE_FILE)

    write_atomically(checkpoint.path, write)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint, or the best one of a run directory: its final one, else the newest.

    Raises:
        EncoderError: neither is there, or it is damaged.
    """
    directory = Path(path)
    if not (directory / SETTINGS_FILE).is_file():
        if (directory / FINAL / SETTINGS_FILE).is_file():
            directory = directory / FINAL
        elif (newest := newest_resumable(directory)) is not None:
            directory = newest
        else:
            raise EncoderError(
                f"{path}: no checkpoint there (expected {SETTINGS_FILE}, or the output directory "
                f"of a training run)"
            )
    try:
        settings = json.loads((directory / SETTINGS_FILE).read_text(encoding="utf-8"))
        config = TrainConfig.from_mapping(settings["config"], str(directory / SETTINGS_FILE))
        updates = int(settings["updates"])
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, ConfigError) else f"damaged {SETTINGS_FILE}"
        raise EncoderError(f"{directory}: {reason}") from None
    model = DualEncoder.load(directory)
    tokenizer = load_tokenizer(directory / QUERY_DIRECTORY)
    return Checkpoint(model, tokenizer, config, updates, directory)


def intermediate_path(output: Path, updates: int) -> Path:
    """Where the checkpoint after this many updates goes."""
    return output / f"checkpoint-{updates:06d}"


def newest_resumable(output: Path) -> Path | None:
    """The newest intermediate checkpoint of a run directory."""
    found = [path.parent for path in output.glob(f"checkpoint-*/{STATE_FILE}")]
    return max(found, key=lambda path: path.name, default=None)
