"""A bank and its oracle, side by side through a history.

`Twins` gives every call to the op and to the oracle and compares all there is to compare.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from scratch_tables import expected_table, scratch_expected, scratch_table
from strategies import MAX_ID, TEMPERATURES, Setup, Step
from tolerances import Bounds, Kernels, Sizes, assert_gradient, assert_scalar, assert_table, bounds
from torch import Tensor

import contaccum_ext as ca
from contaccum_ext import reference
from contaccum_ext.reference import accumulation_dtype
from contaccum_ext.reference_scores import LaggingScores


class ExactBank(reference.DualMemoryBank):
    """The oracle's bank with running means in float64, whatever the bank's dtype."""

    def clear(self) -> None:
        super().clear()
        self.mean = self.mean.double()
        self.centering = self.centering.double()
        self.mirror.centering = self.mirror.centering.double()

    @property
    def lagging(self) -> tuple[LaggingScores, LaggingScores] | None:
        """Scores of both halves where they are not of the vectors as they are."""
        return self._lagging

    def adopt(self, queries: Tensor, passages: Tensor, mean: Tensor) -> None:
        """Go on with these vectors, and with drift="mean" with this mean in place of all.

        Args:
            queries: (F, d), oldest first.
            passages: (F, m, d), likewise.
            mean: (1 + m, d) float64.
        """
        for slot, query, several in zip(self.slots, queries, passages, strict=True):
            slot.query, slot.passages = query, several
        if self.drift == "mean":
            self.mean = mean
            for generation, (count, _) in self.block_means.items():
                self.block_means[generation] = (count, mean)


class Twins:
    """A bank and its oracle; `run` gives one step to both and compares them."""

    def __init__(self, setup: Setup, device: str, library: bool = False) -> None:
        s = self.setup = setup
        self.device, self.kernels = device, Kernels(device, library)
        self.bank = setup.bank(device)
        self.oracle = ExactBank(
            s.capacity, s.d, s.m, s.bank_dtype, s.drift, layout=self.bank.layout
        )
        self.temperature(Step("temperature", value=TEMPERATURES[setup.seed % 2]))
        self.averaged = self.bank.layout.offset_block if setup.drift == "mean" else 0
        self.largest_batch = 1
        self.table_scale: float | None = (
            None  # the scale of the last call: what the table holds for
        )
        self.norm = self.component = 0.0  # the largest of any vector or offset so far
        self.owed = [0.0, 0.0]  # how far off the two halves' centering may be, elementwise
        self.generator = torch.Generator().manual_seed(setup.seed)

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * self.setup.size
        return self.measured(x.to(dtype or self.setup.input_dtype)).to(self.device)

    def measured(self, x: Tensor) -> Tensor:
        # twice: a vector and the offset added to it
        self.norm = max(self.norm, 2 * x.double().norm(dim=-1).max().item())
        self.component = max(self.component, 2 * x.double().abs().max().item())
        return x

    def draw_batch(self, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
        s = self.setup
        self.batch, self.largest_batch = n, max(self.largest_batch, n)
        q, p = self.draw(n, s.d), self.draw(n, s.m, s.d)
        if not s.ids:
            return q, p, None
        ids = torch.randint(-1, MAX_ID, (n, s.m), generator=self.generator)
        return q, p, ids.to(self.device)

    def bounds(self, row_weight: float = 1.0) -> Bounds:
        s = self.setup
        # The difference of two running means is at most two norms: with the vector three, not two.
        more = 1.5 if s.drift == "mean" else 1.0
        sizes = Sizes(
            n=self.largest_batch,
            m=s.m,
            d=s.d,
            filled=len(self.oracle),
            scale=1 / self.tau,
            norm=more * self.norm,
            component=more * self.component,
            row_weight=row_weight,
            averaged=self.averaged,
        )
        return bounds(sizes, s.bank_dtype, self.kernels)

    def run(self, step: Step) -> None:
        getattr(self, step.kind)(step)
        self.check_bank()

    def temperature_for(self, dtype: torch.dtype, device: str = "cpu") -> float | Tensor:
        """The temperature as a loss gets it: a leaf of that dtype where it is learned."""
        if not self.setup.learn:
            return self.tau
        return torch.tensor(self.tau, dtype=dtype, device=device, requires_grad=True)

    def loss(self, step: Step) -> None:
        s = self.setup
        q, p, ids = self.draw_batch(step.n)
        q, p = q.requires_grad_(), p.requires_grad_()
        options, weighted_all = dict(step.options), step.options.get("row_weighting") == "all"
        if s.symmetric:
            options |= {"banks": "both", "symmetric": True, "enqueue": True}
        used = min(self.oracle.effective_window(), len(self.oracle))
        rows = step.n + (used if options.get("banks") != "passages" else 0)
        tol = self.bounds(1 / (rows if weighted_all else step.n))

        acc = accumulation_dtype(s.bank_dtype)
        plain = [x.detach().cpu().requires_grad_() for x in (q, p)]
        exact = [x.detach().cpu().double().requires_grad_() for x in (q, p)]
        taus = [self.temperature_for(d) for d in (acc, torch.float64)]
        given = (ids if ids is None else ids.cpu(),)
        not_yet, double = {"enqueue": False}, {"compute_dtype": torch.float64}
        inputs = [self.oracle, taus[0], *given]
        owed = self.oracle.centering.clone(), self.oracle.mirror.centering.clone()
        plain_loss = reference.contaccum_loss(*plain, *inputs, **{**options, **not_yet})
        inputs[1] = taus[1]
        one_way = {**options, "symmetric": False, **not_yet}
        first = reference.contaccum_loss(*exact, *inputs, **one_way, **double)
        exact_loss = reference.contaccum_loss(*exact, *inputs, **options, **double)
        tau = self.temperature_for(acc, self.device)
        ours = ca.contaccum_loss(q, p, self.bank, tau, ids, **options)

        assert ours.dtype == acc
        assert_scalar("loss", ours.cpu(), plain_loss, exact_loss, tol.loss)
        leaves = [([q, p], tau), (plain, taus[0]), (exact, taus[1])]
        wanted = [x if isinstance(t, float) else [*x, t] for x, t in leaves]
        grads, plain_grads, exact_grads = (
            torch.autograd.grad(loss, inputs)
            for loss, inputs in zip((ours, plain_loss, exact_loss), wanted, strict=True)
        )
        one_way_grads = torch.autograd.grad(first, exact)
        if options.get("center_over") is not None:
            sums = [x.abs().sum().item() for x in exact_grads[:2]]
            tol = self.centered(tol, options, sums, owed)
        # In the other direction queries are columns and positives are rows.
        both = max(tol.dq, tol.dp), max(tol.dq_l2, tol.dp_l2)
        allowed = [both, both] if s.symmetric else [(tol.dq, tol.dq_l2), (tol.dp, tol.dp_l2)]
        for i, name in enumerate(("dq", "dp")):
            x, one = exact_grads[i], one_way_grads[i].double()
            # Each direction's half is rounded, then their sum.
            rounded = x.abs() + (one.abs() + (2 * x - one).abs()) / 2 if s.symmetric else None
            pair = (plain_grads[i], x)
            assert_gradient(name, grads[i].cpu(), *pair, *allowed[i], rounded=rounded)
        if s.learn:
            pair = (plain_grads[2], exact_grads[2])
            assert_scalar("d_temperature", grads[2].cpu(), *pair, tol.temperature)
        self.table_scale = 1 / self.tau

    def centered(
        self, tol: Bounds, options: dict, sums: list[float], before: tuple[Tensor, Tensor]
    ) -> Bounds:
        """Bounds of gradients less a mean: what the mean's own errors add; see tolerances.py.

        Args:
            tol: of the gradients as they are.
            options: of the loss.
            sums: of the magnitudes of centered gradients, of queries and of passages.
            before: the oracle's state of both halves before this batch.
        """
        s, u = self.setup, torch.finfo(accumulation_dtype(self.setup.bank_dtype)).eps / 2
        after = self.oracle.centering, self.oracle.mirror.centering
        error = [0.0, 0.0]
        for half in (0, 1) if s.symmetric else (0,):
            rows = self.batch * (1 if half else s.m)
            counted = before[half][1].max().item()
            left = max(1.0, options["center_over"] - counted)
            states = before[half][0].abs().max() + after[half][0].abs().max()
            summed = 2 * (sums[0 if half else 1] + rows * states.item())
            each = max(tol.dq, tol.dp) if s.symmetric else tol.dp
            total = self.owed[half] + rows * each + 6 * math.sqrt(rows + 4) * u * summed
            error[half] = total / left / rows
            if options.get("enqueue", True):
                self.owed[half] = total * (1 - 1 / left) + u * states.item()
        mean = max(error)
        norm = mean * math.sqrt(self.batch * s.m * s.d)
        more = {"dp": tol.dp + mean, "dp_l2": tol.dp_l2 + norm}
        if s.symmetric:
            more |= {"dq": tol.dq + mean, "dq_l2": tol.dq_l2 + norm}
        return replace(tol, **more)

    def enqueue(self, step: Step) -> None:
        q, p, ids = self.draw_batch(step.n)
        self.bank.enqueue(q, p, ids)
        self.oracle.enqueue(q.cpu(), p.cpu(), ids if ids is None else ids.cpu())
        if self.table_scale is None:
            self.table_scale = 1.0

    def window(self, step: Step) -> None:
        self.bank.window = step.value
        self.oracle.window = step.value

    def temperature(self, step: Step) -> None:
        # As a learned temperature of that dtype has it.
        self.tau = torch.tensor(step.value, dtype=accumulation_dtype(self.setup.bank_dtype)).item()

    def offsets(self, step: Step) -> None:
        if self.setup.drift != "none":
            return
        blocks, s = self.bank.layout.offset_blocks(self.setup.capacity), self.setup
        acc = accumulation_dtype(s.bank_dtype)
        q, p = self.draw(blocks, s.d, dtype=acc), self.draw(blocks, s.m, s.d, dtype=acc)
        self.bank.set_offsets(q, p)
        self.oracle.set_offsets(q.cpu(), p.cpu())
        self.averaged = self.bank.layout.offset_block

    def reload(self, step: Step) -> None:
        """Go on with another bank that got this one's state."""
        fresh = self.setup.bank(self.device)
        fresh.load_state_dict(self.bank.state_dict())
        self.bank = fresh

    def move(self, step: Step) -> None:
        """Transport both banks; the oracle goes on with vectors as the bank has rounded them."""
        s, oracle, bank = self.setup, self.oracle, self.bank
        old = self.draw(3, s.d, dtype=torch.float64), self.draw(2, s.m, s.d, dtype=torch.float64)
        new = [x + 0.1 * self.draw(*x.shape, dtype=torch.float64) for x in old]
        pairs = (old[0], new[0], old[1], new[1])
        ca.transport(bank, *pairs, ridge=1.0, normalize=False, rebuild=step.value)
        for kind, at in (("queries", 0), ("passages", 2)):
            probes = (x.cpu().flatten(0, -2) for x in pairs[at : at + 2])
            oracle.transport(*probes, kind, 1.0, False, step.value)
        if step.value:
            self.table_scale = None  # until the next use
        if not oracle.slots:
            return
        moved = bank.queries().cpu(), bank.passages().cpu()
        if s.bank_dtype == torch.float64:
            for ours, exact in zip(moved, (oracle.queries(), oracle.passages()), strict=True):
                torch.testing.assert_close(ours, exact, rtol=0, atol=1e-11 * self.norm)
        oracle.adopt(*(self.measured(x) for x in moved), bank.means[0].double().cpu().clone())

    def clear(self, step: Step) -> None:
        self.bank.clear()
        self.oracle.clear()
        self.table_scale, self.owed = None, [0.0, 0.0]

    def check_bank(self) -> None:
        """Contents to the bit, the window, the offsets and Invariant T."""
        bank, oracle = self.bank, self.oracle
        assert len(bank) == len(oracle)
        assert torch.equal(bank.queries().cpu(), oracle.queries())
        assert torch.equal(bank.passages().cpu(), oracle.passages())
        assert torch.equal(bank.passage_ids().cpu(), oracle.passage_ids())
        assert bank.window == oracle.effective_window()
        tol = self.bounds()
        for ours, exact in (
            (bank.query_offsets(), oracle.query_offsets()),
            (bank.passage_offsets(), oracle.passage_offsets()),
        ):
            assert ours.shape == exact.shape
            error = (ours.double().cpu() - exact.double()).abs()
            assert error.numel() == 0 or error.max() <= tol.offset, (ours, exact)
        self.check_tables(bank, 0)
        if bank.mirror is not None:
            self.check_mirror(bank, bank.mirror)

    def check_mirror(self, bank: ca.DualMemoryBank, mirror: ca.DualMemoryBank) -> None:
        """The same slots with queries and positives exchanged, and a table of its own."""
        assert torch.equal(mirror.cursor, bank.cursor)
        assert torch.equal(mirror.queries(), bank.passages()[:, 0])
        assert torch.equal(mirror.passages()[:, 0], bank.queries())
        assert torch.equal(mirror.passage_ids(), bank.passage_ids()[:, :1])
        assert torch.equal(mirror.means, bank.means[:, :2].flip(1))
        assert mirror.window == bank.window
        self.check_tables(mirror, 1)

    def check_tables(self, bank: ca.DualMemoryBank, half: int) -> None:
        """Those of the bank, or of its mirror, whose half is 1."""
        if self.table_scale is None:
            return
        lagging = self.oracle.lagging
        among = None if lagging is None else lagging[half].among(self.oracle.places())
        given, tol = (bank, self.oracle.written, self.table_scale, among), self.bounds()
        assert_table(bank.table(), scratch_table(*given), tol.table)
        if self.setup.learn:
            assert_table(expected_table(bank), scratch_expected(*given), tol.expected)
