"""What to expect of a bank much older than one update."""

from __future__ import annotations

from contaccum_ext.bank_size import width_warnings
from contaccum_ext.training.config import TrainConfig
from contaccum_ext.training.methods import METHODS


def bank_warnings(config: TrainConfig, capacity: int) -> list[str]:
    """What to expect of a bank that is wider than what is safe everywhere, in words.

    Args:
        config: settings of the run; methods without a bank never warn.
        capacity: slots of the bank.
    """
    if METHODS[config.method].banks(config) is None or config.clear_bank_every_update:
        return []
    return width_warnings(
        capacity,
        config.update_size,
        config.drift_for(capacity),
        centered=config.centers_for(capacity),
    )
