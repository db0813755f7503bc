"""Runs many settings side by side, several processes to a GPU, until a deadline.

A worker is a process that takes one setting after another, so that imports, CUDA's start and the
data are paid for once. The parent hands out settings, writes rows, and replaces a worker that died.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.drift import rows
from benchmarks.drift.settings import Setting, from_row

_MARGIN = 1.15  # a run is taken to last this many times its estimate
_POLL = 0.5  # seconds
_DEATHS = 3  # of each worker, one after the other, and the grid gives up: there is no such GPU
_PATIENCE = 10  # seconds that a worker has to end


@dataclass(frozen=True)
class Grid:
    """How a grid is run.

    Args:
        data: directory that `prepare` wrote.
        out: the file of rows.
        gpus: 0 runs on the CPU.
        workers: processes in all, spread over the GPUs.
        deadline: seconds from the start; what still runs then is stopped without a row.
    """

    data: Path
    out: Path
    gpus: int
    workers: int
    deadline: float


class Forecast:
    """How long a setting will take, from the rows there are."""

    def __init__(self, done: Sequence[rows.Row] = ()) -> None:
        self._same: dict[str, float] = {}
        self._ratios: dict[str, list[float]] = {}
        for row in done:
            self.learn(row)

    def learn(self, row: rows.Row) -> None:
        """Take in the seconds of a finished row; errors teach nothing."""
        if "error" in row:
            return
        setting = from_row(row["setting"])
        kind, seconds = setting.without_seed(), row["seconds"]
        self._same[kind] = max(seconds, self._same.get(kind, 0.0))
        self._ratios.setdefault(setting.data, []).append(seconds / work(setting))

    def seconds(self, setting: Setting) -> float | None:
        """From other seeds if possible, else from the work to do; None if nothing is known."""
        kind = setting.without_seed()
        if kind in self._same:
            return self._same[kind]
        ratios = self._ratios.get(setting.data) or [*chain(*self._ratios.values())]
        return work(setting) * statistics.median(ratios) if ratios else None


def work(setting: Setting) -> float:
    """Roughly proportional to a run's seconds, in updates of the central setting."""
    updates = setting.updates or 160 * setting.epochs
    encoded = 1.0
    if setting.correction == "oracle":
        encoded += setting.bank / (
            4 * setting.update_size
        )  # forward passes alone, in large batches
    return updates * (encoded * setting.layers / 2 + (setting.bank / 16384) ** 2)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    device: str
    setting: Setting | None = None
    started: float = field(default=0.0)


def run_grid(settings: Sequence[Setting], grid: Grid) -> int:
    """Run what is not in `grid.out` yet, in order, as far as the deadline allows.

    A setting that failed earlier is tried again.

    Returns:
        The number of settings that have no row afterwards.
    """
    began = time.monotonic()
    done = rows.finished(grid.out)
    pending = [setting for setting in settings if setting.key not in done]
    _say(f"{len(settings)} settings, {len(settings) - len(pending)} done before")
    # Forked children would inherit CUDA's state; one thread each is read when torch is imported.
    os.environ["OMP_NUM_THREADS"] = "1"
    workers = [_start(grid, number) for number in range(min(grid.workers, len(pending)))]
    forecast = Forecast(list(done.values()))
    succeeded = deaths = 0
    total = len(pending)

    try:
        while True:
            left = grid.deadline - (time.monotonic() - began)
            if left <= 0 or deaths >= _DEATHS * len(workers):
                break
            _hand_out(workers, pending, forecast, left)
            busy = [worker for worker in workers if worker.setting]
            if not busy:
                break
            for pipe in wait([worker.pipe for worker in busy], min(_POLL, left)):
                worker = next(w for w in busy if w.pipe is pipe)
                row = _collect(worker)
                rows.append(grid.out, row)
                forecast.learn(row)
                succeeded += "error" not in row
                deaths = deaths + 1 if row.get("fatal") else 0
                left = grid.deadline - (time.monotonic() - began)
                _say(f"{succeeded}/{total} {_told(row)}, {left:.0f} s left")
                if not worker.process.is_alive():
                    workers[workers.index(worker)] = _start(grid, int(worker.process.name))
    finally:
        for worker in workers:
            if worker.setting:
                _say(f"stopped: {worker.setting.data} {worker.setting.label}")
            worker.process.terminate()
        for worker in workers:
            worker.process.join(_PATIENCE)
            if worker.process.is_alive():
                worker.process.kill()
    return total - succeeded


def _start(grid: Grid, number: int) -> _Worker:
    device = f"cuda:{number % grid.gpus}" if grid.gpus else "cpu"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=serve, args=(theirs, grid.data, device), name=str(number), daemon=True
    )
    process.start()
    theirs.close()  # or the end of the process would not be seen
    return _Worker(process, ours, device)


def _hand_out(
    workers: list[_Worker], pending: list[Setting], forecast: Forecast, left: float
) -> None:
    for worker in workers:
        if worker.setting:
            continue
        for setting in pending:
            seconds = forecast.seconds(setting)
            if seconds is None or seconds * _MARGIN <= left:
                pending.remove(setting)
                worker.setting, worker.started = setting, time.monotonic()
                worker.pipe.send(setting)
                break


def _collect(worker: _Worker) -> rows.Row:
    setting = worker.setting
    assert setting is not None
    worker.setting = None
    try:
        row = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join()
        row = _failure(setting, f"the process ended with {worker.process.exitcode}")
        row["fatal"] = True
    if row.get("fatal"):
        worker.process.join()
    return row


def _failure(setting: Setting, error: str) -> rows.Row:
    return {
        "key": setting.key,
        "label": setting.label,
        "setting": dataclasses.asdict(setting),
        "error": error,
    }


def serve(pipe: Connection, data: Path, device_name: str) -> None:
    """A worker: settings come in, rows go out, until the pipe is closed."""
    import torch

    from benchmarks.drift.run import run, set_up

    torch.set_num_threads(1)
    set_up()
    device = torch.device(device_name)
    cache: dict = {}
    while True:
        try:
            setting = pipe.recv()
        except EOFError:
            return
        try:
            row = run(setting, data, device, cache)
        except Exception as error:
            row = _failure(setting, f"{type(error).__name__}: {error}")
            row["traceback"] = traceback.format_exc()[-2000:]
            # After an error of the device itself every later call fails too. Out of memory is none.
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            row["fatal"] = device.type == "cuda" and "CUDA" in str(error) and not out_of_memory
        gc.collect()
        if row.get("fatal"):
            pipe.send(row)
            return
        if device.type == "cuda":
            torch.cuda.empty_cache()
        pipe.send(row)


def _told(row: rows.Row) -> str:
    name = f"{row['setting']['data']} seed {row['setting']['seed']} {row['label']}"
    if "error" in row:
        return f"{name}: FAILED, {row['error'][:200]}"
    return f"{name}: {row['test_ndcg10']:.4f} in {row['seconds']:.1f} s"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
