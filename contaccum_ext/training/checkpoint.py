"""Checkpoints: Hugging Face encoder directories, what evaluation needs, what a resumed run needs.

CHECKPOINT/query_encoder/      config.json, model.safetensors, tokenizer: AutoModel opens it
CHECKPOINT/passage_encoder/    likewise; absent when one encoder is shared
CHECKPOINT/contaccum.json      settings, data and updates done of the run; the files and their sizes
CHECKPOINT/training_state.pt   optimizer, bank and random state; absent in the final one
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from contaccum_ext.files import flush
from contaccum_ext.training.config import TrainConfig
from contaccum_ext.training.encoder import (
    QUERY_DIRECTORY,
    DualEncoder,
    EncoderError,
    load_tokenizer,
)
from contaccum_ext.training.rules import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS_FILE = "contaccum.json"
STATE_FILE = "training_state.pt"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Args:
        model: both encoders, on the CPU.
        tokenizer: of queries and passages.
        config: settings of the run.
        updates: optimizer updates done.
        path: where it stands, or is to be written.
        data: fingerprint of what it was trained on.
    """

    model: DualEncoder
    tokenizer: PreTrainedTokenizerBase
    config: TrainConfig
    updates: int
    path: Path
    data: dict[str, str] = field(default_factory=dict)

    def training_state(self) -> dict[str, Any]:
        """What `save_checkpoint` was given as `state`.

        Raises:
            EncoderError: the checkpoint is a final one and holds none, or it is damaged.
        """
        file = self.path / STATE_FILE
        if not file.is_file():
            raise EncoderError(f"{self.path}: holds no {STATE_FILE}, training cannot go on from it")
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0]
            raise EncoderError(f"{self.path}: damaged: {STATE_FILE}: {reason}") from None


def standing(target: Path) -> Path:
    """Where the content of a directory written by `write_atomically` stands just now.

    That is `target`, or the place it was moved aside to by a writer that was killed before the new
    content took the name.
    """
    previous = _previous(target)
    return previous if previous.exists() and not target.exists() else target


def write_atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a directory so that `standing(target)` is always the old one or the new one, complete.

    The new content is written to a temporary directory beside it and flushed to disk before it
    takes the name; an existing directory is moved aside first and removed last. After a failure
    the old one is in place and the temporary one is gone; what a killed writer left behind is put
    right by the next one. Two writers of the same directory at once are not provided for.

    Args:
        target: directory to create or replace.
        write: fills the (existing, empty) directory it is given.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    settle(target)
    temporary, previous = _temporary(target), _previous(target)
    temporary.mkdir()
    try:
        write(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        if target.exists():
            target.rename(previous)
        try:
            temporary.rename(target)
        except OSError:
            if previous.exists():
                previous.rename(target)
            raise
        flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def settle(target: Path) -> None:
    """Put right what a killed `write_atomically` left: the old content back, the rest removed."""
    if (previous := standing(target)) != target:
        previous.rename(target)
    for leftover in (_temporary(target), _previous(target)):
        shutil.rmtree(leftover, ignore_errors=True)


def _temporary(target: Path) -> Path:
    return target.parent / f".{target.name}.new"


def _previous(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def save_checkpoint(checkpoint: Checkpoint, state: dict[str, Any] | None = None) -> None:
    """Write a checkpoint to its path, replacing one that is there only when complete.

    Args:
        checkpoint: what to write and where.
        state: tensors and plain values a resumed run needs; None for a final checkpoint.
    """

    def write(directory: Path) -> None:
        checkpoint.model.save(directory, checkpoint.tokenizer)
        if state is not None:
            torch.save(state, directory / STATE_FILE)
        files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
        settings = {
            "updates": checkpoint.updates,
            "config": checkpoint.config.to_dict(),
            "data": checkpoint.data,
            "files": {str(path.relative_to(directory)): path.stat().st_size for path in files},
        }
        (directory / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    write_atomically(checkpoint.path, write)


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open the checkpoint in a directory.

    Raises:
        EncoderError: none is there, or it is damaged.
    """
    try:
        settings = json.loads((directory / SETTINGS_FILE).read_text(encoding="utf-8"))
        config = TrainConfig.from_mapping(settings["config"], str(directory / SETTINGS_FILE))
        updates, data = int(settings["updates"]), dict(settings.get("data", {}))
        files = dict(settings.get("files", {}))
    except ConfigError as error:
        raise EncoderError(str(error)) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise EncoderError(f"{directory}: damaged {SETTINGS_FILE}") from None
    for name, size in files.items():
        file = directory / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "none"
            raise EncoderError(f"{directory}: damaged: {name}: expected {size} bytes, got {found}")
    model = DualEncoder.load(directory)
    tokenizer = load_tokenizer(directory / QUERY_DIRECTORY)
    return Checkpoint(model, tokenizer, config, updates, directory, data)
