"""One helper per kind of argument: each names it, says what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def count(name: str, value: Any) -> int:
    """Return an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def number(name: str, value: Any) -> float:
    """Return an int or float as float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def positive(name: str, value: Any) -> float:
    """Return a positive number that, like its inverse, is finite."""
    value = number(name, value)
    if not (value > 0 and math.isfinite(value) and math.isfinite(1.0 / value)):
        raise ValueError(f"{name}: expected a positive finite number with an inverse, got {value}")
    return value


def choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """Return one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
    return value


def instance(name: str, value: Any, kind: type) -> Any:
    """Return an object of a class."""
    if not isinstance(value, kind):
        wanted = "tensor" if kind is Tensor else kind.__name__
        raise TypeError(f"{name}: expected a {wanted}, got {type(value).__name__}")
    return value
