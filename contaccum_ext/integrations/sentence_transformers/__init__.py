"""Memory banks for sentence-transformers: losses for its trainer, and a part of its checkpoints."""

from contaccum_ext.integrations.sentence_transformers.callback import ContAccumCallback
from contaccum_ext.integrations.sentence_transformers.losses import (
    CachedContAccumLoss,
    ContAccumLoss,
)

__all__ = ["CachedContAccumLoss", "ContAccumCallback", "ContAccumLoss"]
