"""``python -m benchmarks step``: what a bank costs in a whole training step of two encoders.

A micro-step of ContAccum: encode queries and passages with two separate encoders, loss, backward.
The bank's part is what it takes beyond the same step with in-batch negatives only. Steps are timed
as Python issues them, where the host is often what is waited for, and replayed from graphs, where
the device is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import contaccum_ext as ca
from benchmarks.cases import TEMPERATURE, Case, make_vectors
from benchmarks.device import Call, Device, StepTimes, told
from benchmarks.measure import percentile
from benchmarks.op import Target, say
from benchmarks.peers import FULL_MATRIX, FullMatrix, Ours, full_matrix_loss

LossFunction = Callable[[Tensor, Tensor], Tensor]
OURS, OFFICIAL = "ours", "full matrix"
_ROTATED_INPUTS = 8


@dataclass(frozen=True)
class StepOptions:
    banks: tuple[int, ...] = (0, 2048, 8192, 65536)  # slots; 0 stands for in-batch negatives
    n: int = 8
    m: int = 2  # one positive and m - 1 hard negatives for each query
    query_length: int = 32
    passage_length: int = 256
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    vocabulary: int = 30522
    dtype: str = "bf16"  # of the banks
    drift: str = "none"
    rounds: int = 12  # in each, all variants have a turn
    steps: int = 5  # of a turn

    def case(self, slots: int) -> Case:
        return Case(slots, self.n, self.hidden, self.m, self.dtype, self.drift)


class Towers(nn.Module):
    """Two BERT encoders, random weights, dropout on; a text's vector is its first token's."""

    def __init__(self, options: StepOptions) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            intermediate_size=4 * options.hidden,
            max_position_embeddings=max(options.query_length, options.passage_length),
        )
        self.query = BertModel(config, add_pooling_layer=False)
        self.passage = BertModel(config, add_pooling_layer=False)
        self.m = options.m

    def forward(self, query_ids: Tensor, passage_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(n, lq) and (n m, lp) int64 -> unit (n, d) and (n, m, d)."""
        queries = self.query(query_ids).last_hidden_state[:, 0]
        passages = self.passage(passage_ids).last_hidden_state[:, 0]
        return normalize(queries, dim=-1), normalize(passages, dim=-1).unflatten(0, (-1, self.m))


@dataclass
class Variant:
    """One way to compute the loss; what was not measured is None and `note` says why."""

    loss_name: str
    bank: int
    loss: LossFunction | None = None
    kept_bytes: int = 0  # bank and table
    times: StepTimes = field(default_factory=StepTimes)  # one entry for each round
    graph: StepTimes = field(default_factory=StepTimes)  # likewise; empty where there are no graphs
    peak_bytes: int | None = None
    note: str = ""


@dataclass
class StepResult:
    options: StepOptions
    variants: list[Variant]
    parameters: int = 0  # of both encoders

    def find(self, loss_name: str, bank: int) -> Variant | None:
        for one in self.variants:
            if (one.loss_name, one.bank) == (loss_name, bank) and one.times.elapsed:
                return one
        return None


def added(one: Variant, base: Variant | None, in_graph: bool = False) -> float | None:
    """What the step takes beyond the other one, as a part of that: median over the rounds' ratios.

    Both of a ratio were timed within the same round, so a slow change of clock leaves it alone.
    """
    if base is None:
        return None
    times = [v.graph.elapsed if in_graph else v.times.elapsed for v in (one, base)]
    if not all(times):
        return None
    return percentile([a / b for a, b in zip(*times, strict=True)], 50) - 1


def targets(result: StepResult) -> list[Target]:
    """A bank of 65,536 slots adds at most 3%; values in percent."""
    ours = result.find(OURS, 65536)
    found = []
    for base, what in ((OURS, "ours without a bank"), (OFFICIAL, "in-batch loss in PyTorch")):
        for in_graph in (False, True):
            part = added(ours, result.find(base, 0), in_graph) if ours else None
            value = None if part is None else 100 * part
            where = "in a graph" if in_graph else "eager"
            text = f"65,536 slots add at most 3% to the step with {what}, {where}"
            found.append(Target(text, value, None if value is None else value <= 3))
    return found


def run(options: StepOptions, device: Device) -> StepResult:
    """Build everything, then time all variants in turns, then their peak memory."""
    torch.manual_seed(0)
    with torch.device(device.name):  # drawing weights on the host takes longer than the run
        towers = Towers(options).train()
    inputs = _Inputs(options, device.name)
    result = StepResult(options, _variants(options, device))
    result.parameters = sum(p.numel() for p in towers.parameters())

    def micro_step(loss_function: LossFunction) -> None:
        with torch.autocast(device.name, torch.bfloat16):
            queries, passages = towers(*inputs.next())
        loss_function(queries, passages).backward()

    ready: list[tuple[Variant, Call]] = []
    for one in result.variants:
        if one.loss is None:
            continue
        call: Call = functools.partial(micro_step, one.loss)
        try:
            for _ in range(2):
                device.burst(call, 1)
            ready.append((one, call))
        except Exception as error:
            one.note = told(error)
    count = options.steps
    for one, call in _in_turns(ready, options.rounds):
        elapsed, issued = device.burst(call, count)
        one.times += StepTimes((elapsed / count,), (issued / count,), count)
    for one, call in ready:
        one.peak_bytes = device.peak_extra(call, 2)
        say(f"  {one.loss_name:12s} {one.bank:6d}: {one.times.median * 1e3:.3f} ms")
    replays = _capture(ready, count, device)
    for one, replay in _in_turns(replays, options.rounds):
        elapsed, issued = device.burst(replay, 1)
        one.graph += StepTimes((elapsed / count,), (issued / count,), count)
    return result


def _in_turns(ready: list[tuple[Variant, Call]], rounds: int) -> Iterator[tuple[Variant, Call]]:
    """Every variant once a round, the order moving on by one."""
    for turn in range(rounds if ready else 0):
        say(f"round {turn + 1} of {rounds}")
        first = turn % len(ready)
        yield from ready[first:] + ready[:first]


def _capture(
    ready: list[tuple[Variant, Call]], count: int, device: Device
) -> list[tuple[Variant, Call]]:
    """Replays of `count` steps each, warmed up, where there are graphs."""
    replays = []
    for one, call in ready:
        try:
            replay = device.graph(call, count)
        except Exception as error:
            one.note = f"in a graph: {told(error)}"
            continue
        if replay is not None:
            device.burst(replay, 1)
            replays.append((one, replay))
    return replays


class _Inputs:
    """Random token ids in rotation, all of full length, so without padding."""

    def __init__(self, options: StepOptions, device: str) -> None:
        generator = torch.Generator().manual_seed(1)

        def ids(count: int, length: int) -> Tensor:
            shape = (count, length)
            return torch.randint(options.vocabulary, shape, generator=generator).to(device)

        self._batches = [
            (
                ids(options.n, options.query_length),
                ids(options.n * options.m, options.passage_length),
            )
            for _ in range(_ROTATED_INPUTS)
        ]
        self._next = 0

    def next(self) -> tuple[Tensor, Tensor]:
        batch = self._batches[self._next]
        self._next = (self._next + 1) % len(self._batches)
        return batch


def _variants(options: StepOptions, device: Device) -> list[Variant]:
    variants = []
    for slots in options.banks:
        if slots:
            say(f"filling banks of {slots}")
        for name, build in ((OURS, _ours), (OFFICIAL, _official)):
            variants.append(build(options.case(slots), device) if slots else _in_batch(name))
    return variants


def _in_batch(name: str) -> Variant:
    if name == OURS:
        return Variant(name, 0, lambda q, p: ca.contaccum_loss(q, p, None, TEMPERATURE))

    def loss(queries: Tensor, passages: Tensor) -> Tensor:
        q, p = queries.bfloat16(), passages.bfloat16()
        targets = torch.arange(len(q), device=q.device) * p.shape[1]
        return full_matrix_loss(q, p, q[:0], p[:0], targets) / len(q)

    return Variant(name, 0, loss)


def _ours(case: Case, device: Device) -> Variant:
    ours = Ours(case, device.name)
    ours.fill(*make_vectors(case, case.slots, 0, device.name))
    return Variant(OURS, case.slots, ours.loss, case.bank_bytes() + ours.table_bytes())


def _official(case: Case, device: Device) -> Variant:
    needed = FULL_MATRIX.peak_bytes(case)
    if needed > 0.9 * device.free_bytes():
        kind = "impossible" if needed > device.total_bytes() else "out of memory"
        note = f"{kind}: {needed / 2**30:,.1f} GiB of matrices"
        return Variant(OFFICIAL, case.slots, note=note)
    full = FullMatrix(case, device.name)
    full.fill(*make_vectors(case, case.slots, 0, device.name))
    dtype = case.torch_dtype
    return Variant(
        OFFICIAL, case.slots, lambda q, p: full.loss(q.to(dtype), p.to(dtype)), case.bank_bytes()
    )
