"""The one oracle: ContAccum's loss in plain PyTorch, over the full (n + F) x (n + F)m matrix.

Everything the kernels do is defined here in a few readable lines, at quadratic cost: ContAccum
(arXiv 2406.12356), equations 5-9, and this project's offsets, window, masking and row weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from contaccum_ext.layout import accumulation_dtype
from contaccum_ext.reference_bank import DualMemoryBank

__all__ = ["DualMemoryBank", "contaccum_loss"]


def _straight_through(x: Tensor, storage: torch.dtype, compute: torch.dtype) -> Tensor:
    """Round to the bank's dtype, go on in `compute`, with the gradient of the identity."""
    exact = x.to(compute)
    return exact + (x.detach().to(storage).to(compute) - exact.detach())


def contaccum_loss(
    queries: Tensor,
    passages: Tensor,
    bank: Any = None,
    temperature: float | Tensor = 1.0,
    passage_ids: Tensor | None = None,
    row_weighting: str = "local",
    enqueue: bool = True,
    banks: str = "both",
    symmetric: bool = False,
    center_over: int | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Same arguments and result as `contaccum_ext.contaccum_loss`, over the full matrix.

    Differentiable as often as one likes; nothing is checked.

    Args:
        queries: (n, d) floating.
        passages: (n, m, d) floating, positive first; (n, d) means m = 1.
        bank: a `DualMemoryBank` of this module, the package's own, or None. Of the package's own,
            scores among banked vectors are those of the vectors as they are.
        temperature: number, or a floating tensor, () or (1,), which gets its gradient; scores
            are inner products divided by it.
        passage_ids: (n, m) int64, -1 for none; None leaves nothing out.
        row_weighting: "local" for weights 1/n, "all" for 1/(n + F).
        enqueue: put the batch into the bank afterwards.
        banks: "both", "passages" or "queries": which banked vectors take part.
        symmetric: the mean with the loss of positives as rows and queries as columns.
        center_over: batches of an update, over which gradients of a loss's columns sum to zero.
        compute_dtype: of all arithmetic; by default float64 for a float64 bank, else float32.

    Returns:
        () float64 for a float64 bank, else float32.

    Source: ContAccum, arXiv 2406.12356, equations 5-9.
    """
    if passages.dim() == 2:
        passages = passages[:, None]
    (n, d), m = queries.shape, passages.shape[1]
    storage = bank.dtype if bank is not None else queries.dtype
    compute = compute_dtype or accumulation_dtype(storage)
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(()).to(compute)
    scale = 1.0 / temperature
    lagging = None  # scores of vectors as they were, where these have been moved since
    if isinstance(bank, DualMemoryBank):
        number = temperature.item() if isinstance(temperature, Tensor) else float(temperature)
        lagging = bank.lagging_scores(number)
    q = _straight_through(queries, storage, compute)
    p = _straight_through(passages, storage, compute)
    keep = enqueue and bank is not None and _all_finite(queries, passages, storage, scale)
    given = [x for x in (queries, passages, temperature) if isinstance(x, Tensor)]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    over = center_over if bank is not None and learns else None
    if over is not None:  # also those that nobody asks for
        q, p = (x if x.requires_grad else x.detach().requires_grad_() for x in (q, p))

    used = min(bank.effective_window(), len(bank)) if bank is not None else 0
    if used:
        newest = slice(len(bank) - used, None)
        bank_q, bank_p = bank.queries()[newest].to(compute), bank.passages()[newest].to(compute)
        ahead = bank.ahead(queries.detach(), passages.detach())
        epsilon = (bank.query_offsets() + ahead[0])[newest].to(compute)
        delta = (bank.passage_offsets() + ahead[1:])[newest].to(compute)
    else:
        bank_q, bank_p = q.new_zeros(0, d), p.new_zeros(0, m, d)
        epsilon, delta = torch.zeros_like(bank_q), torch.zeros_like(bank_p)

    local_columns, banked_columns = p.reshape(n * m, d), bank_p.reshape(used * m, d)
    if lagging is None:
        among = bank_q @ banked_columns.T
    else:
        places = bank.places()[len(bank) - used :]
        among = lagging[0].among(places).reshape(used, used * m).to(compute)
    scores = scale * torch.cat(  # rows: local, banked; columns: local, banked
        [
            torch.cat([q @ local_columns.T, q @ (banked_columns + delta.reshape(-1, d)).T], 1),
            torch.cat([(bank_q + epsilon) @ local_columns.T, among], 1),
        ]
    )
    rows, columns = (torch.arange((n + used) * k, device=q.device) for k in (1, m))
    target = rows * m
    is_target = columns == target[:, None]
    absent = torch.zeros_like(is_target)
    if passage_ids is not None:
        ids = passage_ids
        if used:
            ids = torch.cat([ids, bank.passage_ids()[newest]])
        ids = ids.reshape(-1)
        absent |= (ids == ids[target][:, None]) & (ids != -1) & ~is_target
    if banks == "queries":  # banked passages only as the targets of their own rows
        absent[:, n * m :] |= ~is_target[:, n * m :]
    plain, scores = scores, scores.masked_fill(absent, -math.inf)
    targets = scores[rows, target]
    if lagging is not None:
        targets = torch.cat([targets[:n], scale * lagging[0].own(places).to(compute)])
        if banks == "queries":
            scores = torch.where(is_target, targets[:, None], scores)
    per_row = torch.logsumexp(scores, 1) - targets
    if banks == "passages":
        per_row = per_row[:n]
    weights = n if row_weighting == "local" else len(per_row)
    loss = per_row.sum() / weights
    if over is not None:
        loss = _center(loss, p, bank.centering, over, keep)
    if symmetric:
        of_positives = plain[:, target].T  # rows: positives, columns: queries
        targets = of_positives.diagonal()
        if lagging is not None:
            among = scale * lagging[1].among(places)[:, :, 0].to(compute)
            banked = torch.cat([of_positives[n:, :n], among], 1)
            of_positives = torch.cat([of_positives[:n], banked])
            targets = torch.cat([targets[:n], scale * lagging[1].own(places).to(compute)])
        if passage_ids is not None:
            own = ids[target]
            same = (own == own[:, None]) & (own != -1) & (rows != rows[:, None])
            of_positives = of_positives.masked_fill(same, -math.inf)
        per_row = torch.logsumexp(of_positives, 1) - targets
        mirrored = per_row.sum() / weights
        if over is not None:
            mirrored = _center(mirrored, q, bank.mirror.centering, over, keep)
        loss = (loss + mirrored) / 2

    if bank is not None and enqueue:
        if keep:
            bank.enqueue(queries, passages, passage_ids)
        else:
            loss = loss * math.nan
    return loss.to(accumulation_dtype(storage))


def _center(loss: Tensor, columns: Tensor, state: Tensor, over: int, keep: bool) -> Tensor:
    """The same value; gradients of its columns sum to zero over `over` batches.

    A row's loss does not change when all of its columns are moved alike, so that the gradients of
    an in-batch loss sum to zero. Where the bank's columns cannot move those of the batch do not.
    With 1 batch, and no offsets, it is the gradient of the loss whose banked columns go where the
    batch's mean goes.

    Args:
        loss: () of one batch.
        columns: (..., d) of it.
        state: (2, d) what has not been taken out yet, and batches since the update began.
        over: batches of an update.
        keep: the batch is one of the update's.
    """
    (gradient,) = torch.autograd.grad(loss, columns, create_graph=True)
    total = state[0] + gradient.detach().flatten(0, -2).sum(0).to(state)
    taken = total / (over - state[1]).clamp(min=1)
    if keep:
        state.copy_(torch.stack([total - taken, (state[1] + 1) % over]))
    each = taken.nan_to_num(nan=0.0) / columns[..., 0].numel()
    return loss - ((columns - columns.detach()) * each.to(columns)).sum()


def _all_finite(
    queries: Tensor, passages: Tensor, storage: torch.dtype, scale: float | Tensor
) -> bool:
    """True when no scaled squared norm overflows, so that by Cauchy-Schwarz no score can either."""
    acc = accumulation_dtype(storage)
    vectors = torch.cat([queries.detach()[:, None], passages.detach()], 1).to(storage).to(acc)
    return bool(torch.isfinite(scale * vectors.square().sum(-1)).all())
