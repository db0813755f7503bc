"""Training settings as text: read from YAML and the command line, told in help."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from contaccum_ext.training.config import TrainConfig
from contaccum_ext.training.rules import ConfigError, Rule


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings of a YAML file, unchecked.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, got {type(values).__name__}")
    return values


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`["epochs=3", "learning_rate=2e-4"]` as a mapping; values are read as YAML.

    Raises:
        ConfigError: an entry is not of the form key=value.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set: expected key=value, got {assignment!r}")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set: {key.strip()}: cannot read the value {text!r}") from None
    return values


def field_help() -> list[str]:
    """One line per setting: name, default, what it accepts, what it means."""
    lines = []
    for field in dataclasses.fields(TrainConfig):
        # JSON writes true, false and null as YAML does.
        default = field.default if isinstance(field.default, str) else json.dumps(field.default)
        rule: Rule = field.metadata["rule"]
        lines.append(f"{field.name}={default}: {field.metadata['help']} ({rule.expectation})")
    return lines
