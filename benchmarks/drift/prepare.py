"""Tokenises the data sets once and cuts the model down: all that a run needs, in one directory."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

_PASSAGE_TOKENS, _QUERY_TOKENS = 256, 64
_LAYER = "encoder.layer."


def prepare(model: Path, sources: Iterable[Path], out: Path, layers: int) -> None:
    """Write `out`/model and `out`/NAME.npz for each source.

    Args:
        model: directory with config.json, model.safetensors and tokenizer.json of a BERT.
        sources: directories with corpus, train, valid and test as .jsonl.gz or .jsonl.
        out: made if missing.
        layers: encoder layers kept, the first ones.

    Raises:
        ValueError: the model has fewer layers, or a training query has no positive.
    """
    _write_model(model, out / "model", layers)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    for source in sources:
        arrays: dict[str, Any] = _arrays(source, tokenizer)
        np.savez_compressed(out / f"{source.name}.npz", **arrays)


def _write_model(model: Path, out: Path, layers: int) -> None:
    config = json.loads((model / "config.json").read_text())
    if layers > config["num_hidden_layers"]:
        raise ValueError(
            f"layers: {model} has {config['num_hidden_layers']}, asked for the first {layers}"
        )
    kept = {}
    with safe_open(model / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 (not a dict)
            short = name.removeprefix("bert.")
            layer = int(short.split(".")[2]) if short.startswith(_LAYER) else 0
            value = weights.get_tensor(name)
            if layer < layers and not short.startswith("pooler") and value.is_floating_point():
                kept[short] = value.to(torch.float16)
    out.mkdir(parents=True, exist_ok=True)
    save_file(kept, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}, indent=1))
    (out / "tokenizer.json").write_text((model / "tokenizer.json").read_text())


def _arrays(source: Path, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    corpus = list(_records(source, "corpus"))
    numbers = {record["id"]: number for number, record in enumerate(corpus)}
    texts = [f"{r.get('title', '')} {r['text']}".strip() for r in corpus]
    arrays = _flat("corpus", _tokens(tokenizer, texts, _PASSAGE_TOKENS))
    for split in ("train", "valid", "test"):
        records = list(_records(source, split))
        queries = [record["query"] for record in records]
        arrays |= _flat(split, _tokens(tokenizer, queries, _QUERY_TOKENS))
        positives = [[numbers[pid] for pid in record["pos"]] for record in records]
        if not all(positives):
            raise ValueError(f"{source.name} {split}: a query without a positive")
        arrays[f"{split}_positives"] = _padded(positives)
        if split == "train":
            negatives = [[numbers[pid] for pid in record.get("neg", [])] for record in records]
            arrays["train_negatives"] = _padded(negatives)
    return arrays


def _records(source: Path, name: str) -> Iterator[dict[str, Any]]:
    packed = source / f"{name}.jsonl.gz"
    if packed.exists():
        with gzip.open(packed, "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    else:
        with (source / f"{name}.jsonl").open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _tokens(tokenizer: Tokenizer, texts: list[str], longest: int) -> list[list[int]]:
    tokenizer.enable_truncation(longest)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def _flat(name: str, texts: list[list[int]]) -> dict[str, np.ndarray]:
    return {
        f"{name}_tokens": np.concatenate([np.asarray(ids, np.uint16) for ids in texts]),
        f"{name}_lengths": np.array([len(ids) for ids in texts], np.int32),
    }


def _padded(lists: list[list[int]]) -> np.ndarray:
    """(queries, longest list) int32, -1 after the end of a list."""
    table = np.full((len(lists), max(map(len, lists))), -1, np.int32)
    for row, numbers in zip(table, lists, strict=True):
        row[: len(numbers)] = numbers
    return table
