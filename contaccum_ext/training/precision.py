"""Mixed precision: what encoders compute in, and how fp16 gradients are kept from vanishing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from contaccum_ext.training.config import TrainConfig

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(config: TrainConfig) -> torch.dtype | None:
    """What encoders compute in under autocast; None for fp32 throughout."""
    return _AUTOCAST.get(config.precision)


def gradient_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss of fp16 runs, and does nothing in others."""
    return torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
