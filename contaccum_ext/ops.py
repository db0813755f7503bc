"""The raw operators ``torch.ops.contaccum_ext.*`` and their fake kernels.

Schemas and checks are in csrc/ops.cpp. Call them through `contaccum_ext.contaccum_loss`.
"""

from __future__ import annotations

import importlib

import torch

from contaccum_ext.layout import ROW_STATES, accumulation_dtype

importlib.import_module("contaccum_ext._C")  # an empty module: importing it registers the operators

# What of the table has to be computed anew before the loss (enum Rebuild in csrc/params.h).
REBUILD_NOTHING, REBUILD_WINDOW, REBUILD_TABLE = 0, 1, 2

# Rows of the row_state buffer (enum RowState in csrc/params.h).
ROW_LSE, BASE_LSE, FRESH_MAX, FRESH_SUM, OLD_LSE, POSITIVE = range(ROW_STATES)

banked_loss_ = torch.ops.contaccum_ext.banked_loss_.default
scaled_gradients = torch.ops.contaccum_ext.scaled_gradients.default
center_gradients_ = torch.ops.contaccum_ext.center_gradients_.default


def op_runs_on(device: torch.device) -> bool:
    """Whether the loss has a kernel for this kind of device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type, device.type)
    return torch._C._dispatch_has_kernel_for_dispatch_key("contaccum_ext::banked_loss_", key)


@torch.library.register_fake("contaccum_ext::banked_loss_")
def _(queries, passages, passage_ids, companions, bank_queries, *rest):
    acc = accumulation_dtype(bank_queries.dtype)
    with_grad, with_scale_grad = rest[-4:-2]
    n = queries.shape[0] if with_grad else 0
    return (
        queries.new_empty((), dtype=acc),
        queries.new_empty((n, *queries.shape[1:]), dtype=acc),
        queries.new_empty((n, *passages.shape[1:]), dtype=acc),
        queries.new_empty((int(with_scale_grad),), dtype=acc),
    )


@torch.library.register_fake("contaccum_ext::scaled_gradients")
def _(d_queries, d_passages, factor, like):
    return tuple(g.new_empty(g.shape, dtype=like.dtype) for g in (d_queries, d_passages))


@torch.library.register_fake("contaccum_ext::center_gradients_")
def _(gradients, state, over, keep):
    return None
