"""How many slots a bank should have: what `auto` means, and when to warn.

The measure is the update, the n * K examples between two steps of the optimizer: a bank of u
updates holds vectors of models up to u steps old, whatever its number of slots.
"""

from __future__ import annotations

from typing import Any

# An automatic bank has so many updates: with the mean's shift, two lost to a plain bank of one in
# no setting that was tried (docs/drift.md). With few batches in an update that was not measured;
# four, followed by probes, were. Where an update has few queries, encoding probes after it costs
# more than they gain.
AUTO_UPDATES = 2
AUTO_FEW_UPDATES = 4
AUTO_SMALL_UPDATES = 8
FEW_BATCHES = 8  # micro-batches; an update with fewer has few
SMALL_UPDATE = 64  # queries; an update with fewer is small
WIDEST_MEAN_UPDATES = 2  # of automatic drift correction; eight of small updates
WIDEST_CORRECTED_BANK_UPDATES = 8
WIDEST_PLAIN_BANK_UPDATES = 2
# No limit has been found; docs/drift.md says how wide the banks were that have been measured.
WIDEST_TRANSPORTED_BANK_UPDATES = 128


def auto_bank_size(
    update_size: int, training_queries: int | None = None, micro_batches: int | None = None
) -> int:
    """Slots of an automatic bank: two updates' worth, at most a slot a query.

    Four where an update has fewer than eight micro-batches, eight where it has fewer than 64
    queries.

    Args:
        update_size: examples per optimizer update, n * K.
        training_queries: size of the training set; None if unknown.
        micro_batches: (count) scored against the bank in an update, K; None if unknown: few.
    """
    updates = AUTO_UPDATES
    if update_size < SMALL_UPDATE:
        updates = AUTO_SMALL_UPDATES
    elif has_few_batches(micro_batches):
        updates = AUTO_FEW_UPDATES
    slots = updates * update_size
    return slots if training_queries is None else min(slots, training_queries)


def has_few_batches(micro_batches: int | None) -> bool:
    """Whether an update has, or may have, few micro-batches."""
    return micro_batches is None or micro_batches < FEW_BATCHES


def mean_decay(micro_batches: int, predicted: bool = False) -> float:
    """Decay per micro-batch of the running means that ``drift="mean"`` keeps.

    They lag by decay / (1 - decay) micro-batches, and a mean that lags by more than about an update
    is itself what a model learns to tell age by (docs/drift.md): so the lag is 9/16 of an update.
    Where `BankTransport` moves the means too they do not lag, and are averages over two updates.

    Args:
        micro_batches: (count) scored against the bank in an optimizer update, K.
        predicted: the means are those of a transported bank.

    Returns:
        (number) for ``DualMemoryBank(drift_decay=...)``.
    """
    average = (2 if predicted else 9 / 16) * micro_batches
    return average / (1 + average)


def anticipates(micro_batches: int | None) -> bool:
    """Whether running means that nothing predicts must see a batch before its own loss does.

    In an update of few batches, or of one, means that wait for it lag by a good part of the update.

    Args:
        micro_batches: (count) scored against the bank in an optimizer update, K; None if unknown.
    """
    return has_few_batches(micro_batches)


def correction_options(drift: str, micro_batches: int | None) -> dict[str, Any]:
    """What of `DualMemoryBank` a correction stands for: drift and anticipate.

    Args:
        drift: "none", "mean" or "transport".
        micro_batches: (count) scored against the bank in an optimizer update; None if unknown.
    """
    return {
        "drift": "mean" if drift == "transport" else drift,
        "anticipate": drift == "mean" and anticipates(micro_batches),
    }


def auto_drift(capacity: int, update_size: int) -> str:
    """The correction that suits a bank: "mean" for a few updates' worth of slots, else "transport".

    Args:
        capacity: slots of the bank.
        update_size: examples per optimizer update, n * K.
    """
    small = update_size < SMALL_UPDATE
    widest = AUTO_SMALL_UPDATES if small else WIDEST_MEAN_UPDATES
    return "mean" if capacity <= widest * update_size else "transport"


def width_warnings(capacity: int, update_size: int, drift: str) -> list[str]:
    """What to expect of a bank that is wider than what is safe everywhere, in words.

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
            f"drift=auto, or bank_size to at most {WIDEST_PLAIN_BANK_UPDATES * update_size}"
        ]
    if drift == "transport" and updates > WIDEST_TRANSPORTED_BANK_UPDATES:
        return [
            f"{age}: drift=transport has not been tried over so many updates; compare with a "
            f"bank_size of at most {WIDEST_TRANSPORTED_BANK_UPDATES * update_size}"
        ]
    # In small updates wide banks lost nothing where they were tried.
    if drift == "transport" and updates > AUTO_FEW_UPDATES and update_size >= SMALL_UPDATE:
        return [
            f"{age}: with drift=transport such banks gained up to 0.04 NDCG@10 over one of an "
            f"update in long training, and lost up to 0.03 in short, slow or overfitting training "
            f"(docs/drift.md); bank_size=auto lost nothing"
        ]
    if drift == "mean" and updates > WIDEST_CORRECTED_BANK_UPDATES:
        return [
            f"{age}: drift=mean corrects the shift of the mean only, and over so many updates the "
            f"rest of the drift costs retrieval quality; set drift=transport, or bank_size to at "
            f"most {WIDEST_CORRECTED_BANK_UPDATES * update_size}, or lower learning_rate"
        ]
    if drift == "mean" and auto_drift(capacity, update_size) != "mean":
        return [
            f"{age}: drift=mean corrects the shift of the mean only; such banks lost up to 0.07 "
            f"NDCG@10 after 40 updates (docs/drift.md); set drift=auto, or bank_size to at most "
            f"{WIDEST_MEAN_UPDATES * update_size}"
        ]
    return []
