"""The training loop and the methods it compares."""

from contaccum_ext.training.checkpoint import Checkpoint, save_checkpoint
from contaccum_ext.training.config import TrainConfig
from contaccum_ext.training.data import TrainingDataError
from contaccum_ext.training.encoder import DualEncoder, Encoder, EncoderError
from contaccum_ext.training.methods import METHODS, Method
from contaccum_ext.training.metrics import DivergedError, UpdateMetrics
from contaccum_ext.training.rules import ConfigError
from contaccum_ext.training.run_directory import RunDirectory, RunError, load_checkpoint
from contaccum_ext.training.trainer import Trainer

__all__ = [
    "METHODS",
    "Checkpoint",
    "ConfigError",
    "DivergedError",
    "DualEncoder",
    "Encoder",
    "EncoderError",
    "Method",
    "RunDirectory",
    "RunError",
    "TrainConfig",
    "Trainer",
    "TrainingDataError",
    "UpdateMetrics",
    "load_checkpoint",
    "save_checkpoint",
]
