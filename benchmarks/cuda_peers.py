"""What ours is compared with on a GPU: the official algorithm at three precisions and compiled, the
linear one in PyTorch, and three published cross-entropy kernels that never store the scores.

The published ones know neither banks nor constants: they are given all rows and columns, and the
local part of the gradient is taken. Each is called as its own documentation says.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from benchmarks.cases import TEMPERATURE, Case
from benchmarks.peers import (
    FULL_MATRIX,
    LINEAR_TORCH,
    OURS,
    FullMatrix,
    Peer,
    concatenated,
    full_matrix_loss,
)

PACKAGES = ("cut-cross-entropy", "liger-kernel", "inf-cl")


class Compiled(FullMatrix):
    """The official loss and its backward through torch.compile, shapes static."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        super().__init__(case, device)
        # All banks of a case share one compiled function; those of earlier cases would count
        # towards the limit after which torch silently runs uncompiled.
        torch.compiler.reset()
        self._compiled = torch.compile(full_matrix_loss, dynamic=False, fullgraph=True)

    def summed_loss(self, *tensors: Tensor) -> Tensor:
        return self._compiled(*tensors)


class CutCrossEntropy(FullMatrix):
    """cut-cross-entropy with the gradient filter off: a filtered gradient is not the exact one."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        from cut_cross_entropy import linear_cross_entropy

        super().__init__(case, device)
        self._loss = linear_cross_entropy

    def summed_loss(self, *tensors: Tensor) -> Tensor:
        rows, columns = concatenated(*tensors[:4])
        return self._loss(rows, columns, tensors[4], reduction="sum", filter_eps=None)


class Liger(FullMatrix):
    """liger-kernel's fused linear cross entropy."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        super().__init__(case, device)
        self._loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def summed_loss(self, *tensors: Tensor) -> Tensor:
        rows, columns = concatenated(*tensors[:4])
        return self._loss(columns, rows, tensors[4])


class InfCL(FullMatrix):
    """inf-cl on one device; its head size must divide d and be at most 256."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        from inf_cl import cal_inf_loss

        super().__init__(case, device)
        self._loss, self._head = cal_inf_loss, math.gcd(case.d, 256)
        self._scale = torch.tensor(1 / TEMPERATURE, device=device)

    def summed_loss(self, *tensors: Tensor) -> Tensor:
        queries, passages, banked_queries, banked_passages, targets = tensors
        rows = torch.cat([queries, banked_queries])
        columns = torch.cat([passages, banked_passages]).flatten(0, 1)
        mean = self._loss(rows, columns, targets, scale=self._scale, head_dim=self._head)
        return mean * len(rows)


_NO_BANK = (
    "a bank (the enqueue here is our indexed copy), drift correction, window, id masking; computes "
    "banked x banked scores and the gradients of banked vectors, only to drop them; its time is "
    "quadratic in F"
)
FULL_FP32, FULL_TF32, FULL_BF16 = (
    dataclasses.replace(
        FULL_MATRIX,
        name=f"full matrix {name}",
        what=f"{FULL_MATRIX.what}; {said}",
        dtype=dtype,
        precision=precision,
    )
    for name, said, dtype, precision in (
        ("fp32", "bank, batch and products in float32", "fp32", "highest"),
        ("tf32", "bank and batch in float32, products in tf32", "fp32", "high"),
        ("bf16", "bank, batch and products in bfloat16, softmax in float32", "bf16", "highest"),
    )
)
COMPILED = dataclasses.replace(
    FULL_BF16,
    name="full matrix compiled",
    what=f"{FULL_BF16.what}; through torch.compile (default mode, static shapes)",
    build=Compiled,
)
CCE = Peer(
    "CCE",
    "cut-cross-entropy, linear_cross_entropy(filter_eps=None), its default tile sizes",
    f"{_NO_BANK}; gradients are summed up in bfloat16",
    CutCrossEntropy,
    quadratic_time=True,
    dtype="bf16",
)
LIGER = Peer(
    "Liger",
    "liger-kernel, LigerFusedLinearCrossEntropyLoss(reduction='sum')",
    f"{_NO_BANK}; gradients are summed up in bfloat16; reads back to the host in every step",
    Liger,
    quadratic_time=True,
    dtype="bf16",
)
INF_CL = Peer(
    "Inf-CL",
    "inf-cl, cal_inf_loss on one device, with the largest head size up to 256 that divides d",
    f"{_NO_BANK}; it converts all it is given to float32, so bank and batch are float32 here; "
    "products in tf32",
    InfCL,
    quadratic_time=True,
    dtype="fp32",
)
CUDA_PEERS = (
    OURS,
    FULL_FP32,
    FULL_TF32,
    FULL_BF16,
    COMPILED,
    LINEAR_TORCH,
    CCE,
    LIGER,
    INF_CL,
)
