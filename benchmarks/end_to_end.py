"""From a start model and data to NDCG@10, with both integrations, on the same examples."""

from __future__ import annotations

import contextlib
import gc
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import Device, told
from benchmarks.op import say
from contaccum_ext.datasets import RetrievalDataset, load_dataset
from contaccum_ext.drift_signs import ScoreShift
from contaccum_ext.retrieval import evaluate_dense
from contaccum_ext.retrieval.evaluate import EvalOptions
from contaccum_ext.training import DualEncoder, Encoder, TrainConfig, Trainer
from contaccum_ext.training.encoder import load_tokenizer

THIN, SENTENCE_TRANSFORMERS = "contaccum train", "sentence-transformers"
UNTRAINED = "untrained"
METRIC = "NDCG@10"
_EVAL_BATCH = 256  # texts encoded at once


@dataclass(frozen=True)
class Method:
    """A way to train: settings of `TrainConfig`, or a loss of sentence-transformers with its own.

    Args:
        name: of the row.
        integration: which trainer.
        settings: beyond those that all share.
        loss: name of the class, in sentence-transformers or in the integration.
        cached: an update is one batch, encoded n rows at a time.
    """

    name: str
    integration: str
    settings: dict[str, Any] = field(default_factory=dict)
    loss: str = ""
    cached: bool = False


_WIDE = {"drift": "transport", "bank_size": 2048}

METHODS = {
    method.name: method
    for method in (
        Method("gradaccum", THIN, {"method": "gradaccum"}),
        Method("contaccum-128", THIN, {"method": "contaccum", "bank_size": 128}),
        Method("contaccum-mean", THIN, {"method": "contaccum"}),
        Method("contaccum-transport", THIN, {"method": "contaccum", **_WIDE}),
        Method("gradcache-contaccum", THIN, {"method": "gradcache_contaccum"}),
        Method("st-mnrl", SENTENCE_TRANSFORMERS, {}, "MultipleNegativesRankingLoss"),
        Method("st-contaccum-mean", SENTENCE_TRANSFORMERS, {}, "ContAccumLoss"),
        Method("st-contaccum-transport", SENTENCE_TRANSFORMERS, _WIDE, "ContAccumLoss"),
        Method(
            "st-cached-mnrl", SENTENCE_TRANSFORMERS, {}, "CachedMultipleNegativesRankingLoss", True
        ),
        Method("st-cached-contaccum", SENTENCE_TRANSFORMERS, {}, "CachedContAccumLoss", True),
    )
}


@dataclass(frozen=True)
class EndToEndOptions:
    """What all methods share.

    Args:
        data: directory of a data set with train and test parts.
        model: Hugging Face directory that every method starts from.
        layers: of it that are kept, the first ones; None for all.
        methods: names from `METHODS`.
        updates: of the optimizer; None for one pass over the training set's whole updates.
        n: queries per micro-batch.
        accumulation: micro-batches per update.
        learning_rate: peak.
        seed: of order, negatives and dropout.
    """

    data: Path
    model: Path
    layers: int | None = None
    methods: tuple[str, ...] = tuple(METHODS)
    updates: int | None = None
    n: int = 8
    accumulation: int = 16
    learning_rate: float = 2e-4
    seed: int = 1


@dataclass(frozen=True)
class Setup:
    """What a method is given."""

    dataset: RetrievalDataset
    start: Path  # model and tokenizer
    config: TrainConfig  # of all methods; its max_updates is the budget

    @property
    def updates(self) -> int:
        assert self.config.max_updates is not None
        return self.config.max_updates


@dataclass(frozen=True)
class Trained:
    """What came of a method's training."""

    seconds: float
    bank_filled: int = 0
    bank_window: int | None = None  # slots in use at the end
    shift: ScoreShift | None = None  # at the last look


@dataclass(frozen=True)
class Outcome:
    """A row: empty where it was not measured, and `note` says why."""

    method: str
    integration: str
    queries: int = 0  # trained on
    trained: Trained | None = None
    peak_bytes: int | None = None  # of the device, in training
    score: float | None = None  # METRIC
    note: str = ""


def prepare(options: EndToEndOptions, device: Device, directory: Path) -> Setup:
    """Read the data and write the start model."""
    dataset = load_dataset(options.data)
    dataset.eval_queries("test")  # none is an error before the training, not after it
    with_negatives = any(example.negatives for example in dataset.train_examples())
    update_size = options.n * options.accumulation
    config = TrainConfig(
        local_batch_size=options.n,
        accumulation_steps=options.accumulation,
        hard_negatives=int(with_negatives),
        shared_encoder=True,
        learning_rate=options.learning_rate,
        max_updates=options.updates or max(1, len(dataset.train) // update_size),
        seed=options.seed,
        precision="bf16" if device.name == "cuda" else "fp32",
        device=device.name,
        checkpoint_every=0,
    )
    start = directory / "start"
    encoder = Encoder.from_pretrained(options.model, layers=options.layers)
    longest = int(encoder.backbone.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
    encoder.save_pretrained(start)
    load_tokenizer(options.model).save_pretrained(start)
    lengths = {
        key: min(getattr(config, key), longest)
        for key in ("query_max_length", "passage_max_length")
    }
    return Setup(dataset, start, replace(config, **lengths))


def run(
    options: EndToEndOptions, device: Device, each: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Train and score every method; `each` is told after each of them what there is."""
    with tempfile.TemporaryDirectory(prefix="end_to_end_") as name:
        setup = prepare(options, device, Path(name))
        outcomes = [_untrained(setup, device)]
        if device.name == "cuda":
            _rehearse(options, setup, Path(name))
        for method in (METHODS[name] for name in options.methods):
            say(f"{method.name}: {setup.updates} updates")
            outcomes.append(_measure(method, setup, device, Path(name) / method.name))
            each(outcomes)
            gc.collect()
            device.release()
    return outcomes


def trainer_of(method: Method) -> Callable[[Method, Setup, Path], tuple[DualEncoder, Trained]]:
    """What trains a method, and gives the model."""
    if method.integration == THIN:
        return train_thin
    from benchmarks.end_to_end_st import train_sentence_transformers

    return train_sentence_transformers


def _rehearse(options: EndToEndOptions, setup: Setup, directory: Path) -> None:
    """Two updates with each trainer, so that the first row does not pay for what is loaded once."""
    short = replace(setup, config=replace(setup.config, max_updates=2))
    first = {METHODS[name].integration: METHODS[name] for name in reversed(options.methods)}
    for number, method in enumerate(first.values()):
        try:
            trainer_of(method)(method, short, directory / f"rehearsal_{number}")
        except Exception as error:  # its row will tell
            say(f"{method.name}: {told(error)}")


def _untrained(setup: Setup, device: Device) -> Outcome:
    model = DualEncoder.from_pretrained(setup.start, setup.config).to(device.name)
    return Outcome(UNTRAINED, "-", score=_score(model, setup))


def _measure(method: Method, setup: Setup, device: Device, directory: Path) -> Outcome:
    on_gpu = device.name == "cuda"
    outcome = Outcome(method.name, method.integration)
    try:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with _listening() as heard:
            model, trained = trainer_of(method)(method, setup, directory)
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        score = _score(model, setup)
    except Exception as error:  # the other rows are still wanted
        return replace(outcome, note=told(error))
    queries = setup.updates * setup.config.update_size
    return replace(
        outcome,
        queries=queries,
        trained=trained,
        peak_bytes=peak,
        score=score,
        note="; ".join(heard),
    )


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """What this package warns of in the meantime, be it as warnings or in the log."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("contaccum_ext")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield heard
        # Only banks are what the package itself warns of.
        heard += dict.fromkeys(str(w.message) for w in caught if "bank" in str(w.message))
    finally:
        logger.removeHandler(handler)


def _score(model: DualEncoder, setup: Setup) -> float:
    config = setup.config
    result = evaluate_dense(
        model.query,
        model.passage,
        load_tokenizer(setup.start),
        setup.dataset,
        metrics=[METRIC],
        options=EvalOptions(
            config.query_max_length,
            config.passage_max_length,
            batch_size=_EVAL_BATCH,
            autocast_dtype=torch.bfloat16 if config.precision == "bf16" else None,
        ),
    )
    return result.metrics[METRIC]


def train_thin(method: Method, setup: Setup, directory: Path) -> tuple[DualEncoder, Trained]:
    """Train with `contaccum train`'s trainer; the time is that of the updates."""
    config = replace(setup.config, diagnostics_every=setup.updates, **method.settings)
    model = DualEncoder.from_pretrained(setup.start, config)
    trainer = Trainer(model, load_tokenizer(setup.start), setup.dataset, config, directory)
    history = trainer.train(progress=False)
    size, last = config.update_size, history[-1]
    shift = None
    if last.bank_score_gap is not None and last.bank_score_spread is not None:
        shift = ScoreShift(last.bank_score_gap, last.bank_score_spread)
    seconds = sum(size / metrics.queries_per_second for metrics in history)
    return model, Trained(seconds, last.bank_filled, last.bank_window, shift)
