"""The methods of the end-to-end run that the Trainer of sentence-transformers trains."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import sentence_transformers.sentence_transformer.losses as theirs
import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback

import contaccum_ext.integrations.sentence_transformers as ours
from benchmarks.end_to_end_methods import Method, Setup, Trained
from contaccum_ext.drift_signs import ScoreShift
from contaccum_ext.training import DualEncoder, Encoder
from contaccum_ext.training.data import Sampler
from contaccum_ext.training.optimization import warmup_updates

_LINES = 10  # of the log


def train_sentence_transformers(
    method: Method, setup: Setup, directory: Path
) -> tuple[DualEncoder, Trained]:
    """Train on the examples of the thin trainer, in its order; the time is that of `train`."""
    config, n = setup.config, setup.config.local_batch_size
    model = SentenceTransformer(str(setup.start), device=config.device, local_files_only=True)
    model.max_seq_length = config.passage_max_length
    loss = _loss(method, model, n)
    banked = method.loss.endswith("ContAccumLoss")
    # An update of the cached losses is one batch.
    rows, batches = (config.update_size, 1) if method.cached else (n, config.accumulation_steps)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(directory),
        max_steps=setup.updates,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=batches,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=warmup_updates(setup.updates, config),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        bf16=config.precision == "bf16",
        use_cpu=config.device == "cpu",
        batch_sampler=_in_order,
        logging_steps=max(1, setup.updates // _LINES),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=config.device == "cuda",
    )
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=_columns(setup),
        loss=loss,
        callbacks=[ours.ContAccumCallback(loss)] if banked else [],
    )
    trainer.remove_callback(PrinterCallback)
    begin = time.perf_counter()
    trainer.train()
    if config.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    log: dict[str, Any] = [line for line in trainer.state.log_history if "loss" in line][-1]
    transformer: Any = model[0]
    encoder = Encoder(transformer.auto_model, "mean", normalize=True)
    shift = None
    if "bank_score_gap" in log:
        shift = ScoreShift(log["bank_score_gap"], log["bank_score_spread"])
    filled = log.get("bank_filled", 0)
    window = log.get("bank_window", filled if banked else None)
    return DualEncoder(encoder, encoder), Trained(seconds, filled, window, shift)


def _loss(method: Method, model: SentenceTransformer, n: int) -> torch.nn.Module:
    options: dict[str, Any] = dict(method.settings)
    if method.cached:
        options["mini_batch_size"] = n
    home = ours if hasattr(ours, method.loss) else theirs
    return getattr(home, method.loss)(model, **options)


def _columns(setup: Setup) -> Any:
    """The examples of all updates: anchor, positive and hard negatives."""
    from datasets import Dataset

    sampler, corpus = Sampler(setup.dataset, setup.config), setup.dataset.corpus
    draws = [draw for update in range(setup.updates) for draw in sampler.update(update)]
    columns = {"anchor": [draw.query for draw in draws]}
    for k in range(1 + setup.config.hard_negatives):
        name = f"negative_{k}" if k else "positive"
        columns[name] = [corpus[draw.passages[k]].full() for draw in draws]
    return Dataset.from_dict(columns)


def _in_order(dataset: Any, batch_size: int, drop_last: bool, **others: Any) -> DefaultBatchSampler:
    """The rows as they come."""
    rows: Any = SequentialSampler(dataset)
    return DefaultBatchSampler(rows, batch_size, drop_last, **others)
