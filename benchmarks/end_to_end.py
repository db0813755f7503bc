"""From a start model and data to NDCG@10, with both integrations, on the same examples."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import replace
from multiprocessing.context import SpawnContext
from pathlib import Path
from queue import SimpleQueue

import torch

from benchmarks.device import Device, open_device, told
from benchmarks.end_to_end_methods import (
    METHODS,
    METRIC,
    THIN,
    UNTRAINED,
    EndToEndOptions,
    Method,
    Outcome,
    Setup,
    Trained,
)
from benchmarks.op import say
from contaccum_ext.datasets import load_dataset
from contaccum_ext.drift_signs import ScoreShift
from contaccum_ext.retrieval import evaluate_dense
from contaccum_ext.retrieval.evaluate import EvalOptions
from contaccum_ext.training import DualEncoder, Encoder, TrainConfig, Trainer
from contaccum_ext.training.encoder import load_tokenizer

_EVAL_BATCH = 256  # texts encoded at once


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
        order = (UNTRAINED, *options.methods)
        if options.processes > 1:
            measured = _side_by_side(options, setup, device, Path(name))
        else:
            measured = _in_turn(options, setup, device, Path(name))
        for outcome in measured:
            outcomes.append(outcome)
            outcomes.sort(key=lambda o: order.index(o.method))
            each(outcomes)
    return outcomes


def _in_turn(
    options: EndToEndOptions, setup: Setup, device: Device, directory: Path
) -> Iterator[Outcome]:
    if device.name == "cuda":
        _rehearse(options.methods, setup, directory)
    for method in (METHODS[name] for name in options.methods):
        say(f"{method.name}: {setup.updates} updates")
        yield _measure(method, setup, device, directory / method.name)
        gc.collect()
        device.release()


def _side_by_side(
    options: EndToEndOptions, setup: Setup, device: Device, directory: Path
) -> Iterator[Outcome]:
    """As each is done. A process has one method and, of several GPUs, one."""
    context = multiprocessing.get_context("spawn")
    gpus: Sequence[str | None] = _visible_gpus() if device.name == "cuda" else [None]
    free: SimpleQueue[str | None] = SimpleQueue()  # places, as many on each GPU as are needed
    for place in range(options.processes):
        free.put(gpus[place % len(gpus)])
    with futures.ThreadPoolExecutor(options.processes) as threads:
        running = [
            threads.submit(_in_process, context, name, (setup, device.name, directory), free)
            for name in options.methods
        ]
        for done in futures.as_completed(running):
            outcome = done.result()
            say(f"{outcome.method}: done")
            yield outcome


def _visible_gpus() -> Sequence[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process sees, which may not be all."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(at) for at in range(count)] if named is None else named.split(",")[:count]


def _in_process(
    context: SpawnContext,
    name: str,
    given: tuple[Setup, str, Path],
    free: SimpleQueue[str | None],
) -> Outcome:
    gpu, note = free.get(), ""
    try:
        # A pool of one: it tells of a process that died, where a plain one leaves its pipe silent.
        with futures.ProcessPoolExecutor(1, context, _choose_gpu, (gpu,)) as process:
            return process.submit(_measure_alone, name, *given).result()
    except SystemExit as error:  # it finds no GPU
        note = str(error)
    except Exception as error:  # the other rows are still wanted
        note = told(error)
    finally:
        free.put(gpu)
    return Outcome(name, METHODS[name].integration, note=note)


def _choose_gpu(gpu: str | None) -> None:
    if gpu is not None:  # the trainer of transformers would take all it sees
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def _measure_alone(name: str, setup: Setup, device_name: str, directory: Path) -> Outcome:
    if device_name == "cuda":
        _rehearse((name,), setup, directory / f"{name}_rehearsal")
    return _measure(METHODS[name], setup, open_device(device_name), directory / name)


def trainer_of(method: Method) -> Callable[[Method, Setup, Path], tuple[DualEncoder, Trained]]:
    """What trains a method, and gives the model."""
    if method.integration == THIN:
        return train_thin
    from benchmarks.end_to_end_st import train_sentence_transformers

    return train_sentence_transformers


def _rehearse(methods: Sequence[str], setup: Setup, directory: Path) -> None:
    """Two updates with each trainer, so that the first row does not pay for what is loaded once."""
    short = replace(setup, config=replace(setup.config, max_updates=2))
    first = {METHODS[name].integration: METHODS[name] for name in reversed(methods)}
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
