"""The directory of a run: what is in it, whose it is, and how it survives being killed.

RUN/run.json                 settings and data the run was started with
RUN/metrics.jsonl            a line per optimizer update
RUN/checkpoint-NNNNNN/       the newest intermediate checkpoints
RUN/final/                   the last checkpoint
RUN/tensorboard/             event files, if wanted
RUN/.lock                    held while a process trains here
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch

from contaccum_ext.files import replace_file
from contaccum_ext.processes import several_processes
from contaccum_ext.training.checkpoint import (
    SETTINGS_FILE,
    STATE_FILE,
    Checkpoint,
    open_checkpoint,
    settle,
    standing,
)
from contaccum_ext.training.config import TrainConfig
from contaccum_ext.training.encoder import EncoderError
from contaccum_ext.training.rules import ConfigError

FINAL = "final"
METRICS_FILE = "metrics.jsonl"
RUN_FILE = "run.json"
LOCK_FILE = ".lock"
# What may differ between the parts of a run: it changes no number.
FREE_SETTINGS = ("checkpoint_every", "keep_checkpoints", "tensorboard")


class RunError(ValueError):
    """A run, or a directory for it, that cannot be had as asked; the message is one line."""


def refuse_several_processes() -> None:
    """Refuse to train once in each of several processes, as torchrun would start them.

    Raises:
        RunError: there are several.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if several_processes():
        count = str(torch.distributed.get_world_size())
    if count not in ("", "0", "1"):
        raise RunError(
            f"WORLD_SIZE: expected 1, since this trainer runs in one process, got {count}: each "
            f"would train a copy; start it without torchrun, or unset the variable. "
            f"SentenceTransformerTrainer with ContAccumLoss trains in several"
        )


class RunDirectory:
    """Where a run's files stand.

    Args:
        path: of the directory; made when something is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.final = self.path / FINAL
        self.metrics = self.path / METRICS_FILE

    def holds_run(self) -> bool:
        """Whether a run was started here."""
        kept = (self.path / RUN_FILE, self.metrics, standing(self.final))
        return any(path.exists() for path in kept) or bool(self._checkpoints())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out, and put right what a killed one left behind.

        The system takes the lock back when its holder dies, however it dies.

        Raises:
            RunError: another process trains here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK_FILE).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{self.path}: another process is training there") from None
            settle(self.final)
            for leftover in self.path.glob(".checkpoint-*"):
                shutil.rmtree(leftover)
            yield

    def begin(self, config: TrainConfig, data: Mapping[str, str]) -> None:
        """Note whose directory this is, before anything else is written to it."""
        self.path.mkdir(parents=True, exist_ok=True)
        settings = {"config": config.to_dict(), "data": dict(data)}
        self._replace(RUN_FILE, json.dumps(settings, indent=2) + "\n")

    def refuse_other(self, config: TrainConfig, data: Mapping[str, str]) -> None:
        """Refuse to go on with other settings or other data than the run was started with.

        Raises:
            RunError: naming what differs, or the file that tells is missing or damaged.
        """
        try:
            saved = read_identity(self)
        except RunError as error:
            raise RunError(
                f"--resume: what {self.path} was trained with cannot be told ({error})"
            ) from None
        refuse_difference(self.path, (config, data), saved)

    def newest(self) -> Path | None:
        """The newest intermediate checkpoint."""
        return max(self._checkpoints(), key=_updates_of, default=None)

    def checkpoint(self, updates: int) -> Path:
        """Where the checkpoint after this many updates goes."""
        return self.path / f"checkpoint-{updates:06d}"

    def prune(self, keep: int) -> None:
        """Remove all but the newest intermediate checkpoints."""
        for path in sorted(self._checkpoints(), key=_updates_of)[:-keep]:
            # A name that no reader takes for a checkpoint, before anything is missing in it.
            removed = path.with_name(f".{path.name}.removed")
            path.rename(removed)
            shutil.rmtree(removed)

    def open_log(self, done: int) -> TextIO:
        """metrics.jsonl, to be appended to, with the lines of the first `done` updates only."""
        self.path.mkdir(parents=True, exist_ok=True)
        lines = self.metrics.read_text().splitlines(keepends=True) if self.metrics.exists() else []
        self._replace(METRICS_FILE, "".join(line for line in lines if _update_of(line) <= done))
        return self.metrics.open("a", encoding="utf-8")

    def _checkpoints(self) -> list[Path]:
        return [
            path
            for path in self.path.glob("checkpoint-*")
            if re.fullmatch(r"checkpoint-\d+", path.name)
        ]

    def _replace(self, name: str, text: str) -> None:
        replace_file(self.path / name, lambda file: file.write(text.encode()))


def _updates_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _update_of(line: str) -> float:
    try:
        return int(json.loads(line)["update"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the writer was killed in the middle of it


def read_identity(run: RunDirectory) -> tuple[TrainConfig, dict[str, str]]:
    """Settings of a run and the `fingerprint` of its data.

    Raises:
        RunError: the file that tells is missing or damaged.
    """
    file = run.path / RUN_FILE
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        config = TrainConfig.from_mapping(settings["config"], str(file))
        return config, dict(settings["data"])
    except ConfigError as error:
        raise RunError(str(error)) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{file}: missing or damaged") from None


def refuse_difference(
    where: Path,
    asked: tuple[TrainConfig, Mapping[str, str]],
    saved: tuple[TrainConfig, Mapping[str, str]],
) -> None:
    """Refuse to go on from a run or checkpoint of other settings or other data.

    Args:
        where: it stands.
        asked: settings and `fingerprint` wanted; parts of the data left out are not compared.
        saved: those it was made with.

    Raises:
        RunError: naming the first setting, else the first part of the data, that differs.
    """
    old_settings = saved[0].to_dict()
    for key, value in asked[0].to_dict().items():
        if value != (old := old_settings[key]) and key not in FREE_SETTINGS:
            raise RunError(f"--resume: {key} is {value}, but {where} was trained with {old}")
    for part, value in asked[1].items():
        if value != (old := saved[1].get(part)):
            raise RunError(
                f"--resume: the {part} is not the one {where} was trained on: expected {old}, "
                f"got {value}"
            )


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint, or the best one of a run directory: its final one, else the newest.

    Args:
        path: of a checkpoint, or of the directory of a run.

    Raises:
        EncoderError: neither is there, or it is damaged.
    """
    directory = Path(path)
    run = RunDirectory(directory)
    for candidate in (standing(directory), standing(run.final), run.newest()):
        if candidate is not None and (candidate / SETTINGS_FILE).is_file():
            return open_checkpoint(candidate)
    raise EncoderError(
        f"{path}: no checkpoint there (expected {SETTINGS_FILE}, or the output directory "
        f"of a training run)"
    )


def load_resumable(run: RunDirectory) -> Checkpoint | None:
    """The newest intermediate checkpoint of a run, None where there is none yet.

    Raises:
        EncoderError: it is damaged; the message says how to go on from an older one.
    """
    newest = run.newest()
    if newest is None:
        return None
    try:
        if not (newest / STATE_FILE).is_file():
            raise EncoderError(f"{newest}: damaged: {STATE_FILE}: expected a file, got none")
        return open_checkpoint(newest)
    except EncoderError as error:
        raise EncoderError(
            f"{error}; nothing was changed: to go on from the checkpoint before it, or from the "
            f"beginning, move it away and --resume again"
        ) from None
