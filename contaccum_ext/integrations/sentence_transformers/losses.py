"""Memory banks for two losses of sentence-transformers: with and without gradient caching."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
    matryoshka,
)
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor, nn

from contaccum_ext.integrations.sentence_transformers.encoding import (
    encoder_of,
    matryoshka_around,
)
from contaccum_ext.integrations.sentence_transformers.features import row_count
from contaccum_ext.integrations.sentence_transformers.identity import text_ids
from contaccum_ext.integrations.sentence_transformers.memory import BankMemory
from contaccum_ext.integrations.sentence_transformers.settings import BankSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from contaccum_ext.integrations.sentence_transformers.settings import BankOptions

Similarity = Callable[[Tensor, Tensor], Tensor]

# Rows encoded at once without gradients, for each row with: one layer's activations are alive, not
# all, and fewer, larger batches keep a GPU busy.
_PROBES_PER_ROW = 4

CITATION = """
@inproceedings{kim2024contaccum,
    title = {A Gradient Accumulation Method for Dense Retriever under Memory Constraint},
    author = {Jaehee Kim and Yukyung Lee and Pilsung Kang},
    booktitle = {Advances in Neural Information Processing Systems},
    year = {2024},
    url = {https://arxiv.org/abs/2406.12356},
}
"""


class _Banked(nn.Module):
    """What both losses add to the loss of sentence-transformers that they come from."""

    model: SentenceTransformer
    scale: float
    similarity_fct: Similarity
    memory: BankMemory
    _identities: list[Tensor | None]

    def _add_memory(self, **banks: Unpack[BankOptions]) -> None:
        if self.similarity_fct not in (cos_sim, dot_score):
            name = getattr(self.similarity_fct, "__name__", repr(self.similarity_fct))
            raise ValueError(
                f"similarity_fct: expected cos_sim or dot_score of sentence_transformers.util, "
                f"got {name}: scores of banked vectors are inner products"
            )
        self.memory = BankMemory(BankSettings(self.similarity_fct is cos_sim, **banks))
        self._identities = []

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """() float32 loss of a batch, float64 for a float64 model.

        Args:
            sentence_features: for each column what the tokenizer made of it, input_ids (n, tokens)
                int64 among it.
            labels: unused.

        Raises:
            ValueError: there are fewer than two columns.
        """
        columns = list(sentence_features)
        if self._uses_banks():
            # Before the model runs: its modules may change the features that they are given.
            if self.memory.settings.mask_duplicates:
                self._identities = [text_ids(features) for features in columns[1:]]
            self._follow(columns)
        try:
            return super().forward(columns, labels)
        finally:
            self._identities = []

    def _loss_of(self, columns: list[Tensor]) -> Tensor:
        identities = self._identities or [None] * (len(columns) - 1)
        return self.memory(columns, identities, self.scale, self._uses_banks())

    def _uses_banks(self) -> bool:
        """Whether this is training, and of the whole model."""
        if not (self.model.training and torch.is_grad_enabled()):
            return False
        # AdaptiveLayerLoss asks for the loss of other layers too, a few drawn for each batch. Their
        # vectors must not enter the last layer's bank, and banks of their own would fill so rarely
        # that they would always be stale.
        return getattr(encoder_of(self.model)[0].forward, "layer_idx", None) is None

    def _follow(self, columns: list[dict[str, Tensor]]) -> None:
        """Let the banks go where optimizer steps have taken the probes since the last batch."""
        probes, outer = self.memory.probes, matryoshka_around(self.model)
        # MatryoshkaLoss shows a batch once for each size, its vectors from the first time.
        again = outer is not None and outer.cache_dim is not None
        if probes is None or self.memory.capacity == 0 or len(columns) < 2 or again:
            return
        rows = row_count(columns[0])
        rows = min(rows, getattr(self, "mini_batch_size", rows))
        encoder = encoder_of(self.model)
        moves = probes.follow(encoder, columns, _PROBES_PER_ROW * rows)
        inner = getattr(self, "calculate_loss", None)  # MatryoshkaLoss decorates it
        unit = (
            self.memory.settings.normalize
            or outer is not None
            or isinstance(inner, matryoshka.CachedLossDecorator)
        )
        self.memory.follow(moves, unit)

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        settings = asdict(self.memory.settings)
        del settings["normalize"]  # follows from the similarity
        return {
            "scale": self.scale,
            "similarity_fct": self.similarity_fct.__name__,
            **settings,
        }


class ContAccumLoss(_Banked, MultipleNegativesRankingLoss):
    """MultipleNegativesRankingLoss against memory banks of earlier micro-batches (ContAccum).

    A batch is scored against itself and against the last `bank_size` rows that this process has
    seen, queries and passages; then it takes the place of the oldest. Banks live across gradient
    accumulation and across optimizer steps. The columns are those of MultipleNegativesRankingLoss:
    (anchor, positive) or (anchor, positive, negative_1, ..., negative_k). Without banks it is
    ``contaccum_ext.contaccum_loss(anchor, stack([positive, *negatives], 1), temperature=1 /
    scale)`` of normalized embeddings, which is MultipleNegativesRankingLoss.

    While the model is in ``eval()`` or gradients are off, banks are neither read nor written,
    nothing is masked, and the value is that of MultipleNegativesRankingLoss.

    Args:
        model: encodes the columns; one encoder or a Router.
        scale: similarities are multiplied by it; 1 / temperature.
        similarity_fct: ``cos_sim`` or ``dot_score`` of ``sentence_transformers.util``.
        banks: settings of the banks, by name: see below.

    Keyword Args:
        bank_size (int | str): slots, each a row of the data set; 0 for no bank; "auto" (default)
            for four updates' worth, 4 * per_device_train_batch_size *
            gradient_accumulation_steps, eight where an update has fewer than 64 rows, at most the
            training set. That needs ``ContAccumCallback``; without it "auto" is 1,024.
        drift (str): "mean" corrects old vectors by the shift of their mean; "transport" encodes a
            few texts, the probes, again after every optimizer step and moves all banked vectors as
            these have moved, about running means; "none" leaves them as they are. "auto" (default)
            is "mean" up to two updates' worth of slots, eight where an update has fewer than 64
            rows, and "transport" beyond; without ``ContAccumCallback``, which knows how large an
            update is, it is "transport".
        drift_decay (float | None): of the running means, per batch. None (default) lets
            ``ContAccumCallback`` choose by the batches in an update, with
            ``contaccum_ext.mean_decay``; without it 0.9 with "transport" and 0.5 with "mean". Means
            of "mean" have a batch before its own loss (``DualMemoryBank(anticipate=True)``), unless
            the callback knows of eight batches or more in an update: in updates of one batch those
            that wait for it lag by an update, which ruins training.
        center_gradients (bool | str): let gradients of passages (and, of the other direction, of
            anchors) sum to zero over an update, as those of an in-batch loss do over a batch;
            without the callback over each batch. "auto" (default) does so with "transport", and in
            banks that are not too old for it without. The value of the loss is the same.
        wide_epochs (int | str): epochs in which more slots take part than "auto" would have, with
            the callback; "auto" (default) is three with "transport", or none with
            row_weighting="all", otherwise all.
        row_weighting (str): "local" (default) weights every row 1/n, "all" 1/(n + filled slots) as
            in the paper.
        symmetric (bool): the mean of this loss and of that with positives for rows and anchors for
            columns, banked ones too (default False). That is MultipleNegativesRankingLoss with
            ``directions=("query_to_doc", "doc_to_query")`` and ``partition_mode="per_direction"``,
            against banks, which then hold two vectors more a slot.
        mask_duplicates (bool): leave a passage out of a row's negatives if its tokens are those of
            the row's positive (default). Texts truncated to the same tokens count as the same.
        drift_probes (int): of "transport": anchors, and about as many passages in all, the first
            that training shows (default 64). Until there are so many, banks are not moved.
        drift_ridge (float): of "transport": larger trusts the probes less (default 0.1); in units
            of the mean eigenvalue of their Gram matrix.
        drift_limit (float | None): of "transport": slots that may be further off than this, in
            spreads of fresh vectors, are left out (default 0.3); None for none. How far they may be
            off is what the probes say of each other, added up over the moves that a slot has seen.

    Under ``MatryoshkaLoss`` each size of embedding has its own bank; under ``AdaptiveLayerLoss``
    the last layer has banks and the other layers, drawn now and then, are trained in-batch.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: ContAccum, arXiv 2406.12356, equations 5-9.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Similarity = cos_sim,
        **banks: Unpack[BankOptions],
    ) -> None:
        encoder_of(model)
        super().__init__(model, scale, similarity_fct)
        self._add_memory(**banks)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """() loss, where the columns have been encoded already.

        Args:
            embeddings: (n, d) floating for each column, anchors first.
            labels: unused.
        """
        return self._loss_of(embeddings)

    @property
    def citation(self) -> str:
        """BibTeX of the method."""
        return CITATION


class CachedContAccumLoss(_Banked, CachedMultipleNegativesRankingLoss):
    """ContAccumLoss with gradient caching: large batches and banks in the memory of a mini-batch.

    The batch is encoded in mini-batches without gradients; one call of the op gives the loss and
    the gradients with respect to all embeddings; then each mini-batch is encoded again, with the
    same dropout, to pass them on. Equal to ContAccumLoss on the whole batch, dropout aside, and
    with bank_size=0 to CachedMultipleNegativesRankingLoss. AdaptiveLayerLoss does not work with
    gradient caching.

    Args:
        model: encodes the columns; one encoder or a Router.
        scale: similarities are multiplied by it; 1 / temperature.
        similarity_fct: ``cos_sim`` or ``dot_score`` of ``sentence_transformers.util``.
        mini_batch_size: rows encoded at a time.
        banks: settings of the banks, by name: bank_size, drift, drift_decay, center_gradients,
            wide_epochs, row_weighting, symmetric, mask_duplicates, drift_probes, drift_ridge and
            drift_limit, as in ContAccumLoss.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Sources: ContAccum, arXiv 2406.12356; GradCache, arXiv 2101.06983.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Similarity = cos_sim,
        mini_batch_size: int = 32,
        **banks: Unpack[BankOptions],
    ) -> None:
        encoder_of(model)
        super().__init__(model, scale, similarity_fct, mini_batch_size)
        self._add_memory(**banks)

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        labels: Tensor | None = None,
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """() loss, where the columns have been encoded already, in mini-batches.

        Args:
            reps: (mini-batch size, d) floating for each column and mini-batch; leaves that require
                grad, if `with_backward`.
            labels: unused.
            with_backward: give the embeddings their gradients, which the op has computed already,
                and return the loss detached.
        """
        loss = self._loss_of([torch.cat(minibatches) for minibatches in reps])
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {**super().get_config_dict(), "mini_batch_size": self.mini_batch_size}

    @property
    def citation(self) -> str:
        """BibTeX of both methods."""
        return CITATION + super().citation
