"""Training examples in a fixed order, and their collation into micro-batches.

The order depends on the data, the seed and n*K, never on the method: every method sees the same
examples in the same updates.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from contaccum_ext.datasets.base import Passage, RetrievalDataset, TrainExample
    from contaccum_ext.training.config import TrainConfig


class TrainingDataError(ValueError):
    """A data set that cannot be trained on with these settings; the message is one line."""


@dataclass(frozen=True)
class Draw:
    """One training example of one epoch."""

    id: str  # of the query
    query: str
    passages: tuple[str, ...]  # ids, positive first, then hard negatives


@dataclass(frozen=True)
class Batch:
    """Tokenized draws."""

    queries: dict[str, Tensor]  # each (n, t)
    passages: dict[str, Tensor]  # each (n*m, t): the m passages of a query stand together
    passage_ids: Tensor  # (n, m) int64
    query_ids: tuple[str, ...]  # n

    @property
    def size(self) -> int:
        """n, the number of queries."""
        return len(self.passage_ids)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(
            {key: value.to(device) for key, value in self.queries.items()},
            {key: value.to(device) for key, value in self.passages.items()},
            self.passage_ids.to(device),
            self.query_ids,
        )


def fingerprint(dataset: RetrievalDataset) -> dict[str, str]:
    """What a run was trained on, in a few words to compare: "40 queries, 1f0c..." by part.

    The corpus counts with all its passages and their order, which numbers them in the bank; two
    files with the same content are the same.
    """
    passages = ((p.id, p.title, p.text) for p in dataset.corpus.values())
    examples = ((e.id, e.query, e.positives, e.negatives) for e in dataset.train)
    return {
        "corpus": f"{len(dataset.corpus)} passages, {_digest(passages)}",
        "training set": f"{len(dataset.train)} queries, {_digest(examples)}",
    }


def _digest(records: Iterable[Sequence[object]]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for record in records:
        digest.update(json.dumps(record).encode())
    return digest.hexdigest()


class Sampler:
    """Which examples, positives and hard negatives each optimizer update uses.

    An epoch is a permutation cut into updates of n*K; the last one may be smaller. Any update can
    be asked for directly, so that a resumed run goes on where it stopped.

    Args:
        dataset: its train part is drawn from.
        config: n, K, hard_negatives and seed are used.

    Raises:
        TrainingDataError: no training examples, or no example has a hard negative where some are
            asked for.
    """

    def __init__(self, dataset: RetrievalDataset, config: TrainConfig) -> None:
        if not dataset.train:
            raise TrainingDataError(f"{dataset.name}: no training examples")
        lacking = [e for e in dataset.train if len(e.negatives) < config.hard_negatives]
        if len(lacking) == len(dataset.train):
            raise TrainingDataError(
                f"{dataset.name}: hard_negatives is {config.hard_negatives}, but no training "
                f"example has that many; set hard_negatives=0 or mine some"
            )
        if lacking:
            warnings.warn(
                f"{dataset.name}: {len(lacking)} of {len(dataset.train)} training examples have "
                f"fewer than {config.hard_negatives} hard negatives (first: {lacking[0].id}); "
                f"random passages stand in",
                stacklevel=2,
            )
        self._train: Sequence[TrainExample] = dataset.train
        self._corpus_ids = list(dataset.corpus)
        self._config = config
        self._epoch = -1
        self._draws: list[Draw] = []

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates in one pass over the training set."""
        return -(-len(self._train) // self._config.update_size)

    def update(self, index: int) -> list[Draw]:
        """The examples of update `index`, counted from 0 over all epochs."""
        epoch, position = divmod(index, self.updates_per_epoch)
        if epoch != self._epoch:
            self._draws = self._draw_epoch(epoch)
            self._epoch = epoch
        size = self._config.update_size
        return self._draws[position * size : (position + 1) * size]

    def probes(self, count: int) -> list[Draw]:
        """`count` examples, or all there are, drawn apart from every epoch."""
        return self._draw_epoch(-1, count)

    def _draw_epoch(self, epoch: int, count: int | None = None) -> list[Draw]:
        generator = torch.Generator().manual_seed(self._config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._train), generator=generator).tolist()
        return [self._draw(self._train[index], generator) for index in order[:count]]

    def _draw(self, example: TrainExample, generator: torch.Generator) -> Draw:
        def below(bound: int) -> int:
            return int(torch.randint(bound, (), generator=generator))

        wanted = self._config.hard_negatives
        positive = example.positives[below(len(example.positives))]
        negatives = list(example.negatives)
        if len(negatives) > wanted:
            picks = torch.randperm(len(negatives), generator=generator)[:wanted].tolist()
            negatives = [negatives[pick] for pick in picks]
        while len(negatives) < wanted:
            candidate = self._corpus_ids[below(len(self._corpus_ids))]
            if candidate not in example.positives and candidate not in negatives:
                negatives.append(candidate)
        return Draw(example.id, example.query, (positive, *negatives))


class Collator:
    """Turns draws into padded token tensors.

    Args:
        tokenizer: used for queries and passages.
        corpus: passages by id.
        config: query_max_length and passage_max_length, in tokens, are used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        corpus: Mapping[str, Passage],
        config: TrainConfig,
    ) -> None:
        self._tokenizer = tokenizer
        self._corpus = corpus
        self._config = config
        self._numbers = {passage_id: number for number, passage_id in enumerate(corpus)}

    def __call__(self, draws: Sequence[Draw]) -> Batch:
        """Tokenize and pad to the longest text of the batch."""
        texts = [self._corpus[pid].full() for draw in draws for pid in draw.passages]
        return Batch(
            self._tokenize([draw.query for draw in draws], self._config.query_max_length),
            self._tokenize(texts, self._config.passage_max_length),
            torch.tensor([[self._numbers[pid] for pid in draw.passages] for draw in draws]),
            tuple(draw.id for draw in draws),
        )

    def _tokenize(self, texts: list[str], max_length: int) -> dict[str, Tensor]:
        encoded = self._tokenizer(
            texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        return dict(encoded)
