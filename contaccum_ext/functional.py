"""The fused loss as a function: checks in Python, one op, gradients saved by the forward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from contaccum_ext import arguments, ops, validation
from contaccum_ext.bank import DualMemoryBank
from contaccum_ext.layout import BankLayout

_ROW_WEIGHTING = ("local", "all")
_BANKS = ("both", "passages", "queries")
_NO_LAYOUT = BankLayout(1, 1, 1)
_MEANS_STAY = -1.0  # as a decay: the op stamps slots with means as they are


class _Options(NamedTuple):
    """What both directions of a loss share."""

    scale: float
    temperature: Tensor | None  # only where it needs a gradient
    weight_all_rows: bool
    banks: str
    enqueue: bool
    center_over: int | None


def contaccum_loss(
    queries: Tensor,
    passages: Tensor,
    bank: DualMemoryBank | None = None,
    temperature: float | Tensor = 1.0,
    passage_ids: Tensor | None = None,
    row_weighting: str = "local",
    enqueue: bool = True,
    banks: str = "both",
    symmetric: bool = False,
    center_over: int | None = None,
) -> Tensor:
    """Contrastive loss of a micro-batch against two memory banks, then enqueue.

    Equivalent to cross entropy over ``cat(queries, banked queries) @ cat(passages, banked
    passages).T / temperature`` with banked vectors constant, in time and memory linear in the bank.
    Its plain-PyTorch form is `contaccum_ext.reference.contaccum_loss`. Gradients are computed in
    the forward pass: what happens to the bank afterwards cannot change them.

    Args:
        queries: (n, d) floating, usually requiring grad.
        passages: (n, m, d), positive first, then hard negatives; (n, d) means m = 1. Same dtype.
        bank: used as it was before this batch; None for in-batch InfoNCE. Local vectors are rounded
            to the bank's dtype. float64 meets only float64; the narrower types mix.
        temperature: positive number, or a floating tensor of one element, () or (1,); scores are
            inner products divided by it. A tensor that requires grad gets the exact gradient of the
            whole loss; the bank must then be one with ``learn_temperature=True``. Reading a tensor
            makes the host wait for the device, once a call; a number costs nothing. With another
            value than last time the bank's table is rebuilt, in O(F^2).
        passage_ids: (n, m) int64. A column with the same id as a row's positive is left out of the
            row unless it is that positive (a false negative); -1 never matches. A bank takes
            batches always with ids or always without.
        row_weighting: "local" weights every row 1/n; "all" 1/(n + F) as in the paper.
        enqueue: put the batch into the bank (the newest slots stay if n exceeds the capacity). A
            batch with a representation that is not finite, or whose scaled squared norm is not, is
            refused: the bank stays as it was, loss and gradients are NaN. Gradients do
            not count: where loss scaling skips a step because they overflowed, its batch is banked.
        banks: "both"; "passages": banked queries are no loss rows (pre-batch negatives); "queries":
            banked rows meet their own positive and local columns, local rows local columns only.
        symmetric: give the mean of this loss and of the one in the other direction, whose rows are
            the positives and whose columns are the queries, banked ones included, with the same
            masks; hard negatives have no part in it. Only with ``banks="both"``, and with a bank
            made with ``symmetric=True``, whose two halves must never get out of step: such a bank
            takes a batch from a symmetric loss alone.
        center_over: None for the gradients of the loss, exactly; or K, the batches of an optimizer
            update: passages' gradients then sum to zero over the update, as those of a loss without
            a bank do over a batch. Their sum so far is taken out evenly over the batches that are
            left, this one included; with 1 it is each batch's mean. Without a bank nothing has to
            be. The value is the same. docs/drift.md says what it is good for;
            ``bank.begin_update()`` is for updates of fewer batches than K.

    Returns:
        () float32, or float64 for a float64 bank.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, what was expected and what came.
            The bank is then as it was, to the bit (the table of a mirror may have to be rebuilt).
            Differentiating twice is a RuntimeError.

    Source: ContAccum, arXiv 2406.12356, equations 5-9; the other direction as in CLIP,
    arXiv 2103.00020, section 2.3.
    """
    arguments.check_arguments(queries, passages, bank, passage_ids)
    validation.choice("row_weighting", row_weighting, _ROW_WEIGHTING)
    validation.choice("banks", banks, _BANKS)
    learned = None
    if isinstance(temperature, Tensor):
        scale = 1.0 / arguments.value_of(temperature)
        learned = temperature if temperature.requires_grad and torch.is_grad_enabled() else None
    else:
        scale = 1.0 / validation.positive("temperature", temperature)
    if learned is not None and bank is not None and not bank.learn_temperature:
        raise ValueError(
            "temperature: expected one that requires no gradient, since the bank was made without "
            "learn_temperature=True, got one that does"
        )
    if enqueue and bank is not None and bank._is_mirror:
        raise ValueError(
            "bank: expected one to take the batch, got the mirror of a symmetric bank, which is "
            "filled through the bank itself"
        )
    columns = passages.unsqueeze(1) if passages.dim() == 2 else passages
    if center_over is not None:
        validation.count("center_over", center_over)
    options = _Options(scale, learned, row_weighting == "all", banks, enqueue, center_over)
    if symmetric:
        arguments.check_symmetric(bank, banks)
    if symmetric or (bank is not None and bank.anticipate):
        arguments.check_shapes(queries, columns, passage_ids, bank, passages.dim() == 2)
    if not symmetric:
        if enqueue and bank is not None and bank.mirror is not None:
            raise ValueError(
                "symmetric: expected True, since the bank was made with symmetric=True and is to "
                "take the batch, got False"
            )
        return _one_direction(queries, columns, passage_ids, bank, options)
    return _both_directions(queries, columns, passage_ids, bank, options)


def _one_direction(queries, columns, passage_ids, bank, options, companions=None) -> Tensor:
    """() loss with queries (n, d) for rows and passages (n, m, d) for columns."""
    batch = (queries, columns, passage_ids, companions)
    if bank is None or not bank.anticipate:
        decay = bank.drift_decay if bank is not None and bank.drift == "mean" else _MEANS_STAY
        return _scored(batch, bank, options, decay)
    before = bank.means[0].clone()
    with torch.no_grad():
        bank.means[0] += bank.ahead(queries, columns, options.scale, companions)
    if torch.compiler.is_compiling():
        loss = _scored(batch, bank, options, _MEANS_STAY)
    else:
        try:
            loss = _scored(batch, bank, options, _MEANS_STAY)
        except BaseException:
            bank.means[0] = before
            raise
    if not options.enqueue:
        bank.means[0] = before
    return loss


def _scored(batch, bank, options, decay) -> Tensor:
    """() loss of queries, columns, ids and companions; means move by `decay` if they enter."""
    o, (queries, columns, _, _) = options, batch
    if bank is None:
        buffers, layout, window = _no_bank(queries, columns), _NO_LAYOUT, -1
        rebuild, use_offsets = ops.REBUILD_NOTHING, False
    else:
        buffers, layout, window = bank.buffers_in_order(), bank.layout, bank.window_blocks()
        rebuild, use_offsets = bank.pending_rebuild(o.scale, window), bank.use_offsets
    needs_scale_grad = o.temperature is not None
    needs_grad = torch.is_grad_enabled() and (queries.requires_grad or columns.requires_grad)
    given = (
        *batch,
        *buffers,
        (layout.group, layout.offset_block, layout.block),
        o.scale,
        window,
        o.weight_all_rows,
        o.banks != "passages",
        o.banks != "queries",
        use_offsets,
        decay,
        needs_grad or needs_scale_grad,
        needs_scale_grad,
        o.enqueue,
        rebuild,
    )
    if needs_grad or needs_scale_grad:
        centering = None
        if bank is not None and o.center_over is not None:
            centering = (bank.centering, o.center_over, o.enqueue)
        loss = _BankedLoss.apply(queries, columns, o.temperature, o.scale, given, centering)
    else:
        loss = ops.banked_loss_(*given)[0]
    if bank is not None:
        has_ids = batch[2] is not None if o.enqueue else None
        bank.accept(o.scale, window, has_ids)
        if not torch.compiler.is_compiling():
            # C++ kernels do not bump versions: keep autograd's check of saved tensors alive.
            torch.autograd.graph.increment_version([b for b in buffers if b is not None])
    return loss


def _both_directions(queries, columns, passage_ids, bank, options) -> Tensor:
    """() mean of the loss and of that with queries and positives in each other's place."""
    ids = None if passage_ids is None else passage_ids[:, :1]
    # So that both directions refuse the same batches, of the same numbers.
    hard_negatives = columns[:, 1:] if columns.shape[1] > 1 else None
    mirror = None if bank is None else bank.mirror
    # The mirror first: all that it holds the bank can give back to it.
    centering = None
    if mirror is not None and options.center_over is not None:
        centering = mirror.centering.clone()
    mirrored = _one_direction(
        columns[:, 0], queries.unsqueeze(1), ids, mirror, options, hard_negatives
    )
    if mirror is None or torch.compiler.is_compiling():
        loss = _one_direction(queries, columns, passage_ids, bank, options)
    else:
        try:
            loss = _one_direction(queries, columns, passage_ids, bank, options)
        except BaseException:
            bank.restore_mirror()
            if centering is not None:
                mirror.centering.copy_(centering)
            raise
    return (loss + mirrored) / 2


class _BankedLoss(torch.autograd.Function):
    """The op and its gradients, computed while the bank is as the loss saw it."""

    @staticmethod
    def forward(ctx, queries, passages, temperature, scale, arguments, centering):
        loss, d_queries, d_passages, d_scale = ops.banked_loss_(*arguments)
        if centering is not None:
            ops.center_gradients_(d_passages, *centering)
        ctx.save_for_backward(d_queries, d_passages, d_scale)
        # Only for their dtype and to connect second derivatives to their error. Not saved: their
        # values are not used, so whoever changes them in place afterwards does no harm.
        ctx.inputs, ctx.scale = (queries, passages, temperature), scale
        return loss

    @staticmethod
    def backward(ctx, factor):
        d_queries, d_passages, d_scale = ctx.saved_tensors
        queries, _, temperature = ctx.inputs
        d_queries, d_passages = ops.scaled_gradients(d_queries, d_passages, factor, queries)
        d_temperature = None
        if temperature is not None:
            d_temperature = factor * d_scale * -(ctx.scale**2)
            d_temperature = d_temperature.reshape(temperature.shape).to(temperature)
        scaled: tuple = (d_queries, d_passages, d_temperature)
        if torch.is_grad_enabled():  # create_graph=True
            inputs = [x for x in ctx.inputs if x is not None]
            scaled = tuple(g if g is None else _SecondDerivative.apply(g, *inputs) for g in scaled)
        return (*scaled, None, None, None)  # autograd drops those that are not needed


class _SecondDerivative(torch.autograd.Function):
    """A gradient whose own derivative is an error instead of silently zero."""

    @staticmethod
    def forward(ctx, grad, *inputs):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "contaccum_loss: expected to be differentiated once, got a second differentiation: the "
            "gradient is computed in the forward pass and has no graph of its own. "
            "Use contaccum_ext.reference.contaccum_loss for second derivatives."
        )


def _no_bank(queries: Tensor, passages: Tensor) -> tuple[Tensor | None, ...]:
    """Buffers of a bank without slots, in the order of the schema."""
    shapes = _NO_LAYOUT.buffers(0, passages.shape[1], queries.shape[-1], queries.dtype)
    buffers = (queries.new_zeros(shape, dtype=dtype) for shape, dtype in shapes.values())
    return (*buffers, None)
