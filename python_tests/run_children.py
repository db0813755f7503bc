"""Runs of `contaccum train` in children that can be killed, and what makes two runs the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch
from tiny_retriever import write_tiny_data, write_tiny_encoder

from contaccum_ext.cli import main

# Each child is a fork of a process that has imported everything: a start costs 0.1 s, not 5.
FORKSERVER = multiprocessing.get_context("forkserver")


def train_in_child(arguments: list[str], output: str, die_at: int | None) -> None:
    """`contaccum ARGUMENTS`; killed at the given call to the file system under `output`."""
    torch.set_num_threads(1)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    calls = 0

    def count(event: str, args: tuple) -> None:
        nonlocal calls
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            calls += str(args[0]).startswith(output)
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if die_at is not None:
        sys.addaudithook(count)
    sys.exit(main(arguments))


class Runs:
    """Starts `contaccum train` on the tiny data in children."""

    def __init__(self, directory: Path) -> None:
        data = write_tiny_data(directory / "data")
        encoder = write_tiny_encoder(directory / "encoder", dropout=0.1)
        self.arguments = ["train", "--data", str(data), "--encoder", str(encoder)]
        settings = {
            "query_max_length": 16,
            "passage_max_length": 24,
            "local_batch_size": 4,
            "accumulation_steps": 2,
            "bank_size": 20,
            "checkpoint_every": 2,
            "diagnostics_every": 3,
        }
        for key, value in settings.items():
            self.arguments += ["--set", f"{key}={value}"]
        FORKSERVER.set_forkserver_preload(["tiny_retriever", "contaccum_ext.commands"])

    def train(
        self, output: Path, updates: int, die_at: int | None = None, seconds: float | None = None
    ) -> int:
        """Exit code of one attempt; negative when it was killed, after `seconds` at the latest."""
        arguments = [*self.arguments, "--output", str(output), "--updates", str(updates)]
        arguments += ["--resume"]
        child = FORKSERVER.Process(target=train_in_child, args=(arguments, str(output), die_at))
        child.start()
        child.join(seconds)
        if child.is_alive():
            child.kill()
        child.join(60)
        assert child.exitcode is not None
        return child.exitcode


def lines_without_times(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["queries_per_second"], line["peak_memory"]
    return lines


def assert_same_state(ours, theirs) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_same_state(value, theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for value, other in zip(ours, theirs, strict=True):
            assert_same_state(value, other)
    else:
        assert ours == theirs


def assert_same_run(ours: Path, theirs: Path) -> None:
    def files(run: Path) -> dict[str, bytes]:
        found = {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}
        del found["metrics.jsonl"]
        return {name: text for name, text in found.items() if not name.endswith(".pt")}

    assert files(ours) == files(theirs)
    assert lines_without_times(ours) == lines_without_times(theirs)
    states = sorted(path.relative_to(ours) for path in ours.rglob("training_state.pt"))
    assert len(states) == 2
    for path in states:
        state = torch.load(ours / path, weights_only=True)
        assert state["scoring"]["bank"]["bank_queries"].abs().sum() > 0
        assert_same_state(state, torch.load(theirs / path, weights_only=True))
