"""How many slots a bank should have: what `auto` means, and when to warn.

The measure is the update, the n * K examples between two steps of the optimizer: a bank of u
updates holds vectors of models up to u steps old, whatever its number of slots.
"""

from __future__ import annotations

from typing import Any

# An automatic bank has so many updates: with probes and centered gradients four gained on a plain
# bank of one in every setting that was tried (docs/drift.md). Where an update has few queries,
# encoding probes after it costs more than they gain.
AUTO_UPDATES = 4
AUTO_SMALL_UPDATES = 8
# Epochs in which more than that takes part: where training goes on and overfits, more negatives
# overfit more. Where the gradient shrinks with every slot, more than that loses at once.
WIDE_EPOCHS = 3
FEW_BATCHES = 8  # micro-batches; an update with fewer has few
SMALL_UPDATE = 64  # queries; an update with fewer is small
WIDEST_MEAN_UPDATES = 2  # of automatic drift correction; eight of small updates
WIDEST_CORRECTED_BANK_UPDATES = 8
WIDEST_PLAIN_BANK_UPDATES = 2
# No limit has been found; docs/drift.md says how wide the banks were that have been measured.
WIDEST_TRANSPORTED_BANK_UPDATES = 128


def auto_bank_size(update_size: int, training_queries: int | None = None) -> int:
    """Slots of an automatic bank: four updates' worth, at most a slot a query.

    Eight where an update has fewer than 64 queries.

    Args:
        update_size: examples per optimizer update, n * K.
        training_queries: size of the training set; None if unknown.
    """
    updates = AUTO_SMALL_UPDATES if update_size < SMALL_UPDATE else AUTO_UPDATES
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
    """The correction that suits a bank: the further old vectors are off, the more is done.

    "none" up to an update's worth of slots, where the mean's shift gains nothing and once lost a
    little; "mean" up to two, or eight small ones; "transport" beyond.

    Args:
        capacity: slots of the bank.
        update_size: examples per optimizer update, n * K.
    """
    if capacity <= update_size:
        return "none"
    small = update_size < SMALL_UPDATE
    widest = AUTO_SMALL_UPDATES if small else WIDEST_MEAN_UPDATES
    return "mean" if capacity <= widest * update_size else "transport"


def centers_gradients(drift: str, capacity: int, update_size: int) -> bool:
    """Whether centered gradients suit a bank, as `contaccum_loss(center_over=K)` gives them.

    They keep a model from moving all new vectors away from old ones. Where old ones can be told in
    other ways too, it then learns these: banks of eight updates with the mean's shift alone, or
    without any correction, lose more by them (docs/drift.md).

    Args:
        drift: "none", "mean" or "transport".
        capacity: slots of the bank.
        update_size: examples per optimizer update, n * K.
    """
    widest = {"none": 1, "mean": WIDEST_MEAN_UPDATES}
    return drift == "transport" or capacity <= widest[drift] * update_size


def auto_wide_epochs(drift: str, row_weighting: str) -> int | None:
    """Epochs in which a bank beyond the automatic size is used whole; None: in all.

    Args:
        drift: "none", "mean" or "transport"; only with the last there is a limit.
        row_weighting: "local", or "all" for row weights of 1/(n + F).
    """
    if drift != "transport":
        return None
    return WIDE_EPOCHS if row_weighting == "local" else 0


def width_warnings(capacity: int, update_size: int, drift: str, *, centered: bool) -> list[str]:
    """What to expect of a bank that is wider than what is safe everywhere, in words.

    Args:
        capacity: slots of the bank.
        update_size: examples per optimizer update, n * K.
        drift: "none", "mean" or "transport".
        centered: gradients are centered.
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
    wide = updates > AUTO_UPDATES and update_size >= SMALL_UPDATE
    if drift == "transport" and wide and not centered:
        return [
            f"{age}: without centered gradients such banks gained up to 0.04 NDCG@10 over one of "
            f"an update in long training, and lost up to 0.03 in short, slow or overfitting "
            f"training (docs/drift.md); set center_gradients, or bank_size=auto"
        ]
    if drift == "mean" and updates > WIDEST_CORRECTED_BANK_UPDATES:
        return [
            f"{age}: drift=mean corrects the shift of the mean only, and over so many updates the "
            f"rest of the drift costs retrieval quality; set drift=transport, or bank_size to at "
            f"most {WIDEST_CORRECTED_BANK_UPDATES * update_size}, or lower learning_rate"
        ]
    if drift == "mean" and auto_drift(capacity, update_size) == "transport":
        return [
            f"{age}: drift=mean corrects the shift of the mean only; such banks lost up to 0.07 "
            f"NDCG@10 after 40 updates (docs/drift.md); set drift=auto, or bank_size to at most "
            f"{WIDEST_MEAN_UPDATES * update_size}"
        ]
    return []
