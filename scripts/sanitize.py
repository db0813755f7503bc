#!/usr/bin/env python3
"""Steps over small banks that take every CUDA kernel once, for compute-sanitizer.

    compute-sanitizer --tool racecheck python scripts/sanitize.py [NAME ...]

Likewise memcheck, synccheck and initcheck; for the last, PYTORCH_NO_CUDA_MEMORY_CACHING=1 lets it
see where an allocation ends. NAMEs, or how several begin, choose among the histories; all without.
The values are the tests' business, here they only must be finite.

Tools take their time by launch and by access to memory. So banks are small and steps few: a bank is
filled by hand, up to a few slots before the ring's end. Where kernels keep several tiles in flight
there are local vectors enough that few splits are left, each with several tiles of the bank: on
132 processors some three, and as many local ones.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

import contaccum_ext as ca

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class History:
    """A few steps; with a rebuild of the table before the first one, which larger banks skip."""

    capacity: int
    d: int
    m: int
    n: int
    dtype: torch.dtype
    drift: str = "mean"
    ids: bool = True
    temperature: float = 0.1
    rebuild: bool = False
    empty: bool = False  # to begin with
    # A temperature that is learned, the loss in both directions, and centered gradients.
    both: bool = False


HISTORIES = {
    "hopper-1": History(1344, 128, 1, 1056, BF16),  # a thread block holds whole vectors
    "hopper-2": History(1344, 768, 2, 300, F16),  # two share them
    "hopper-1-plain": History(1344, 384, 1, 1056, BF16, "none", ids=False),
    "hopper-2-plain": History(1344, 768, 1, 576, F16, "none"),
    "hopper-1024": History(1344, 1024, 1, 576, BF16),
    # Scores so far apart that references rise tile by tile and biases leave nothing of weights.
    "hopper-far": History(1344, 768, 1, 576, BF16, temperature=0.002),
    "hopper-far-plain": History(1344, 384, 1, 1056, BF16, "none", temperature=0.002),
    # Splits share a place by fours.
    "hopper-many": History(1 << 19, 128, 1, 1056, BF16, "none", empty=True),
    "hopper-rows": History(8512, 128, 1, 40, BF16),  # few columns, not few rows
    "small": History(2048, 768, 2, 8, BF16),  # mma.sync; upkeep apart
    "small-plain": History(2048, 768, 2, 8, F16, "none", ids=False),
    "small-whole": History(4300, 64, 1, 8, BF16),  # upkeep behind local columns
    "small-rebuild": History(600, 256, 1, 40, BF16, rebuild=True),
    # A slot's passages do not fit tiles for Hopper.
    "mma-wide": History(4160, 64, 3, 30, BF16),
    "mma-narrow": History(8512, 64, 3, 16, F16),
    "portable-32": History(100, 48, 1, 8, F32, rebuild=True),
    "portable-64": History(60, 33, 2, 5, F64, "none", rebuild=True),
    "portable-large": History(20, 16, 2, 30, F32, empty=True),  # a batch larger than the bank
    "library-32": History(2048, 512, 1, 128, F32),
    "library-16": History(2050, 1100, 1, 128, F16),  # and a short last block
    "library-rebuild-32": History(1500, 64, 2, 8, F32, rebuild=True),
    "library-rebuild-64": History(1500, 64, 1, 8, F64, both=True),
    "library-rebuild-16": History(1500, 65, 2, 8, BF16, rebuild=True),
    "both-hopper": History(1344, 128, 1, 300, BF16, both=True),
    "both-small": History(600, 256, 2, 8, F16, both=True),
    "both-32": History(100, 48, 2, 8, F32, both=True),
    "both-64": History(60, 33, 1, 5, F64, "none", both=True),
}


def vectors(*shape: int) -> torch.Tensor:
    """Of length 1."""
    return torch.nn.functional.normalize(torch.randn(*shape, device="cuda"), dim=-1)


def fill(bank: ca.DualMemoryBank, case: History) -> None:
    """Fill a bank without a step, head a batch and a half before the ring's end."""
    slots, m, d = case.capacity, case.m, case.d
    bank.bank_queries.copy_(vectors(slots, d))
    bank.bank_passages.copy_(vectors(slots, m, d))
    bank.means.copy_(vectors(*bank.means.shape))
    if case.ids:
        bank.bank_ids.random_(-1, 50)
    head = max(0, slots - case.n * 3 // 2)
    bank.cursor.copy_(torch.tensor([head, slots], device="cuda"))
    for table in (bank.block_lse, bank.group_lse, bank.row_state):
        table.zero_()  # of no bank, but finite
    bank.restore_mirror()
    if not case.rebuild and not case.both:
        bank.accept(1.0 / case.temperature, bank.window_blocks(), case.ids)


def run(name: str, case: History) -> None:
    """Three steps, the last with half of the bank."""
    torch.manual_seed(0)
    kinds = {"learn_temperature": case.both, "symmetric": case.both}
    bank = ca.DualMemoryBank(case.capacity, case.d, case.m, case.dtype, "cuda", case.drift, **kinds)
    if not case.empty:
        fill(bank, case)
    for step in range(3):
        if step == 2:
            bank.window = max(1, case.capacity // 2)
        batch = vectors(case.n, 1 + case.m, case.d).to(case.dtype)
        ids = torch.randint(-1, 50, (case.n, case.m), device="cuda") if case.ids else None
        queries = batch[:, 0].contiguous().requires_grad_()
        passages = batch[:, 1:].contiguous().requires_grad_()
        temperature: float | torch.Tensor = case.temperature
        if case.both:
            temperature = torch.tensor(temperature, device="cuda", requires_grad=True)
        options = {"symmetric": case.both, "center_over": 2 if case.both else None}
        loss = ca.contaccum_loss(queries, passages, bank, temperature, ids, **options)
        loss.backward()
        if not torch.isfinite(loss):
            raise SystemExit(f"{name}: loss {loss.item()}")


def without_bank() -> None:
    """In-batch InfoNCE."""
    queries = torch.randn(80, 384, device="cuda", dtype=BF16, requires_grad=True)
    ca.contaccum_loss(queries, queries.detach(), None, 20.0).backward()


def main() -> None:
    """The histories asked for, and a loss without a bank."""
    parser = argparse.ArgumentParser(description="Take every CUDA kernel through a few steps.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(HISTORIES))
    wanted = parser.parse_args().names or [""]
    chosen = {}
    for start in wanted:
        found = [start] if start in HISTORIES else [n for n in HISTORIES if n.startswith(start)]
        if not found:
            parser.error(f"no history is called {start}; there are {', '.join(HISTORIES)}")
        chosen |= {name: HISTORIES[name] for name in found}
    for name, case in chosen.items():
        run(name, case)
    if "" in wanted:
        without_bank()
    torch.cuda.synchronize()
    print(f"{len(chosen)} histories, all finite")


if __name__ == "__main__":
    main()
