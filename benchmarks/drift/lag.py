"""When what banked vectors are among themselves follows their moves, as an op's table does."""

from __future__ import annotations


class Lag:
    """Says at the beginning of an update whether a rebuild is due.

    Args:
        update_size: slots that an update writes.
        every: updates from one rebuild to the next.
        parts: instead, one as soon as one of so many parts of the filled slots is new.
    """

    def __init__(self, update_size: int, every: int = 1, parts: int | None = None) -> None:
        self.update_size, self.every, self.parts = update_size, every, parts
        self._last = 0

    def __bool__(self) -> bool:
        """Whether there may be updates without a rebuild."""
        return self.every > 1 or self.parts is not None

    def due(self, update: int, filled: int) -> bool:
        """Whether to rebuild before update `update`, once for each; `filled` slots are there."""
        if self.parts is None:
            return update % self.every == 0
        new = (update - self._last) * self.update_size
        if new * self.parts < filled:
            return False
        self._last = update
        return True
