"""Where the metrics of a run are written: metrics.jsonl and, if wanted, TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

from contaccum_ext.files import flush
from contaccum_ext.training.rules import ConfigError

if TYPE_CHECKING:
    from contaccum_ext.training.metrics import UpdateMetrics
    from contaccum_ext.training.run_directory import RunDirectory

TENSORBOARD_DIRECTORY = "tensorboard"


class RunLog:
    """Writes a line per update and keeps those of the updates already done.

    Args:
        run: metrics.jsonl stands there, and tensorboard/.
        done: updates done; what was written of later ones is dropped.
        tensorboard: write event files too.

    Raises:
        ConfigError: TensorBoard is wanted and not installed.
    """

    def __init__(self, run: RunDirectory, done: int, tensorboard: bool) -> None:
        self._run = run
        self._writer: Any = None
        if tensorboard:
            self._writer = _summary_writer(str(run.path / TENSORBOARD_DIRECTORY), done)
        self._lines = run.open_log(done)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lines.close()
        if self._writer is not None:
            self._writer.close()

    def write(self, metrics: UpdateMetrics) -> None:
        """Add the line of an update."""
        values = asdict(metrics)
        self._lines.write(json.dumps(values) + "\n")
        self._lines.flush()
        if self._writer is not None:
            for name, value in _scalars(values).items():
                self._writer.add_scalar(name, value, metrics.update)

    def flush(self) -> None:
        """Wait until all lines are on the disk."""
        flush(self._run.metrics)


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """What can be drawn over the updates; a list by its indices."""
    scalars: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            scalars |= {f"{name}/{index}": item for index, item in enumerate(value)}
        elif value is not None and name != "update":
            scalars[name] = value
    return scalars


def _summary_writer(directory: str, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "tensorboard: expected TensorBoard to be installed "
            '(pip install "contaccum-ext[tensorboard]"), got none'
        ) from None
    return SummaryWriter(directory, purge_step=done + 1)
