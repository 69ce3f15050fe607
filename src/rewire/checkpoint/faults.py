"""Collects everything that is wrong with a checkpoint, so that it is reported at once."""

from __future__ import annotations

from pathlib import Path

from rewire.checkpoint.strict_json import shown
from rewire.errors import CheckpointError, Issue

_MOST_LINES = 1000  # a hostile header can have a million faults; all of them are in the error's `issues`


class Faults:
    """The faults found so far, each with its file and tensor, and what to do about them."""

    def __init__(self) -> None:
        self.issues: list[Issue] = []
        self._advice: dict[str, None] = {}

    def add(self, message: str, *, file: str = "", tensor: str | None = None, advice: str = "") -> None:
        """Notes a fault. The same advice for many faults is printed once."""
        where = "" if tensor is None else f"tensor {shown(tensor)}"
        self.issues.append(Issue(message, file=shown(file)[1:-1] if file else None, where=where))
        if advice:
            self._advice[advice] = None

    def check(self, folder: Path) -> None:
        """Raises a `CheckpointError` that lists every fault, if there is any."""
        if not self.issues:
            return
        count = "a fault" if len(self.issues) == 1 else f"{len(self.issues):,} faults"
        lines = [f"the checkpoint {folder} has {count}; nothing was written", *map(_line, self.issues[:_MOST_LINES])]
        if len(self.issues) > _MOST_LINES:
            lines.append(f"  … and {len(self.issues) - _MOST_LINES:,} more (the error's `issues` has them all)")
        raise CheckpointError("\n".join([*lines, *self._advice]), tuple(self.issues))


def _line(issue: Issue) -> str:
    return f"  {issue}"
