"""Runs a function in several processes of one group, as torchrun would start them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from run_children import FORKSERVER

COUNT = 2
FORKSERVER.set_forkserver_preload(["contaccum_ext.commands", "tiny_sentence_transformer"])
LIMIT = timedelta(seconds=60)  # that one process waits for another, which may have failed


def run_together(
    directory: Path, work: Callable, *arguments: Any, count: int = COUNT, device: str = "cpu"
) -> list[Any]:
    """What ``work(*arguments)`` gives in each process, on the CPU, in the order of their ranks.

    Args:
        directory: scratch, made anew.
        work: a function of a module, so that children find it; its result can be saved.
        arguments: the same for all.
        count: processes.
        device: "cuda" gives each a GPU of its own and lets them talk by NCCL.

    Raises:
        RuntimeError: with the traceback of the first process that failed.
    """
    directory.mkdir()
    children = [
        FORKSERVER.Process(target=_child, args=(rank, count, device, directory, work, arguments))
        for rank in range(count)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(2 * LIMIT.total_seconds())
        if child.is_alive():
            child.kill()
            child.join()
    failures = sorted(directory.glob("*.txt"))
    if failures:
        raise RuntimeError(failures[0].read_text(encoding="utf-8"))
    load = partial(torch.load, map_location="cpu", weights_only=False)
    return [load(directory / f"{rank}.pt") for rank in range(count)]


def place() -> torch.device:
    """Where a process of the group has its tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _child(
    rank: int, count: int, device: str, directory: Path, work: Callable, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    # accelerate looks for them; the processes find each other by a file.
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }
    try:
        store = dist.FileStore(str(directory / "store"), count)
        backend = "gloo"
        if device == "cuda":
            torch.cuda.set_device(rank)
            backend = "nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=LIMIT)
        torch.save(work(*arguments), directory / f"{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        text = f"process {rank}: {traceback.format_exc()}"
        (directory / f"{rank}.txt").write_text(text, encoding="utf-8")
        os._exit(1)  # without waiting for the others
