"""A training step under ``torch.compile(mode="reduce-overhead")``, which replays CUDA graphs.

Inductor falls back to plain launches, without an error, when a graph mutates inputs whose addresses
it does not know to stay. The bank's buffers are such inputs: they have to be recognised as the
buffers of a module.
"""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from test_compile import CAPACITY, FEATURES, D, M, N, Trainer, assert_close_steps, needs_compiler
from test_op_refusals import assert_same_state, state
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

import contaccum_ext as ca

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Whole(nn.Module):
    """Tower and bank in one module."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Linear(FEATURES, D)
        self.bank = ca.DualMemoryBank(CAPACITY, D, M)

    def forward(self, x, y):
        return ca.contaccum_loss(self.tower(x), self.tower(y), self.bank)


def attribute(compiler):
    trainer = Trainer("cpu", compiler)
    return lambda x, y: trainer.step(x, y, None)


def module(compiler):
    return torch.compile(Whole(), backend=compiler, fullgraph=True)


def argument(compiler):
    tower, bank = nn.Linear(FEATURES, D), ca.DualMemoryBank(CAPACITY, D, M)
    compiled = torch.compile(ca.contaccum_loss, backend=compiler, fullgraph=True)
    return lambda x, y: compiled(tower(x), tower(y), bank)


def loss_module(compiler):
    tower, loss = nn.Linear(FEATURES, D), ca.ContAccumLoss(CAPACITY, D, M)
    compiled = torch.compile(loss, backend=compiler, fullgraph=True)
    return lambda x, y: compiled(tower(x), tower(y))


def both_ways(compiler):
    tower, loss = nn.Linear(FEATURES, D), ca.ContAccumLoss(CAPACITY, D, M, symmetric=True)
    compiled = torch.compile(loss, backend=compiler, fullgraph=True)
    return lambda x, y: compiled(tower(x), tower(y))


def centered(compiler):
    tower, loss = nn.Linear(FEATURES, D), ca.ContAccumLoss(CAPACITY, D, M, center_over=3)
    compiled = torch.compile(loss, backend=compiler, fullgraph=True)
    return lambda x, y: compiled(tower(x), tower(y))


@pytest.mark.parametrize("step", [attribute, module, argument, loss_module, both_ways, centered])
def test_the_compiler_knows_that_the_banks_buffers_stay_where_they_are(step):
    """What inductor asks of inputs that a CUDA graph mutates; it is decided before any device."""
    seen = []

    def look(graph, _):
        metadata = torch._guards.TracingContext.get().fw_metadata
        mutated = {i for i, info in enumerate(metadata.input_info) if info.mutates_data}
        seen.append((mutated, set(metadata.static_input_indices)))
        return make_boxed_func(graph.forward)

    call = step(aot_autograd(fw_compiler=look))
    for _ in range(3):
        call(torch.randn(N, FEATURES), torch.randn(N, M, FEATURES)).backward()
    forward = [(mutated, static) for mutated, static in seen if mutated]
    assert forward
    for mutated, static in forward:
        assert len(mutated) == {both_ways: 16, centered: 9}.get(step, 8) and mutated <= static


@pytest.fixture
def replays(monkeypatch):
    """A list with an entry for each replay of a CUDA graph."""
    done = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (done.append(graph), replay(graph))[1]
    )
    return done


@needs_cuda
@needs_compiler
@pytest.mark.parametrize("kind", ["plain", "symmetric", "learn_temperature", "center_over"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_training_steps_replay_a_graph(replays, with_ids, kind):
    """20 steps, more than two laps: as eager, without falling back and without compiling anew."""
    kinds = {"plain": {}, "center_over": {"center_over": 4}}.get(kind, {kind: True})
    options = {"with_ids": with_ids, "kinds": kinds}
    eager = Trainer("cuda", **options)
    compiled = Trainer("cuda", "inductor", **options, mode="reduce-overhead")
    warm = 5  # two compilations (the first call fills the table), then a warm-up, then a recording
    for step in range(20):
        if step == warm:
            graphs, before = counters["stats"]["unique_graphs"], len(replays)
        torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(error_on_recompile=step >= warm):
            assert_close_steps(compiled(), eager())
        a, b = compiled.bank, eager.bank
        assert torch.equal(a.cursor, b.cursor) and torch.equal(a.passage_ids(), b.passage_ids())
        torch.testing.assert_close(a.queries(), b.queries())
        torch.testing.assert_close(a.passages(), b.passages())
        torch.testing.assert_close(a.means, b.means)
        torch.testing.assert_close(a.centering, b.centering, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.table(), b.table(), rtol=1e-4, atol=1e-4)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["stats"]["unique_graphs"] == graphs
    assert len(replays) - before >= 2 * (20 - warm)  # forward and backward of every step
    assert int(compiled.bank.cursor[0]) == 20 * N % CAPACITY and len(compiled.bank) == CAPACITY


@needs_cuda
@needs_compiler
def test_a_replayed_graph_refuses_what_is_not_finite():
    """The decision is the device's, so that a graph recorded with good batches makes it too."""
    trainer = Trainer("cuda", "inductor", mode="reduce-overhead")
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        trainer()
    before = state(trainer.bank)
    torch.compiler.cudagraph_mark_step_begin()
    x = torch.full((N, FEATURES), float("nan"), device="cuda")
    loss = trainer.step(x, torch.randn(N, M, FEATURES, device="cuda"), None)
    grads = torch.autograd.grad(loss, list(trainer.tower.parameters()))
    assert loss.isnan() and not any(g.isfinite().any() for g in grads)
    assert_same_state(trainer.bank, before)
    torch.compiler.cudagraph_mark_step_begin()
    assert trainer()[0].isfinite()
    assert counters["inductor"]["cudagraph_skips"] == 0
