"""Training settings: one dataclass, checked key by key."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from contaccum_ext.bank_size import (
    AUTO_SMALL_UPDATES,
    AUTO_UPDATES,
    SMALL_UPDATE,
    WIDEST_MEAN_UPDATES,
    auto_bank_size,
    auto_drift,
    auto_wide_epochs,
    centers_gradients,
)
from contaccum_ext.losses import MAX_SCALE
from contaccum_ext.training.methods import METHODS
from contaccum_ext.training.rules import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    ConfigError,
    Rule,
    boolean,
    choice,
    integer,
    or_word,
)

PRECISIONS = ("fp32", "bf16", "fp16")


def _setting(default: Any, rule: Rule, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"rule": rule, "help": help})


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run, each an argument; `contaccum train --help` explains them.

    Raises:
        ConfigError: a value is not what its setting accepts.
    """

    method: str = _setting(
        "contaccum", choice(*METHODS), "how the examples of one update become gradients"
    )
    local_batch_size: int = _setting(8, integer(1), "n, queries per micro-batch: fits in memory")
    accumulation_steps: int = _setting(16, integer(1), "K, micro-batches per optimizer update")
    bank_size: int | str = _setting(
        "auto",
        or_word(integer(1), "auto"),
        f"slots of the memory banks; auto = {AUTO_UPDATES} * n * K, or {AUTO_SMALL_UPDATES} * n * "
        f"K where n * K < {SMALL_UPDATE}; at most the training set",
    )
    drift: str = _setting(
        "auto",
        choice("auto", "none", "mean", "transport"),
        "correction of banked vectors for the model's movement; transport encodes drift_probes "
        "queries and as many passages once more after every update; auto = none for bank_size up "
        f"to n * K, mean up to {WIDEST_MEAN_UPDATES} * n * K, or {AUTO_SMALL_UPDATES} * n * K "
        f"where n * K < {SMALL_UPDATE}, else transport",
    )
    drift_probes: int = _setting(64, integer(1), "of transport; more follow the model more closely")
    drift_ridge: float = _setting(0.1, POSITIVE, "of transport; more trusts the probes less")
    drift_limit: float = _setting(
        0.3, POSITIVE, "of transport: staleness, in spreads, beyond which slots leave the window"
    )
    center_gradients: bool | str = _setting(
        "auto",
        or_word(boolean(), "auto"),
        "let gradients of passages sum to zero over an update, as in-batch ones do over a batch; "
        "auto = with transport, and in banks that are not too old for it without",
    )
    wide_epochs: int | str = _setting(
        "auto",
        or_word(integer(0), "auto"),
        "epochs in which more slots than those of bank_size=auto take part; auto = with transport "
        "3, or 0 where row_weighting=all, else all",
    )
    row_weighting: str = _setting(
        "local", choice("local", "all"), "weight of a loss row: 1/n, or the paper's 1/(n+filled)"
    )
    bank_query: bool = _setting(True, boolean(), "banked queries are loss rows")
    bank_passage: bool = _setting(
        True, boolean(), "banked passages are negatives of queries other than their own"
    )
    bank_hard_negatives: bool = _setting(
        True, boolean(), "bank hard negatives too; without them the loss is slower plain PyTorch"
    )
    clear_bank_every_update: bool = _setting(
        False, boolean(), "forget the banks when an update begins: no past encoder"
    )
    bank_warmup_updates: int = _setting(
        0, integer(0), "updates during which the banks fill and are not yet used"
    )
    temperature: float = _setting(0.05, POSITIVE, "scores are divided by it")
    learn_temperature: bool = _setting(
        False, boolean(), "begin with `temperature` and learn it; the scale, 1 / it, stays <= 100"
    )
    symmetric: bool = _setting(
        False, boolean(), "mean of the loss and that of positives as rows, queries as columns"
    )
    pooling: str = _setting("mean", choice("mean", "cls"), "how token vectors become one vector")
    normalize: bool = _setting(True, boolean(), "scale embeddings to length 1 (cosine scores)")
    shared_encoder: bool = _setting(False, boolean(), "one encoder for queries and passages")
    layers: int | None = _setting(
        None, or_word(integer(1), None), "keep only the first layers of the encoder"
    )
    hard_negatives: int = _setting(1, integer(0), "hard negatives per query, drawn every epoch")
    mask_false_negatives: bool = _setting(
        True, boolean(), "leave a row's own positive passage out of its negatives"
    )
    query_max_length: int = _setting(64, integer(4), "tokens kept of a query")
    passage_max_length: int = _setting(256, integer(4), "tokens kept of a passage")
    learning_rate: float = _setting(5e-5, POSITIVE, "AdamW peak learning rate")
    weight_decay: float = _setting(0.01, NOT_NEGATIVE, "not applied to biases and layer norms")
    warmup_ratio: float = _setting(0.1, FRACTION, "share of the updates with rising learning rate")
    warmup_updates: int | None = _setting(
        None, or_word(integer(0), None), "updates with rising learning rate, instead of their share"
    )
    max_grad_norm: float = _setting(2.0, POSITIVE, "gradients are clipped to this norm")
    on_nonfinite: str = _setting(
        "stop",
        choice("stop", "skip"),
        "an update that is not finite ends the run, or changes nothing (keeps a copy of the banks)",
    )
    epochs: int = _setting(1, integer(1), "passes over the training queries")
    max_updates: int | None = _setting(
        None, or_word(integer(1), None), "optimizer updates, instead of whole epochs"
    )
    seed: int = _setting(1, integer(0), "fixes data order, negatives, dropout")
    precision: str = _setting(
        "fp32", choice(*PRECISIONS), "bf16, fp16: encode under autocast; fp16 scales the loss"
    )
    gradient_checkpointing: bool = _setting(
        False, boolean(), "keep no activations inside the layers, compute them again: less memory"
    )
    compile: bool = _setting(False, boolean(), "compile the encoders with torch.compile")
    device: str = _setting("auto", choice("auto", "cpu", "cuda"), "where to train")
    checkpoint_every: int = _setting(
        500, integer(0), "updates between checkpoints; 0: only the end"
    )
    keep_checkpoints: int = _setting(2, integer(1), "newest intermediate checkpoints kept")
    diagnostics_every: int = _setting(
        0, integer(0), "updates between looks at how batches score the bank; 0: none"
    )
    tensorboard: bool = _setting(False, boolean(), "write the metrics for TensorBoard too")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            rule: Rule = field.metadata["rule"]
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, rule.parse(value))
            except (ValueError, TypeError):
                raise ConfigError(
                    f"{field.name}: expected {rule.expectation}, got {value!r}"
                ) from None
        banks = METHODS[self.method].banks(self)  # refuses a combination that leaves no bank
        self._check_together(banks)

    def _check_together(self, banks: str | None) -> None:
        """What each value is right for, and all of them are not."""
        if self.learn_temperature and self.temperature < 1 / MAX_SCALE:
            raise ConfigError(
                f"temperature: expected at least {1 / MAX_SCALE:g} where learn_temperature=true, "
                f"got {self.temperature:g}"
            )
        if self.symmetric and banks in ("queries", "passages"):
            raise ConfigError(
                f"symmetric: expected false where only one side is banked (banked {banks}), "
                f"got true"
            )
        left_out = banks and self.hard_negatives and not self.bank_hard_negatives
        for name in ("learn_temperature", "symmetric"):
            if left_out and getattr(self, name):
                raise ConfigError(
                    f"{name}: expected false where bank_hard_negatives=false, got true"
                )

    @property
    def update_size(self) -> int:
        """Examples per optimizer update, n * K."""
        return self.local_batch_size * self.accumulation_steps

    def bank_capacity(self, training_queries: int) -> int:
        """Slots of the bank for a training set of this many queries."""
        if isinstance(self.bank_size, int):
            return self.bank_size
        return auto_bank_size(self.update_size, training_queries)

    def drift_for(self, capacity: int) -> str:
        """What `drift` means for a bank of this many slots: "none", "mean" or "transport"."""
        if self.drift != "auto":
            return self.drift
        if self.clear_bank_every_update:
            return "mean"  # nothing in the bank is older than the weights
        return auto_drift(capacity, self.update_size)

    def centers_for(self, capacity: int) -> bool:
        """What `center_gradients` means for a bank of this many slots."""
        if self.center_gradients != "auto":
            return bool(self.center_gradients)
        return self.clear_bank_every_update or centers_gradients(
            self.drift_for(capacity), capacity, self.update_size
        )

    def wide_epochs_for(self, capacity: int) -> int | None:
        """What `wide_epochs` means for a bank of this many slots; None for all epochs."""
        if isinstance(self.wide_epochs, int):
            return self.wide_epochs
        return auto_wide_epochs(self.drift_for(capacity), self.row_weighting)

    def to_dict(self) -> dict[str, Any]:
        """Plain values by key, as `from_mapping` reads them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "settings") -> TrainConfig:
        """Build from a mapping; `source` names where it came from in errors.

        Raises:
            ConfigError: unknown key (the nearest known one is suggested) or unusable value.
        """
        values = _with_precision(values, source)
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
                raise ConfigError(f"{source}: unknown key {key!r}{hint}")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None


def _with_precision(values: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Settings of 0.1 had `bf16: true`."""
    if "bf16" not in values:
        return values
    others = {key: value for key, value in values.items() if key != "bf16"}
    words = {True: "bf16", False: "fp32"}
    if "precision" in values or not isinstance(values["bf16"], bool):
        raise ConfigError(f"{source}: bf16: expected 'precision: bf16' instead, got bf16 too")
    return others | {"precision": words[values["bf16"]]}
