"""What the `contaccum` command does: demo, train, eval, report."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from contaccum_ext.datasets import RetrievalDataset, load_dataset
from contaccum_ext.reporting import (
    metric_table,
    read_run,
    trained_verdicts,
    write_report,
    write_run_report,
)
from contaccum_ext.reporting.table import align
from contaccum_ext.retrieval import bm25_run, evaluate_run, mine_negatives
from contaccum_ext.training import (
    METHODS,
    DualEncoder,
    RunDirectory,
    TrainConfig,
    Trainer,
    load_checkpoint,
)
from contaccum_ext.training.checkpoint import standing
from contaccum_ext.training.comparison import compare, dense_run
from contaccum_ext.training.config_text import parse_assignments, read_yaml
from contaccum_ext.training.encoder import load_tokenizer
from contaccum_ext.training.run_directory import (
    load_resumable,
    refuse_difference,
    refuse_several_processes,
)
from contaccum_ext.training.scratch import ScratchConfig, write_scratch_encoder
from contaccum_ext.training.trainer import resolve_device

# From random initialisation; chosen on the validation queries of 'stdlib', where this learning
# rate is the best of 1.5e-4 ... 5e-4 for gradaccum over three seeds.
SCRATCH_SETTINGS: dict[str, Any] = {
    "accumulation_steps": 4,
    "learning_rate": 3.5e-4,
    "epochs": 3,
    "hard_negatives": 0,
    "query_max_length": 32,
    "passage_max_length": 64,
}


class UsageError(ValueError):
    """Options or data that do not fit what was asked for."""


def demo(options: argparse.Namespace) -> None:
    """Train with several methods on equal terms, compare them and write the report."""
    begin = time.perf_counter()
    refuse_several_processes()
    for method in options.methods:
        if method not in METHODS:
            raise UsageError(f"--methods: expected some of {', '.join(METHODS)}, got {method!r}")
    dataset = load_data(options, "test")
    if options.encoder is None:
        if "OMP_NUM_THREADS" not in os.environ:
            # On tensors this small a second thread gains little on an idle machine, and makes
            # training ten times slower where another process wants the core.
            torch.set_num_threads(1)
        # The scratch encoder is made with as many layers as asked for; there are none to cut.
        layers, options.layers = options.layers, None
        config = _settings(options, SCRATCH_SETTINGS)
        shape = ScratchConfig(
            layers=layers or ScratchConfig.layers,
            max_length=max(config.query_max_length, config.passage_max_length),
            seed=config.seed,
        )
        options.encoder = options.output / "untrained"
        texts = [passage.full() for passage in dataset.corpus.values()]
        texts += [example.query for example in dataset.train]
        write_scratch_encoder(options.encoder, texts, shape)
    else:
        config = _settings(options)
    comparison = compare(dataset, options.encoder, config, options.methods, options.output, say=say)
    page = options.output / "report.html"
    write_report(comparison, page, options.command)
    print(f"\n{metric_table(comparison)}\n")
    for line in trained_verdicts(comparison):
        print(line)
    print(f"\nreport: {page}   ({time.perf_counter() - begin:.0f} s in all)")


def train(options: argparse.Namespace) -> None:
    """Train one retriever, or go on training it."""
    refuse_several_processes()
    config = _settings(options)
    run = RunDirectory(options.output)
    with ExitStack() as stack:
        # Nothing is made before all that was given proves usable.
        if going_on := run.holds_run():
            if not options.resume:
                raise UsageError(
                    f"--output: {run.path} already holds a run; choose another directory, or "
                    f"--resume to go on with it"
                )
            stack.enter_context(run.locked())
            run.refuse_other(config, {})
        dataset = load_data(options)
        if standing(run.final).exists():
            say(f"{run.path}: already trained to the end")
        else:
            trainer = _trainer(options, config, dataset, run)
            if not going_on:
                stack.enter_context(run.locked())
            trainer.train()
            print(f"trained {trainer.done} updates: {run.final}")
    print(f"next: contaccum eval --checkpoint {options.output} --data {options.data}")


def _trainer(
    options: argparse.Namespace, config: TrainConfig, dataset: RetrievalDataset, run: RunDirectory
) -> Trainer:
    checkpoint = load_resumable(run) if options.resume else None
    if checkpoint is None:
        if options.resume:
            say(f"--resume: no checkpoint in {run.path} yet, starting from the beginning")
        model = DualEncoder.from_pretrained(options.encoder, config)
        tokenizer = load_tokenizer(options.encoder)
    else:
        model, tokenizer = checkpoint.model, checkpoint.tokenizer
    trainer = Trainer(model, tokenizer, dataset, config, run.path)
    if run.holds_run():
        run.refuse_other(config, trainer.data)
    if checkpoint is None:
        return trainer
    asked, saved = (config, trainer.data), (checkpoint.config, checkpoint.data)
    refuse_difference(checkpoint.path, asked, saved)
    trainer.load_state_dict(checkpoint.training_state())
    say(f"going on after update {trainer.done} of {trainer.total}")
    return trainer


def evaluate(options: argparse.Namespace) -> None:
    """Score a checkpoint, beside BM25."""
    dataset = load_data(options, options.split)
    queries = dataset.eval_queries(options.split)
    checkpoint = load_checkpoint(options.checkpoint)
    checkpoint.model.to(resolve_device(options.device))
    say(f"{len(queries)} {options.split} queries over {len(dataset.corpus)} passages")
    runs = {
        "BM25": bm25_run(dataset, queries),
        checkpoint.config.method: dense_run(
            checkpoint.model, checkpoint.tokenizer, dataset, checkpoint.config, options.split
        ),
    }
    metrics = {name: evaluate_run(queries, run, dataset.corpus) for name, run in runs.items()}
    lines = [["", *metrics["BM25"]]]
    lines += [[name, *(f"{v:.4f}" for v in values.values())] for name, values in metrics.items()]
    print(align(lines))
    if options.json:
        options.json.write_text(json.dumps(metrics, indent=2) + "\n")


def report(options: argparse.Namespace) -> None:
    """Compare training runs on one page."""
    write_run_report([read_run(run) for run in options.runs], options.output, options.command)
    print(f"report: {options.output}")


def _settings(
    options: argparse.Namespace, defaults: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Settings by rising precedence: defaults, --config, --set, options of their own."""
    values: dict[str, Any] = dict(defaults or {})
    if options.config:
        from_file = read_yaml(options.config)
        TrainConfig.from_mapping(from_file, str(options.config))
        values |= from_file
    assigned = parse_assignments(options.set)
    TrainConfig.from_mapping(assigned, "--set")
    values |= assigned
    for key in ("method", "layers", "max_updates", "epochs", "seed"):
        if getattr(options, key, None) is not None:
            values[key] = getattr(options, key)
    return TrainConfig.from_mapping(values)


def load_data(options: argparse.Namespace, split: str | None = None) -> RetrievalDataset:
    """The data set of --data, which must have the split.

    Raises:
        UsageError: it has not.
    """
    begin = time.perf_counter()
    dataset = load_dataset(options.data)
    if split:
        try:
            dataset.eval_queries(split)
        except ValueError as error:
            raise UsageError(f"--data: {error}") from None
    if getattr(options, "mine_negatives", None):
        dataset = replace(dataset, train=mine_negatives(dataset, options.mine_negatives))
    say(
        f"{dataset.name}: {len(dataset.train)} training queries, {len(dataset.test)} test queries, "
        f"{len(dataset.corpus)} passages ({time.perf_counter() - begin:.1f} s)"
    )
    return dataset


def say(message: str) -> None:
    """Tell the user what happens: on stderr, results alone go to stdout."""
    print(message, file=sys.stderr, flush=True)
