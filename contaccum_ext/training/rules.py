"""What a setting accepts: expectations in words, and the parsers that enforce them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class ConfigError(ValueError):
    """A setting that does not exist or has a value that cannot be used; the message is one line."""


@dataclass(frozen=True)
class Rule:
    """What a setting accepts: the expectation in words and the parser that enforces it."""

    expectation: str
    parse: Callable[[Any], Any]


def integer(minimum: int) -> Rule:
    """A whole number, also as text."""

    def parse(value: Any) -> int:
        whole = int(value) if isinstance(value, str) else value
        if isinstance(whole, bool) or not isinstance(whole, int) or whole < minimum:
            raise ValueError
        return whole

    return Rule(f"an integer >= {minimum}", parse)


def number(expectation: str, accepts: Callable[[float], bool]) -> Rule:
    """A number that `accepts` likes."""

    def parse(value: Any) -> float:
        # YAML 1.1 reads "2e-4" as a string, so strings are converted here.
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        parsed = float(value)
        if not accepts(parsed):
            raise ValueError
        return parsed

    return Rule(f"a number {expectation}", parse)


def choice(*names: str) -> Rule:
    """One of some words."""

    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError
        return str(value)

    return Rule(f"one of {', '.join(names)}", parse)


def boolean() -> Rule:
    """True or false, no numbers or words for it."""

    def parse(value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    return Rule("true or false", parse)


def or_word(rule: Rule, word: str | None) -> Rule:
    """What a rule accepts, or one word (None is YAML's null)."""

    def parse(value: Any) -> Any:
        return value if value == word else rule.parse(value)

    return Rule(f"{rule.expectation}, or {word or 'null'}", parse)


POSITIVE = number("> 0", lambda value: 0 < value < float("inf"))
FRACTION = number("from 0 to 1", lambda value: 0 <= value <= 1)
NOT_NEGATIVE = number(">= 0", lambda value: 0 <= value < float("inf"))
