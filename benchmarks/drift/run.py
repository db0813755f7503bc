"""One run: a setting becomes a row of results."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.drift import methods
from benchmarks.drift.corrections import Context, Correction, History
from benchmarks.drift.data import DataSet, Draws, draw, load, upload
from benchmarks.drift.encoder import build
from benchmarks.drift.evaluate import evaluate
from benchmarks.drift.loss import BankView, LossShape, Seen
from benchmarks.drift.objective import Objective
from benchmarks.drift.settings import Setting
from benchmarks.drift.staleness import Staleness

_TRACES = 12  # lines in the trace of a run, beside the early ones
_LAST = 0.05  # share of the updates that the final loss is averaged over


class Run:
    """Training state of one setting.

    Args:
        setting: of the run.
        data: its tokens, on the device.
        model: directory of the encoder to start from.
        device: where everything happens.
    """

    def __init__(self, setting: Setting, data: DataSet, model: Path, device: torch.device) -> None:
        torch.manual_seed(setting.seed)
        self.setting, self.data, self.device = setting, data, device
        self.draws: Draws = draw(data, setting)
        self.updates = len(self.draws.queries) // setting.update_size
        self.towers = build(model, setting).to(device).train()
        self.ids = upload(self.draws.passages.astype(np.int32), device)
        # One batch of everything, or K micro-batches of n.
        inbatch = setting.method == "inbatch"
        self.cut = (1, setting.update_size) if inbatch else (setting.accumulation, setting.n)
        self.shape = LossShape(setting.scale, setting.bank, setting.row_weighting, setting.mask)
        self.optimizer = self._optimizer()
        self.losses = torch.zeros(self.updates, device=device)
        self.trace: list[dict[str, Any]] = []
        self.traced = traced(self.updates)
        self.correction: Correction | None = None
        if setting.method == "bank":
            context = self._context()
            self.correction = methods.make(setting.correction, context, setting.options)
            self.staleness = Staleness(context, self.updates, setting.scale)
        self.objective = Objective(self.correction, setting.options.get("symmetric", False))

    def _optimizer(self) -> torch.optim.AdamW:
        parameters = list(self.towers.parameters())
        groups = [
            {
                "params": [p for p in parameters if p.ndim > 1],
                "weight_decay": self.setting.weight_decay,
            },
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.setting.learning_rate, fused=True)

    def _context(self) -> Context:
        setting, towers = self.setting, self.towers
        examples, m = self.draws.passages.shape
        d = towers.query.dim
        history = History(
            torch.zeros(examples, d, device=self.device),
            torch.zeros(examples, m, d, device=self.device),
            setting.n,
            setting.update_size,
            setting.bank,
        )
        return Context(
            history,
            self.draws,
            lambda ids, drop, by=towers: by.query.encode(
                self.data.queries["train"], ids, setting.bf16, drop
            ),
            lambda ids, drop, by=towers: by.passage.encode(
                self.data.corpus, ids, setting.bf16, drop
            ),
            setting.similarity == "cosine",
            setting.seed,
            self.device,
            towers,
        )

    def learning_rate(self, update: int) -> float:
        """Linear warm-up and decay, as the trainer's."""
        warmup = math.floor(self.updates * self.setting.warmup)
        if update < warmup:
            return self.setting.learning_rate * (update + 1) / (warmup + 1)
        share = (self.updates - update) / max(1, self.updates - warmup)
        return self.setting.learning_rate * share

    def update(self, update: int) -> None:
        """One optimizer update: encode all at once, loss by micro-batch, one backward pass."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(update)
        self.optimizer.zero_grad(set_to_none=True)
        queries, passages = self._encode(update)
        loss, gradients = self._loss(update, queries.detach(), passages.detach())
        self.losses[update] = loss
        torch.autograd.backward([queries, passages], gradients)
        torch.nn.utils.clip_grad_norm_(self.towers.parameters(), self.setting.clip)
        if self.correction:
            self.correction.before_step(update)
        self.optimizer.step()
        if self.correction:
            with torch.no_grad():
                self.correction.after_step(update)

    def _slots(self, update: int) -> slice:
        size = self.setting.update_size
        return slice(update * size, (update + 1) * size)

    def _encode(self, update: int) -> tuple[Tensor, Tensor]:
        """(K, n, d) and (K, n, m, d), with gradient and dropout."""
        slots = self._slots(update)
        queries = self.data.queries["train"].pack(self.draws.queries[slots])
        passages = self.data.corpus.pack(self.draws.passages[slots].reshape(-1))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.setting.bf16):
            encoded_queries = self.towers.query(queries)
            encoded_passages = self.towers.passage(passages)
        m = self.draws.passages.shape[1]
        return encoded_queries.unflatten(0, self.cut), encoded_passages.unflatten(0, (*self.cut, m))

    def _loss(
        self, update: int, queries: Tensor, passages: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss, and its gradients with respect to the embeddings."""
        view, slots = self._bank(update, queries, passages), self._slots(update)
        if self.correction:
            slots = self.correction.history.view(update)
        return self.objective(update, queries, passages, Seen(self.ids[slots], view, self.shape))

    @torch.no_grad()
    def _bank(self, update: int, queries: Tensor, passages: Tensor) -> BankView | None:
        if self.correction is None:
            return None
        own, history = self._slots(update), self.correction.history
        history.queries[own] = queries.flatten(0, 1)
        history.passages[own] = passages.flatten(0, 1)
        self.correction.after_encode(update, queries, passages)
        self.staleness.record(update, queries, passages)
        view = self.correction.before_loss(update)
        if update in self.traced:
            self.trace.append(self.staleness.measure(update, queries, passages, view))
        return view

    def train(self) -> None:
        """All updates; nothing in between waits for the device, but for a line of the trace."""
        for update in range(self.updates):
            self.update(update)


def traced(updates: int) -> set[int]:
    """The updates that have a line in the trace: evenly spread, closer at first, and the last."""
    every = max(1, updates // _TRACES)
    even = set(range(every - 1, updates, every)) | {updates - 1}
    return even | {early for early in (1, 2, 4, 8, 16, 24, 32) if early < every}


def set_up() -> None:
    """Choose the kernels of this process, once."""
    # TF32 for scores; what is sensitive is done in float64, the search of an evaluation in fp32.
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention plans anew for every shape, and texts come in many.
    torch.backends.cuda.enable_cudnn_sdp(False)


def run(setting: Setting, directory: Path, device: torch.device, cache: dict) -> dict[str, Any]:
    """Train and evaluate.

    Args:
        setting: of the run.
        directory: what `prepare` wrote.
        device: of the run.
        cache: of data sets, kept by the caller from run to run.

    Returns:
        A row of results that JSON can hold.
    """
    key = (setting.data, setting.query_length, setting.passage_length)
    if key not in cache:
        cache[key] = load(directory, setting, device)
    started = time.perf_counter()
    one = Run(setting, cache[key], directory / "model", device)
    one.train()
    losses = one.losses.tolist()
    trained = time.perf_counter()
    measures = evaluate(one.towers, cache[key], setting.bf16)
    last = losses[-max(1, round(_LAST * len(losses))) :]
    return {
        "key": setting.key,
        "label": setting.label,
        "setting": asdict(setting),
        **{name: round(value, 6) for name, value in measures.items()},
        "loss_final": _finite(sum(last) / len(last)),
        "loss_finite": all(map(math.isfinite, losses)),
        "updates": one.updates,
        "seconds": round(time.perf_counter() - started, 3),
        "seconds_training": round(trained - started, 3),
        "trace": [{k: _finite(v) for k, v in line.items()} for line in one.trace],
        "versions": versions(device),
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN: None instead, also within a list."""
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions(device: torch.device) -> dict[str, str]:
    """Of the libraries, and the device's name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"torch": torch.__version__, "numpy": np.__version__, "device": name}
