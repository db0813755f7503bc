"""The loss against a bank without hard negatives, while local rows keep theirs: an ablation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from contaccum_ext.bank import DualMemoryBank
from contaccum_ext.functional import contaccum_loss
from contaccum_ext.ops import POSITIVE, ROW_LSE, center_gradients_


def positive_bank_loss(
    queries: Tensor,
    passages: Tensor,
    bank: DualMemoryBank,
    temperature: float,
    passage_ids: Tensor | None,
    row_weighting: str = "local",
    banks: str = "both",
    center_over: int | None = None,
) -> Tensor:
    """Loss of a micro-batch whose hard negatives are local columns only, then enqueue positives.

    Equivalent to `contaccum_loss` with the columns of banked hard negatives left out, which no mask
    by id can do. In plain PyTorch, n x F scores and F x nm: a banked row's part over banked columns
    comes from the bank's table, as in the op.

    Args:
        queries: (n, d).
        passages: (n, m, d), positive first.
        bank: of one passage per query.
        temperature: scores are inner products divided by it.
        passage_ids: (n, m) int64, or None.
        row_weighting, banks, center_over: as in `contaccum_loss`; gradients are centered as they
            come back, so in units of what is differentiated.

    Returns:
        () fp32; NaN, and nothing banked, where the batch is not finite.
    """
    if center_over is not None and torch.is_grad_enabled():
        passages = _Centered.apply(passages, bank.centering, center_over)
    (n, m, d), scale = passages.shape, 1.0 / temperature
    columns = passages.reshape(n * m, d)
    column_ids = None if passage_ids is None else passage_ids.reshape(-1)
    targets = torch.arange(n, device=queries.device) * m
    row_ids = None if passage_ids is None else passage_ids[:, 0]

    local = scale * queries @ columns.T  # (n, nm)
    own = torch.zeros_like(local, dtype=torch.bool).scatter_(1, targets[:, None], True)
    target_scores = local.gather(1, targets[:, None])[:, 0]
    scores = [local.masked_fill(_same(row_ids, column_ids, local) & ~own, -math.inf)]
    used = bank.used
    newest = slice(len(bank) - used, None)
    ahead = bank.ahead(queries.detach(), passages[:, :1].detach(), scale)
    if used and banks != "queries":
        offsets = (bank.passage_offsets()[:, 0] + ahead[1]).to(bank.dtype)
        banked = (bank.passages()[:, 0] + offsets)[newest]
        against_bank = scale * queries @ banked.T  # (n, used)
        bank_ids = None if passage_ids is None else bank.passage_ids()[newest, 0]
        scores.append(against_bank.masked_fill(_same(row_ids, bank_ids, against_bank), -math.inf))
    per_row = torch.cat(scores, 1).logsumexp(1) - target_scores
    if used and banks != "passages":
        if bank.pending_rebuild(scale, bank.window_blocks()):  # transport or a window has changed
            with torch.no_grad():
                ids = None if passage_ids is None else passage_ids[:, :1]
                contaccum_loss(queries, passages[:, :1], bank, temperature, ids, enqueue=False)
        banked = bank.queries() + (bank.query_offsets() + ahead[0]).to(bank.dtype)
        rows = _banked_rows(scale * banked @ columns.T, column_ids, bank, scale, banks)
        per_row = torch.cat([per_row, rows[newest]])
    loss = per_row.sum() / (n if row_weighting == "local" else len(per_row))
    with torch.no_grad():
        # Zero, or NaN where anything is not finite: the op then refuses the batch as it refuses one
        # whose hard negatives it sees.
        taint = 0 * (queries.sum() + passages.sum())
        positives = passages[:, :1] + taint
        positive_ids = None if passage_ids is None else passage_ids[:, :1]
        contaccum_loss(queries, positives, bank, temperature, positive_ids)
    return loss + taint


class _Centered(torch.autograd.Function):
    """Passages (n, m, d) as they are; their gradients are centered over an update's batches."""

    @staticmethod
    def forward(ctx, passages, state, over):
        ctx.state, ctx.over = state, over
        return passages.view_as(passages)

    @staticmethod
    def backward(ctx, gradient):
        centered = gradient.to(ctx.state, copy=True).contiguous()
        center_gradients_(centered, ctx.state, ctx.over, True)
        return centered.to(gradient), None, None


def _banked_rows(
    scores: Tensor, column_ids: Tensor | None, bank: DualMemoryBank, scale: float, banks: str
) -> Tensor:
    """(F,) losses of banked rows with scores (F, nm) of local columns; of use for those in use."""
    # From the table, which need not follow every move of the vectors.
    target_scores = bank.row_state[POSITIVE][bank.slots()]
    among_banked = target_scores
    if banks == "both":
        among_banked = bank.row_state[ROW_LSE][bank.slots()]  # over the window
    row_ids = None if column_ids is None else bank.passage_ids()[:, 0]
    scores = scores.masked_fill(_same(row_ids, column_ids, scores), -math.inf)
    return torch.cat([among_banked[:, None], scores], 1).logsumexp(1) - target_scores


def _same(rows: Tensor | None, columns: Tensor | None, like: Tensor) -> Tensor:
    """(rows, columns) whether a column has the id of the row's positive; -1 has none."""
    if rows is None or columns is None:
        return torch.zeros_like(like, dtype=torch.bool)
    return (rows[:, None] == columns) & (columns != -1)
