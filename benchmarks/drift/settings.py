"""What one run is: all its settings, their hash, and the name a table gives them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

METHODS = ("bank", "gradaccum", "inbatch")
STARTS = ("pretrained", "random")
TOWERS = ("separate", "shared")
SIMILARITIES = ("cosine", "dot")
WEIGHTINGS = ("local", "all")


@dataclass(frozen=True)
class Setting:
    """One run. The defaults are the central setting of the experiments.

    Args:
        data: name of a prepared data set.
        seed: of the order, the drawn negatives, dropout and a random start.
        method: "gradaccum" and "inbatch" have no bank; "inbatch" scores an update as one batch.
        bank: capacity in slots, a multiple of n.
        correction: a name of `methods.CORRECTIONS`: what happens to old banked vectors.
        options: of the correction; `symmetric`, a loss in both directions, without a bank too.
        scale: of the scores, 1/temperature.
        n: queries of a micro-batch; accumulation: micro-batches of an update.
        negatives: BM25 negatives per query, kept in the bank.
        row_weighting: "local" weighs each row 1/n, "all" 1/(n + F).
        mask: leave false negatives out by passage number.
        updates: stop there whatever `epochs` says; 0 means no limit. The learning rate follows.
        dropout: None takes the model's.
    """

    data: str
    seed: int = 1
    method: str = "bank"
    bank: int = 0
    correction: str = "none"
    options: dict[str, Any] = field(default_factory=dict)
    layers: int = 2
    start: str = "pretrained"
    towers: str = "separate"
    similarity: str = "cosine"
    scale: float = 20.0
    n: int = 8
    accumulation: int = 16
    negatives: int = 1
    epochs: int = 3
    updates: int = 0
    learning_rate: float = 2e-4
    warmup: float = 0.1  # share of the updates
    weight_decay: float = 0.01
    clip: float = 2.0
    row_weighting: str = "local"
    mask: bool = True
    dropout: float | None = None
    query_length: int = 64  # tokens
    passage_length: int = 256  # tokens
    bf16: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", METHODS),
            ("start", STARTS),
            ("towers", TOWERS),
            ("similarity", SIMILARITIES),
            ("row_weighting", WEIGHTINGS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        if (self.method == "bank") != (self.bank > 0):
            raise ValueError(f"bank: expected slots with method bank alone, got {self.bank}")
        if self.bank % self.n:
            raise ValueError(f"bank: expected a multiple of n = {self.n}, got {self.bank}")

    @property
    def update_size(self) -> int:
        """Queries of an update."""
        return self.n * self.accumulation

    @property
    def key(self) -> str:
        """The hash by which a finished run is found again."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """The setting in a table: method, bank and correction, then what is not central.

        Data set and seed are left out: a table has a part for each set and averages over seeds.
        """
        words = [self.method]
        if self.method == "bank":
            words += [str(self.bank), self.correction]
        words += [f"{k}={_short(v)}" for k, v in sorted(self.options.items())]
        return " ".join([*words, self.varied]).strip()

    @property
    def varied(self) -> str:
        """What is not central beside method, bank and correction; who shares it is compared."""
        central = Setting(self.data, method="gradaccum")
        told = {"data", "seed", "method", "bank", "correction", "options"}
        return " ".join(
            f"{name}={_short(value)}"
            for name, value in asdict(self).items()
            if name not in told and value != getattr(central, name)
        )

    def without_seed(self) -> str:
        """The hash of all settings but the seed: runs that differ by chance alone."""
        return replace(self, seed=0).key


def from_row(values: dict[str, Any]) -> Setting:
    """The setting of a row of results."""
    return Setting(**values)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
