"""The fused loss as a function: checks in Python, one op, gradients saved by the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from contaccum_ext import ops, validation
from contaccum_ext.bank import DualMemoryBank
from contaccum_ext.layout import BankLayout

_ROW_WEIGHTING = ("local", "all")
_BANKS = ("both", "passages", "queries")
_NO_LAYOUT = BankLayout(1, 1, 1)


def contaccum_loss(
    queries: Tensor,
    passages: Tensor,
    bank: DualMemoryBank | None = None,
    temperature: float = 1.0,
    passage_ids: Tensor | None = None,
    row_weighting: str = "local",
    enqueue: bool = True,
    banks: str = "both",
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
        temperature: positive number; scores are inner products divided by it.
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

    Returns:
        () float32, or float64 for a float64 bank.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, what was expected and what came.
            The bank is then as it was, to the bit. Differentiating twice is a RuntimeError.

    Source: ContAccum, arXiv 2406.12356, equations 5-9.
    """
    _check_arguments(queries, passages, bank, passage_ids)
    scale = 1.0 / validation.positive("temperature", temperature)
    validation.choice("row_weighting", row_weighting, _ROW_WEIGHTING)
    validation.choice("banks", banks, _BANKS)
    columns = passages.unsqueeze(1) if passages.dim() == 2 else passages
    if bank is None:
        buffers, layout, window = _no_bank(queries, columns), _NO_LAYOUT, -1
        rebuild, use_offsets, decay = ops.REBUILD_NOTHING, False, -1.0
    else:
        buffers, layout, window = bank.buffers_in_order(), bank.layout, bank.window_blocks()
        rebuild, use_offsets = bank.pending_rebuild(scale, window), bank.use_offsets
        decay = bank.drift_decay if bank.drift == "mean" else -1.0
    needs_grad = torch.is_grad_enabled() and (queries.requires_grad or columns.requires_grad)
    arguments = (
        queries,
        columns,
        passage_ids,
        *buffers,
        (layout.group, layout.offset_block, layout.block),
        scale,
        window,
        row_weighting == "all",
        banks != "passages",
        banks != "queries",
        use_offsets,
        decay,
        needs_grad,
        enqueue,
        rebuild,
    )
    if needs_grad:
        loss = _BankedLoss.apply(queries, columns, arguments)
    else:
        loss = ops.banked_loss_(*arguments)[0]
    if bank is not None:
        bank.accept(scale, window, passage_ids is not None if enqueue else None)
        if not torch.compiler.is_compiling():
            # C++ kernels do not bump versions: keep autograd's check of saved tensors alive.
            torch.autograd.graph.increment_version(buffers)
    return loss


class _BankedLoss(torch.autograd.Function):
    """The op and its gradients, computed while the bank is as the loss saw it."""

    @staticmethod
    def forward(ctx, queries, passages, arguments):
        loss, d_queries, d_passages = ops.banked_loss_(*arguments)
        ctx.save_for_backward(d_queries, d_passages)
        # Only for their dtype and to connect second derivatives to their error. Not saved: their
        # values are not used, so whoever changes them in place afterwards does no harm.
        ctx.inputs = (queries, passages)
        return loss

    @staticmethod
    def backward(ctx, factor):
        scaled = ops.scaled_gradients(*ctx.saved_tensors, factor, ctx.inputs[0])
        if torch.is_grad_enabled():  # create_graph=True
            scaled = [_SecondDerivative.apply(g, *ctx.inputs) for g in scaled]
        needed = ctx.needs_input_grad[:2]
        return (*(g if n else None for g, n in zip(scaled, needed, strict=True)), None)


class _SecondDerivative(torch.autograd.Function):
    """A gradient whose own derivative is an error instead of silently zero."""

    @staticmethod
    def forward(ctx, grad, queries, passages):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "contaccum_loss: expected to be differentiated once, got a second differentiation: the "
            "gradient is computed in the forward pass and has no graph of its own. "
            "Use contaccum_ext.reference.contaccum_loss for second derivatives."
        )


def _no_bank(queries: Tensor, passages: Tensor) -> tuple[Tensor, ...]:
    """Buffers of a bank without slots, in the order of the schema."""
    shapes = _NO_LAYOUT.buffers(0, passages.shape[1], queries.shape[-1], queries.dtype)
    return tuple(queries.new_zeros(shape, dtype=dtype) for shape, dtype in shapes.values())


def _check_arguments(queries, passages, bank, passage_ids) -> None:
    """What the op cannot say as well: kinds of object, devices, ids given sometimes."""
    if bank is not None:
        validation.instance("bank", bank, DualMemoryBank)
    validation.instance("queries", queries, Tensor)
    device = queries.device if bank is None else bank.cursor.device
    _check_tensor("queries", queries, device)
    _check_tensor("passages", passages, device)
    if passage_ids is not None:
        _check_tensor("passage_ids", passage_ids, device)
    if queries.dim() != 2:
        raise ValueError(f"queries: expected shape (n, d), got {tuple(queries.shape)}")
    if passages.dim() not in (2, 3):
        raise ValueError(
            f"passages: expected shape (n, m, d) or (n, d), got {tuple(passages.shape)}"
        )
    given = passage_ids is not None
    if bank is not None and bank.conflicts_with_ids(given):
        stored, came = ("without", "some") if given else ("with", "none")
        raise ValueError(
            f"passage_ids: expected as in the bank, which was filled {stored} ids, got {came}; "
            "clear the bank to change"
        )


def _check_tensor(name: str, tensor: Tensor, device: torch.device) -> None:
    validation.instance(name, tensor, Tensor)
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
