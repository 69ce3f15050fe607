"""What became of an adapter or of an optimizer's state, for people and programs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Carried:
    """The result of `carry_adapter` and `carry_optimizer`.

    Attributes:
        what: `adapter` or `optimizer`.
        source: the folder or file that was read.
        destination: what was written.
        model: class of the untouched model.
        plan_hash: of the plan.
        reverted: whether the way back was gone.
        before: tensors of the model that were held, before.
        after: and after; an adapter's with their ranks.
        unchanged: how many of them the plan does not concern.
        rounded: tensors whose values are equal up to rounding only; those of all others are the same bits.
        notes: what else is worth knowing.
    """

    what: str
    source: str
    destination: str
    model: str
    plan_hash: str
    reverted: bool
    before: tuple[str, ...]
    after: tuple[str, ...]
    unchanged: int
    rounded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether no number was rounded."""
        return not self.rounded

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "exact": self.exact}

    def __str__(self) -> str:
        way = "carried back" if self.reverted else "carried"
        numbers = f"{len(self.before)} tensors before, {len(self.after)} after, {self.unchanged} of them unchanged"
        exact = "bit for bit" if self.exact else f"{len(self.rounded)} rounded once: {_some(self.rounded)}"
        lines = [f"{self.what} {way} across plan {self.plan_hash[:12]} of {self.model}", numbers, exact, *self.notes]
        return "\n  ".join(lines)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f", … ({len(names)})" if len(names) > 3 else "")
