"""How many slots a bank should have: what `auto` means, and when to warn.

The measure is the update, the n * K examples between two steps of the optimizer: a bank of u
updates holds vectors of models up to u steps old, whatever its number of slots.
"""

from __future__ import annotations

AUTO_BANK_UPDATES = 8
WIDEST_CORRECTED_BANK_UPDATES = 16
WIDEST_PLAIN_BANK_UPDATES = 2
# No limit has been found; docs/drift.md says how wide the banks were that have been measured.
WIDEST_TRANSPORTED_BANK_UPDATES = 128


def auto_bank_size(update_size: int, training_queries: int | None = None) -> int:
    """Slots of an automatic bank: eight updates' worth, at most one for each training query.

    Args:
        update_size: examples per optimizer update, n * K.
        training_queries: size of the training set; None if unknown.
    """
    slots = AUTO_BANK_UPDATES * update_size
    return slots if training_queries is None else min(slots, training_queries)


def mean_decay(micro_batches: int, predicted: bool = False) -> float:
    """Decay per micro-batch of the running means that ``drift="mean"`` keeps.

    They lag by decay / (1 - decay) micro-batches, and a mean that lags by more than about an update
    is itself what a model learns to tell age by (docs/drift.md): so the lag is 9/16 of an update.
    Where `BankTransport` moves the means too they do not lag, and may be averages over more: nine
    micro-batches, but at most 9/4 updates.

    Args:
        micro_batches: (count) scored against the bank in an optimizer update, K.
        predicted: the means are those of a transported bank.

    Returns:
        (number) for ``DualMemoryBank(drift_decay=...)``.
    """
    average = 9 / 16 * micro_batches
    if predicted:
        average = max(average, min(9.0, 9 / 4 * micro_batches))
    return average / (1 + average)


def auto_drift(capacity: int, update_size: int) -> str:
    """The correction that suits a bank: "mean" for some updates' worth of slots, else "transport".

    Args:
        capacity: slots of the bank.
        update_size: examples per optimizer update, n * K.
    """
    return "mean" if capacity <= AUTO_BANK_UPDATES * update_size else "transport"


def width_warnings(capacity: int, update_size: int, drift: str) -> list[str]:
    """What to expect of a bank that is too wide for its drift correction, in words.

    Args:
        capacity: slots of the bank.
        update_size: examples per optimizer update, n * K.
        drift: "none", "mean" or "transport".
    """
    updates = capacity / update_size
    age = f"bank_size {capacity} keeps vectors up to {updates:.0f} updates old"
    if drift == "none" and updates > WIDEST_PLAIN_BANK_UPDATES:
        return [
            f"{age} with drift=none: the model can lower its loss by moving new vectors away from "
            f"old ones instead of learning content, and retrieval quality may collapse; set "
            f"drift=mean, or bank_size to at most {WIDEST_PLAIN_BANK_UPDATES * update_size}"
        ]
    if drift == "transport":
        if updates <= WIDEST_TRANSPORTED_BANK_UPDATES:
            return []
        return [
            f"{age}: drift=transport has not been tried over so many updates; compare with a "
            f"bank_size of at most {WIDEST_TRANSPORTED_BANK_UPDATES * update_size}"
        ]
    if updates > WIDEST_CORRECTED_BANK_UPDATES:
        return [
            f"{age}: drift=mean corrects the shift of the mean only, and over so many updates the "
            f"rest of the drift costs retrieval quality; set drift=transport, or bank_size to at "
            f"most {WIDEST_CORRECTED_BANK_UPDATES * update_size} "
            f"(auto uses {AUTO_BANK_UPDATES * update_size}), or lower learning_rate"
        ]
    return []
