"""Tokenised texts on the device, and the examples of a run in the order in which it sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.drift.settings import Setting

_BUCKET = 16  # padded lengths are multiples of this: few shapes, and aligned ones
_CHUNK = 1 << 17  # padded tokens encoded at once outside of training


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device. CUDA has read a pageable source when this returns: no wait."""
    return torch.from_numpy(array).to(device, non_blocking=True)


@dataclass(frozen=True)
class Packed:
    """A batch of B texts without padding, T tokens in all."""

    tokens: Tensor  # (T,) int64
    position: Tensor  # (T,) int64, within the text
    text: Tensor  # (T,) int64, of B
    lengths: Tensor  # (B,) int64
    starts: Tensor  # (B + 1,) int32, of the texts in T, and T
    longest: int  # rounded up; known to the host, so that nothing waits for the device


class Texts:
    """Texts as one flat array of tokens.

    Args:
        tokens: (total,) integers, text after text.
        lengths: (texts,) tokens of each.
        device: where batches are made.
        limit: tokens kept of a text. The last one kept stays the text's own last ([SEP]).
    """

    def __init__(
        self, tokens: np.ndarray, lengths: np.ndarray, device: torch.device, limit: int
    ) -> None:
        self._lengths = np.minimum(lengths, limit).astype(np.int64)
        ends = np.cumsum(lengths.astype(np.int64))
        self._device = device
        self._flat = upload(tokens.astype(np.int32), device)
        kept = upload(self._lengths, device)
        last = upload(ends - 1, device)
        start = upload(ends - lengths, device)
        self._table = torch.stack([start, kept, last])  # (3, texts)

    def __len__(self) -> int:
        return len(self._lengths)

    def pack(self, ids: np.ndarray) -> Packed:
        """A batch of the texts `ids` (B,), without a wait for the device."""
        lengths = self._lengths[ids]
        total = int(lengths.sum())
        start, kept, last = self._table[:, upload(ids, self._device)]
        text = torch.repeat_interleave(kept, output_size=total)
        starts = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
        position = torch.arange(total, device=self._device) - starts[text]
        source = torch.where(position == kept[text] - 1, last[text], start[text] + position)
        longest = -(-int(lengths.max()) // _BUCKET) * _BUCKET
        return Packed(self._flat[source].long(), position, text, kept, starts.int(), longest)

    def chunks(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, Packed]]:
        """`ids` by length, a bounded number of tokens at a time, with their places in `ids`."""
        order = np.argsort(self._lengths[ids], kind="stable")
        begin = 0
        while begin < len(order):
            # Lengths rise: the last of a chunk sets what it is padded to.
            padded = self._lengths[ids[order[begin:]]] * np.arange(1, len(order) - begin + 1)
            count = max(1, int(np.searchsorted(padded, _CHUNK, side="right")))
            places = order[begin : begin + count]
            yield places, self.pack(ids[places])
            begin += count


@dataclass(frozen=True)
class DataSet:
    """One retrieval task on a device."""

    name: str
    corpus: Texts
    queries: dict[str, Texts]  # by split
    positives: dict[str, np.ndarray]  # by split: (queries, most positives) int32, -1 padded
    negatives: np.ndarray  # (training queries, most negatives) int32, -1 padded


def load(directory: Path, setting: Setting, device: torch.device) -> DataSet:
    """Read what `prepare` wrote.

    Raises:
        FileNotFoundError: there is no such data set.
    """
    with np.load(directory / f"{setting.data}.npz") as arrays:
        stored = dict(arrays)

    def texts(name: str, limit: int) -> Texts:
        return Texts(stored[f"{name}_tokens"], stored[f"{name}_lengths"], device, limit)

    splits = ("train", "valid", "test")
    return DataSet(
        setting.data,
        texts("corpus", setting.passage_length),
        {split: texts(split, setting.query_length) for split in splits},
        {split: stored[f"{split}_positives"] for split in splits},
        stored["train_negatives"],
    )


@dataclass(frozen=True)
class Draws:
    """Every example of a run, in order: number t is slot t of the bank."""

    queries: np.ndarray  # (examples,) int64, of the training queries
    passages: np.ndarray  # (examples, m) int64, positive first


def draw(data: DataSet, setting: Setting) -> Draws:
    """Permutations of the training queries, each cut to whole updates.

    A positive and the negatives are drawn anew in each epoch, from the seed and the epoch alone.
    Where a query has too few negatives, random passages stand in.

    Raises:
        ValueError: fewer training queries than an update has.
    """
    size = setting.update_size
    per_epoch = len(data.queries["train"]) // size
    if not per_epoch:
        raise ValueError(
            f"{data.name}: expected {size} training queries for an update, "
            f"got {len(data.queries['train'])}"
        )
    wanted = setting.updates or setting.epochs * per_epoch
    queries, passages = [], []
    for epoch in range(-(-wanted // per_epoch)):
        generator = np.random.default_rng([setting.seed, epoch])
        order = generator.permutation(len(data.queries["train"]))[: per_epoch * size]
        positives = data.positives["train"][order]
        drawn = [_pick(positives, 1, generator)]
        if setting.negatives:
            negatives = _pick(data.negatives[order], setting.negatives, generator)
            drawn.append(_complete(negatives, positives, len(data.corpus), generator))
        queries.append(order)
        passages.append(np.concatenate(drawn, 1))
    examples = wanted * size
    return Draws(np.concatenate(queries)[:examples], np.concatenate(passages)[:examples])


def _pick(table: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """(rows, count) different entries of the rows of a -1 padded table, -1 where there are none."""
    if table.shape[1] < count:
        table = np.pad(table, ((0, 0), (0, count - table.shape[1])), constant_values=-1)
    luck = np.where(table >= 0, generator.random(table.shape), 2.0)
    return np.take_along_axis(table, luck.argsort(1)[:, :count], 1).astype(np.int64)


def _complete(
    negatives: np.ndarray, positives: np.ndarray, corpus: int, generator: np.random.Generator
) -> np.ndarray:
    """Random passages, none of them a positive, where there are too few negatives."""
    while (lacking := negatives < 0).any():
        negatives = np.where(lacking, generator.integers(corpus, size=negatives.shape), negatives)
        wrong = (negatives[:, :, None] == positives[:, None]).any(2)
        negatives = np.where(lacking & wrong, -1, negatives)
    return negatives
