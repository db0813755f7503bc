"""Imports of what only training and evaluation need."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str) -> Any:
    """Imports a module of the `train` extra.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} could not be imported ({error}); "
            "it comes with: pip install contaccum-ext[train]"
        ) from error
