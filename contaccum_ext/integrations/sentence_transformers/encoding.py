"""The encoder inside of what a loss holds: how to call it beside a training step, unnoticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import adaptive_layer, matryoshka
from torch import nn

Forward = Callable[[dict[str, Any]], dict[str, Any]]


def encoder_of(model: nn.Module) -> SentenceTransformer:
    """The encoder in a model that may be wrapped for several processes or compiled.

    Raises:
        TypeError: there is none.
    """
    for part in model.modules():
        if isinstance(part, SentenceTransformer):
            return part
    raise TypeError(f"model: expected a SentenceTransformer, got {type(model).__name__}")


def own_forward(encoder: SentenceTransformer) -> Forward:
    """What encodes a batch, without the losses that listen to it.

    MatryoshkaLoss and AdaptiveLayerLoss put themselves in the place of ``forward`` while a batch
    lasts, and would take probes for a column of it. The Trainer's mixed precision is in ``forward``
    too, and stays.
    """
    forward: Any = encoder.forward
    while isinstance(forward, (matryoshka.ForwardDecorator, adaptive_layer.ForwardDecorator)):
        forward = forward.fn
    return forward


def matryoshka_around(model: nn.Module) -> matryoshka.ForwardDecorator | None:
    """The part of MatryoshkaLoss that shortens the vectors of the batch in hand."""
    forward: Any = model.forward
    while isinstance(forward, adaptive_layer.ForwardDecorator):
        forward = forward.fn
    return forward if isinstance(forward, matryoshka.ForwardDecorator) else None


@contextmanager
def without_training(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout; every module is then in the mode in which it was.

    Modes are set module by module: ``eval()`` and ``train()`` do more in some modules, such as
    merging adapters, and would also wake what is to stay frozen in ``eval()``.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
