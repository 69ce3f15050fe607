"""What is found about a model, as frozen records that go to JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rewire.measure.anatomy.memory import Inference, Training
from rewire.measure.anatomy.settings import Settings
from rewire.measure.anatomy.tree import Part

if TYPE_CHECKING:
    from rich.console import RenderableType

FORMAT = 1
"""Version of the JSON form, under the key `rewire_anatomy`."""


@dataclass(frozen=True)
class Measured:
    """What a run in a process of its own has taken, in bytes beyond what the process had before.

    Attributes:
        load: after the model was made.
        inference: peak of a forward.
        training: peak of a training step; None where none was run.
        note: why something was not measured.
    """

    load: int
    inference: int | None
    training: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of, and what it takes.

    Attributes:
        name: what people call it.
        model: its class.
        model_type: what its configuration calls it.
        dtypes: types of the parameters, the most frequent first.
        settings: the sizes of the inputs, and how it runs.
        tree: its modules.
        count: how many tokens, images or recordings go through at once; 0 where none was run.
        unit: which of these.
        cache_kind: how its heads share keys and values.
        inference: memory of a forward.
        training: memory of a training step; None if that was not asked for.
        measured: what a real run has taken; None if that was not asked for.
        notes: what a reader ought to know.
    """

    name: str
    model: str
    model_type: str
    dtypes: tuple[str, ...]
    settings: Settings
    tree: Part = field(repr=False)
    count: int
    unit: str
    cache_kind: str
    inference: Inference
    training: Training | None = None
    measured: Measured | None = None
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> int | None:
        """Floating-point operations of one forward for each token (or image, or recording)."""
        return round(self.tree.flops / self.count) if self.tree.flops is not None and self.count else None

    @property
    def predicted(self) -> Mapping[str, int | None]:
        """The peaks by what is done."""
        found = {"load": self.inference.weights, "inference": self.inference.total.bytes}
        return found if self.training is None else {**found, "training": self.training.total.bytes}

    def deviation(self, what: str) -> float | None:
        """Predicted against measured, as a share of the measured.

        Positive: more was predicted than was measured.
        """
        predicted, real = self.predicted.get(what), getattr(self.measured, what, None)
        return predicted / real - 1 if predicted is not None and real else None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            "rewire_anatomy": FORMAT,
            "name": self.name,
            "model": self.model,
            "model_type": self.model_type,
            "dtypes": list(self.dtypes),
            "settings": self.settings.to_dict(),
            "parameters": self.tree.parameters,
            "trainable": self.tree.trainable,
            "bytes": self.tree.bytes,
            "unit": self.unit,
            "count": self.count,
            "flops": self.flops,
            "cache_kind": self.cache_kind,
            "inference": self.inference.to_dict(),
            "training": None if self.training is None else self.training.to_dict(),
            "measured": None if self.measured is None else {**vars(self.measured), "deviation": self._deviations()},
            "notes": list(self.notes),
            "tree": self.tree.to_dict(),
        }

    def _deviations(self) -> dict[str, float | None]:
        return {what: self.deviation(what) for what in self.predicted}

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    def __rich__(self) -> RenderableType:
        from rewire.measure.anatomy.view import view

        return view(self)


@dataclass(frozen=True)
class Change:
    """A model before a plan and after it."""

    before: Anatomy
    after: Anatomy

    def saving(self, what: str) -> float | None:
        """Share of memory that the plan saves, `1 - after / before`; less than 0 if it takes more."""
        return saving(self.before.predicted.get(what), self.after.predicted.get(what))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        savings = {what: self.saving(what) for what in self.before.predicted}
        return {"before": self.before.to_dict(), "after": self.after.to_dict(), "saving": savings}

    def __rich__(self) -> RenderableType:
        from rewire.measure.anatomy.view import view

        return view(self.before, self.after)


def saving(before: int | None, after: int | None) -> float | None:
    """`1 - after / before`; None where one is not known.

    >>> saving(200, 50), saving(100, 150), saving(None, 3)
    (0.75, -0.5, None)
    """
    return 1 - after / before if before and after is not None else None
