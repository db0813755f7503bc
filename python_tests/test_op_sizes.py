"""Embedding sizes and banks as models have them, on every family of CUDA kernels.

Histories of thousands of slots, judged on the device itself: the oracle's loss runs over the full
matrix of the bank as it is, and what the bank should hold is computed here from all that went in:
the oracle's own bank, a Python list, is too slow for that. tolerances.py has the bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from scratch_tables import scratch_table
from tolerances import Kernels, Sizes, assert_gradient, assert_scalar, assert_table, bounds
from torch import Tensor

import contaccum_ext as ca
from contaccum_ext import reference
from contaccum_ext.reference import accumulation_dtype

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TAU = 0.1
CHUNK = 64  # slots at once while the bank is filled


@dataclass(frozen=True)
class Case:
    """One history: the bank is filled up to `room` free slots, then the batches follow."""

    d: int
    dtype: torch.dtype
    capacity: int
    batches: tuple[int, ...]
    m: int = 1
    given: torch.dtype | None = None  # dtype of the inputs, as the bank's if None
    ids: bool = False
    window: int | None = None
    room: int = 80
    layout: ca.BankLayout | None = None

    def families(self) -> list[str]:
        """Of kernels, for the loss or, beyond d = 1024, for entries of the table alone."""
        tensor_cores = self.dtype in (BF16, F16) and self.d % 8 == 0
        return ["portable", "library", *(["tensor cores"] if tensor_cores else [])]


BLOCKS, THIRDS, SIXTY_FOURS = (ca.BankLayout(8, *x) for x in ((512, 512), (256, 768), (64, 384)))

# n * m around 64 and 128, where tiles end; capacities around 4,096, below which another kernel has
# the rows of the bank; wrapping in the middle of a tile; every d of the usual encoders.
LARGE = {
    # Few columns and few rows have tiles of their own: up to n * m = 64 and, with 132 processors,
    # 8,448 slots; up to 4,224 of them upkeep has thread blocks of its own.
    "few rows": Case(768, BF16, 2048, (8, 8, 7, 1, 30, 8, 32, 33), 2, ids=True),
    "few rows, window": Case(384, F16, 1500, (3, 8, 17, 21, 22, 30), 3, window=600, given=F32),
    "few rows, upkeep apart": Case(128, F16, 4224, (8, 64, 65), ids=True),
    "few rows, upkeep not apart": Case(128, F16, 4225, (8, 64, 65), ids=True),
    "few rows, all processors": Case(72, BF16, 8448, (1, 8, 33, 64), ids=True, window=3000),
    "no longer few rows": Case(72, BF16, 8449, (1, 8, 33, 64), ids=True),
    "d = 384": Case(384, BF16, 4096, (1, 63, 64, 65, 200), ids=True, given=F32),
    "d = 384, m = 2": Case(384, F16, 4097, (1, 31, 32, 33, 64, 65), 2),
    "d = 384, window": Case(384, BF16, 8192, (127, 128, 129), window=1000, ids=True),
    "d = 768": Case(768, BF16, 9000, (1, 63, 64, 65, 127, 128, 129)),
    "d = 768, m = 2, window": Case(768, F16, 5003, (1, 32, 64, 65), 2, window=1500, ids=True),
    "d = 768, m = 3": Case(768, BF16, 8192, (1, 21, 22, 43), 3, given=F32),
    "d = 768, fp32": Case(768, F32, 6000, (1, 64, 65, 200), ids=True),
    "d = 768, fp64": Case(768, F64, 4100, (1, 65, 200)),
    "d = 1024": Case(1024, BF16, 4500, (1, 8, 9, 16, 17, 200), ids=True),
    "d = 1024, fewer slots": Case(1024, F16, 4095, (1, 65, 200), given=F32),
    "d = 2048": Case(2048, BF16, 4100, (1, 65, 200), ids=True),
    "d = 2048, fp32": Case(2048, F32, 4100, (1, 65, 200), window=1000),
    "d = 4096": Case(4096, BF16, 4200, (1, 65, 200), given=F32),
    "d = 4096, fp32": Case(4096, F32, 4200, (1, 65, 200), ids=True),
    "d = 8": Case(8, BF16, 4096, (1, 65, 200)),
    "d = 100, a multiple of 4": Case(100, F16, 4096, (1, 65, 200), ids=True),
    "d = 769, odd": Case(769, BF16, 4500, (1, 65, 200)),
    "d = 1032, beyond 1024": Case(1032, BF16, 4200, (1, 65, 129), window=1000),
    # More local rows and more scores than the library multiplies at once.
    "several chunks": Case(5, F32, 8960, (1100,), 2, ids=True, window=8000),
    "several chunks, fp64": Case(6, F64, 9000, (1100,)),
    "several chunks, fp16": Case(16, F16, 9001, (1100,)),
    # A batch as large as is promised, and banks that take it or have all slots overwritten by it.
    "n = 8,192": Case(64, BF16, 9000, (8192, 64, 64), ids=True),
    "n = 8,192, all slots": Case(768, F16, 4096, (8192, *[64] * 9)),
    # Offsets of as many slots as in large banks, more than eight of them to a split and fewer.
    "an offset for a block": Case(768, BF16, 8192, (129, 64, 65), layout=BLOCKS, ids=True),
    "an offset for a third of a block": Case(384, F16, 9001, (64, 200), 2, layout=THIRDS),
    "many offsets to a split": Case(768, BF16, 8200, (1500, 65), layout=SIXTY_FOURS, window=5000),
}
SMALL = {
    "bf16": Case(48, BF16, 300, (1, 63, 64, 65), ids=True, given=F32),
    "fp16, m = 2": Case(40, F16, 257, (1, 32, 33), 2, window=100),
    "fp32": Case(33, F32, 256, (1, 65, 129)),
    "fp64": Case(24, F64, 200, (7, 64, 1), 2, ids=True),
    "n = 8,192": Case(16, BF16, 300, (8192, 64, 64, 64, 64), ids=True),
}


class History:
    """A bank with drift correction, and all that ever went into it."""

    def __init__(self, case: Case, kernels: Kernels) -> None:
        self.case, self.device, self.kernels = case, kernels.device, kernels
        self.bank = ca.DualMemoryBank(
            *(case.capacity, case.d, case.m, case.dtype, self.device),
            drift="mean",
            layout=case.layout,
        )
        self.bank.window = case.window
        self.generator = torch.Generator(self.device).manual_seed(case.d)
        self.vectors: list[Tensor] = []  # (n, 1 + m, d) each, as the bank rounds them
        self.ids: list[Tensor] = []  # (n, m) each

    def draw(self, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Vectors of norm 1 around a mean that moves from batch to batch."""
        case, kind = self.case, {"generator": self.generator, "device": self.device}
        x = torch.randn(n, 1 + case.m, case.d, dtype=F64, **kind)
        x = x + 0.5 * torch.randn(1 + case.m, case.d, dtype=F64, **kind)
        x = torch.nn.functional.normalize(x, dim=-1).to(case.given or case.dtype)
        ids = torch.randint(-1, 500, (n, case.m), **kind)
        self.vectors.append(x.to(case.dtype))
        self.ids.append(ids if case.ids else torch.full_like(ids, -1))
        return x[:, 0], x[:, 1:], ids if case.ids else None

    def fill(self) -> None:
        free = self.case.capacity - self.case.room
        while free:
            n = min(free, CHUNK)
            q, p, ids = self.draw(n)
            ca.contaccum_loss(q, p, self.bank, TAU, ids)
            free -= n

    def exact_offsets(self) -> Tensor:
        """(F, 1 + m, d) mean now minus mean of the slot's block as of when it was written.

        float64, from the definition: the running mean forgets a tenth with each batch, and a block
        keeps the average, over the slots written in one lap, of the mean after their batch.
        """
        bank, sizes = self.bank, torch.tensor([len(x) for x in self.vectors], device=self.device)
        means = [self.vectors[0].double().mean(0)]
        for x in self.vectors[1:]:
            keep = bank.drift_decay
            means.append(keep * means[-1] + (1 - keep) * x.double().mean(0))
        batch = torch.repeat_interleave(sizes)  # of each slot ever written
        slot = torch.arange(len(batch), device=self.device)
        lap, position = slot // bank.capacity, slot % bank.capacity
        blocks = bank.layout.offset_blocks(bank.capacity)
        block = lap * blocks + position // bank.layout.offset_block
        shares = torch.zeros(int(block.max()) + 1, len(means), dtype=F64, device=self.device)
        shares.index_put_((block, batch), torch.ones_like(batch, dtype=F64), accumulate=True)
        shares /= shares.sum(1, keepdim=True)
        stored = (shares @ torch.stack(means).flatten(1)).unflatten(1, means[0].shape)
        return means[-1] - stored[block[-len(bank) :]]

    def weights(self, q: Tensor, p: Tensor, ids: Tensor | None) -> dict[str, float]:
        """How the probabilities are spread that meet local vectors; see tolerances.py.

        In float32: a bound is made of them.
        """
        bank, m, local = self.bank, self.case.m, q.shape[0]
        used = slice(len(bank) - min(bank.window, len(bank)), None)
        rows = torch.cat([q.float(), (bank.queries() + bank.query_offsets())[used]])
        columns = torch.cat([p.float(), (bank.passages() + bank.passage_offsets())[used]])
        scores = rows @ columns.flatten(0, 1).T / TAU
        if ids is not None:
            of_columns = torch.cat([ids, bank.passage_ids()[used]])
            of_rows = of_columns[:, :1]
            scores[(of_rows == of_columns.flatten()) & (of_rows != -1)] = -torch.inf
        target = torch.arange(len(rows), device=self.device)
        scores[target, target * m] = (rows * columns[:, 0]).sum(1) / TAU
        weights = scores.softmax(1)
        weights[target, target * m] = 0
        columns = weights[:, : local * m]
        return {
            "row_spread": weights[:local].square().sum(1).max().sqrt().item(),
            "column_spread": columns.square().sum(0).max().sqrt().item(),
            "column_mass": 1 + columns.sum(0).max().item(),  # 1: the target
        }

    def sizes(self, n: int, **weights: float) -> Sizes:
        """What the bounds depend on: vectors have norm 1 up to their rounding."""
        bank, case = self.bank, self.case
        offsets = torch.cat([bank.query_offsets()[:, None], bank.passage_offsets()], 1).double()
        vectors = torch.cat(self.vectors).abs().max().item()
        return Sizes(
            n=max(n, CHUNK, *case.batches),
            m=case.m,
            d=case.d,
            filled=len(bank),
            scale=1 / TAU,
            norm=1.01 + offsets.norm(dim=-1).max().item(),
            component=vectors + offsets.abs().max().item(),
            row_weight=1 / n,
            averaged=bank.layout.offset_block,
            **weights,
        )

    def step(self, n: int) -> None:
        """A loss with gradients against the oracle over the bank as it stands before."""
        case, bank = self.case, self.bank
        q, p, ids = self.draw(n)
        runs = []
        for compute in (F64, accumulation_dtype(case.dtype)):
            given = [v.to(F64) if compute == F64 else v.clone() for v in (q, p)]
            given = [v.requires_grad_() for v in given]
            loss = reference.contaccum_loss(
                *given, bank, TAU, ids, enqueue=False, compute_dtype=compute
            )
            runs.append((loss.detach(), *torch.autograd.grad(loss, given)))
        (exact_loss, *exact), (same_loss, *same) = runs
        tol = bounds(self.sizes(n, **self.weights(q, p, ids)), case.dtype, self.kernels)
        q, p = q.requires_grad_(), p.requires_grad_()
        loss = ca.contaccum_loss(q, p, bank, TAU, ids)
        dq, dp = torch.autograd.grad(loss, (q, p))
        assert_scalar("loss", loss.detach(), same_loss, exact_loss, tol.loss)
        assert_gradient("dq", dq, same[0], exact[0], tol.dq, tol.dq_l2)
        assert_gradient("dp", dp, same[1], exact[1], tol.dp, tol.dp_l2)

    def check_bank(self) -> None:
        """Contents to the bit, offsets and Invariant T."""
        bank, written = self.bank, sum(len(x) for x in self.vectors)
        held = torch.cat(self.vectors)[-bank.capacity :]
        assert torch.equal(bank.queries(), held[:, 0])
        assert torch.equal(bank.passages(), held[:, 1:])
        assert torch.equal(bank.passage_ids(), torch.cat(self.ids)[-bank.capacity :])
        tol = bounds(self.sizes(1), self.case.dtype, self.kernels)
        exact = self.exact_offsets()
        assert (bank.query_offsets() - exact[:, 0]).abs().max() <= tol.offset
        assert (bank.passage_offsets() - exact[:, 1:]).abs().max() <= tol.offset
        assert_table(bank.table(), scratch_table(bank, written, 1 / TAU), tol.table)


def run(case: Case, kernels: Kernels) -> None:
    history = History(case, kernels)
    history.fill()
    history.check_bank()
    for n in case.batches:
        history.step(n)
    history.check_bank()
    bank = history.bank
    assert len(bank) == case.capacity, "the case is to go past the ring's end"
    assert case.window is None or case.window <= bank.window < case.capacity
    # Offsets large enough for an error in them to be seen in the loss.
    assert bank.query_offsets().norm(dim=-1).max() > 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name, c in LARGE.items() for family in c.families()]
)
def test_sizes_of_real_encoders(name, family, allow_kernels):
    allow_kernels(family)
    run(LARGE[name], Kernels("cuda", library=family == "library"))
    torch.cuda.empty_cache()  # the full matrices of the largest case take 30 GB


@pytest.mark.parametrize("name", SMALL)
def test_small_sizes(device, name):
    run(replace(SMALL[name], room=50), Kernels(device))


def test_more_components_than_the_kernels_hold(device):
    bank = ca.DualMemoryBank(4, 4097, device=device)
    q = torch.zeros(2, 4097, device=device)
    if device == "cpu":
        assert ca.contaccum_loss(q, q, bank).isfinite()
        return
    with pytest.raises(RuntimeError, match="queries: expected d of at most 4096"):
        ca.contaccum_loss(q, q, bank)
    assert len(bank) == 0
