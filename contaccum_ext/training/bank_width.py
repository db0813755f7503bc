"""What to expect of a bank much older than one update."""

from __future__ import annotations

from contaccum_ext.training.config import AUTO_BANK_UPDATES, TrainConfig
from contaccum_ext.training.methods import METHODS

# In slots filled during one optimizer update (n * K).
WIDEST_CORRECTED_BANK_UPDATES = 16
WIDEST_PLAIN_BANK_UPDATES = 2


def bank_warnings(config: TrainConfig, capacity: int) -> list[str]:
    """What to expect of a bank that is too wide for its drift correction, in words.

    Args:
        config: settings of the run; methods without a bank never warn.
        capacity: slots of the bank.
    """
    if METHODS[config.method].banks(config) is None or config.clear_bank_every_update:
        return []
    updates = capacity / config.update_size
    age = f"bank_size {capacity} keeps vectors up to {updates:.0f} updates old"
    if config.drift == "none" and updates > WIDEST_PLAIN_BANK_UPDATES:
        safe = WIDEST_PLAIN_BANK_UPDATES * config.update_size
        return [
            f"{age} with drift=none: the model can lower its loss by moving new vectors away from "
            f"old ones instead of learning content, and retrieval quality may collapse; set "
            f"drift=mean, or bank_size to at most {safe}"
        ]
    if updates > WIDEST_CORRECTED_BANK_UPDATES:
        safe = WIDEST_CORRECTED_BANK_UPDATES * config.update_size
        return [
            f"{age}: drift=mean corrects the shift of the mean only, and over so many updates the "
            f"rest of the drift costs retrieval quality; set bank_size to at most {safe} "
            f"(auto uses {AUTO_BANK_UPDATES * config.update_size}), or lower learning_rate"
        ]
    return []
