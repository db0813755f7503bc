"""The training methods compared on equal terms: how one update's examples become gradients.

All see the same examples in the same order. They differ in how an update's n*K examples are cut
into batches, and in what a batch is scored against:

    inbatch     one batch of n*K: every passage of the update is a negative (needs the memory)
    gradaccum   K micro-batches of n, each scored against itself only
    contaccum   K micro-batches of n, each scored against itself and both memory banks
    prebatch    contaccum with `bank_query: false`: banked queries are no loss rows
    gradcache   the loss and the gradients of inbatch in the memory of n, by encoding twice
    gradcache_contaccum   likewise, the whole update scored against both memory banks too
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from contaccum_ext.ops import op_runs_on
from contaccum_ext.training.random_state import device_random_state, set_device_random_state
from contaccum_ext.training.rules import ConfigError
from contaccum_ext.training.scoring import Scoring

if TYPE_CHECKING:
    from contaccum_ext.bank import DualMemoryBank
    from contaccum_ext.training.config import TrainConfig
    from contaccum_ext.training.data import Batch

Encode = Callable[["Batch"], tuple[Tensor, Tensor]]
Scale = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Accumulated:
    """What came of the micro-batches of an update."""

    loss: float
    in_batch_loss: float  # over groups of n without any bank: means the same for every method
    non_finite: tuple[int, ...]  # micro-batches whose loss or representations are not finite


class Method:
    """Gradient accumulation over micro-batches of n; subclasses change the cut or the bank.

    Args:
        config: settings of the run.
        dim: embedding size d.
        training_queries: size of the training set; bounds the automatic bank size.
        device: where embeddings live.

    Raises:
        ConfigError: the settings leave a method with banks without any.
    """

    banked: ClassVar[bool] = False
    query_bank: ClassVar[bool] = True  # where False, whatever `bank_query` says
    scored_at_once: ClassVar[bool] = False  # the whole update

    def __init__(
        self, config: TrainConfig, dim: int, training_queries: int, device: torch.device
    ) -> None:
        self.config = config
        self.device = device
        # Where the op has no kernel for the device, the few embeddings travel to the CPU.
        self.loss_device = device if op_runs_on(device) else torch.device("cpu")
        batches = 1 if self.scored_at_once else config.accumulation_steps
        self.scoring = Scoring(
            config, self.banks(config), dim, training_queries, self.loss_device, batches
        )

    @classmethod
    def banks(cls, config: TrainConfig) -> str | None:
        """The `banks` of `contaccum_loss`; None for no bank.

        Raises:
            ConfigError: neither bank is left.
        """
        if not cls.banked:
            return None
        query, passage = config.bank_query and cls.query_bank, config.bank_passage
        if not (query or passage):
            raise ConfigError(
                f"bank_passage: expected true where method={config.method} and bank_query="
                f"{str(config.bank_query).lower()} leave no other bank, got false; the method "
                f"without banks is gradaccum"
            )
        return "both" if query and passage else "queries" if query else "passages"

    @property
    def bank(self) -> DualMemoryBank | None:
        """The bank, where the method has one."""
        return self.scoring.bank

    @staticmethod
    def micro_batch_size(config: TrainConfig) -> int:
        """Examples encoded together."""
        return config.local_batch_size

    def accumulate(
        self, encode: Encode, batches: Sequence[Batch], scale: Scale = lambda loss: loss
    ) -> Accumulated:
        """Add the gradients of one update to the parameters.

        Each micro-batch weighs in by its share of the update's examples: 1/K, and less for a
        smaller last one.

        Args:
            encode: maps a batch to queries (n, d) and passages (n, m, d).
            batches: the micro-batches of the update.
            scale: applied to what is differentiated: a gradient scaler's, for fp16.

        Returns:
            The update's loss, and which micro-batches are not finite.
        """
        examples = sum(batch.size for batch in batches)
        totals = []  # per micro-batch, read once at the end: no wait for the device in between
        for batch in batches:
            queries, passages = (vectors.to(self.loss_device) for vectors in encode(batch))
            passage_ids = batch.passage_ids.to(self.loss_device)
            last = batch is batches[-1]
            loss = self.scoring.loss(queries, passages, passage_ids, last)
            share = batch.size / examples
            scale(loss * share).backward()
            in_batch = self._in_batch_loss(queries, passages, passage_ids)
            totals.append(share * torch.stack([loss.detach(), in_batch]))
        per_batch = torch.stack(totals).cpu()  # (K, 2)
        bad = (~per_batch.isfinite().all(1)).nonzero().flatten().tolist()
        total, in_batch_total = per_batch.sum(0).tolist()
        return Accumulated(total, in_batch_total, tuple(bad))

    @torch.no_grad()
    def _in_batch_loss(self, queries: Tensor, passages: Tensor, passage_ids: Tensor) -> Tensor:
        size = self.config.local_batch_size
        groups = zip(
            queries.split(size), passages.split(size), passage_ids.split(size), strict=True
        )
        total = queries.new_zeros(())
        for group_queries, group_passages, group_ids in groups:
            loss = self.scoring.in_batch_loss(group_queries, group_passages, group_ids)
            total += len(group_queries) / len(queries) * loss
        return total


class InBatch(Method):
    """DPR's in-batch negatives over the whole update: what enough memory would allow."""

    @staticmethod
    def micro_batch_size(config: TrainConfig) -> int:
        return config.update_size


class GradAccum(Method):
    """Gradient accumulation: the memory of n, and only n-1 other queries' passages as negatives."""


class ContAccum(Method):
    """Memory banks of queries and passages shared by the micro-batches (arXiv 2406.12356)."""

    banked = True


class PreBatch(ContAccum):
    """Passage bank only: more negatives, unbalanced gradients."""

    query_bank = False


class GradCache(Method):
    """The whole update in one loss, encoded n at a time, twice (GradCache, arXiv 2101.06983).

    Equivalent to encoding all micro-batches with their graphs, concatenating the vectors and
    calling `backward` on `loss`. Here the first pass keeps only the vectors, whose gradients then
    enter the graph of one micro-batch after the other; the random state of each first encoding is
    set again for its second one, so that both drop out the same.
    """

    scored_at_once = True

    def accumulate(
        self, encode: Encode, batches: Sequence[Batch], scale: Scale = lambda loss: loss
    ) -> Accumulated:
        states, encoded = [], []
        with torch.no_grad():
            for batch in batches:
                states.append(device_random_state(self.device))
                encoded.append(tuple(vectors.to(self.loss_device) for vectors in encode(batch)))
        queries, passages = (
            torch.cat(side).requires_grad_() for side in zip(*encoded, strict=True)
        )
        passage_ids = torch.cat([batch.passage_ids for batch in batches]).to(self.loss_device)
        loss = self.scoring.loss(queries, passages, passage_ids, last=True)
        loss.backward()
        # Complete already, unlike those of the encoders, which get theirs in the second pass.
        for parameter in self.scoring.parameters():
            assert parameter.grad is not None
            parameter.grad = scale(parameter.grad)
        in_batch = self._in_batch_loss(queries, passages, passage_ids)
        finite = [torch.stack([v.sum() for v in pair]).isfinite().all() for pair in encoded]
        bad = (~torch.stack(finite).cpu()).nonzero().flatten().tolist()
        total, in_batch_total = torch.stack([loss.detach(), in_batch]).tolist()
        if not (bad or math.isfinite(total)):
            # Finite vectors that overflow when scored belong to no micro-batch alone.
            bad = list(range(len(batches)))
        result = Accumulated(total, in_batch_total, tuple(bad))
        if bad:
            return result

        sizes = [batch.size for batch in batches]
        assert queries.grad is not None and passages.grad is not None
        gradients = zip(queries.grad.split(sizes), passages.grad.split(sizes), strict=True)
        for batch, state, pair in zip(batches, states, gradients, strict=True):
            set_device_random_state(self.device, state)
            products = [
                (vectors * gradient.to(vectors.device)).sum()
                for vectors, gradient in zip(encode(batch), pair, strict=True)
            ]
            scale(products[0] + products[1]).backward()
        return result


class GradCacheContAccum(GradCache):
    """The whole update scored against itself and both memory banks, encoded n at a time, twice."""

    banked = True


METHODS: dict[str, type[Method]] = {
    "inbatch": InBatch,
    "gradaccum": GradAccum,
    "contaccum": ContAccum,
    "prebatch": PreBatch,
    "gradcache": GradCache,
    "gradcache_contaccum": GradCacheContAccum,
}
"""The classes behind the setting `method`, by its values."""
