"""What coverage finds, as frozen records that go to JSON and back."""

from __future__ import annotations

import datetime
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from rewire.errors import CheckpointError

FORMAT = 1
"""Version of the JSON form, under the key `rewire_coverage`."""

EDITS = ("split", "join", "unstack", "stack")
"""The edits tried on every type."""

OUTCOMES = ("proven", "in part", "refused", "not applicable", "failed", "unavailable")
"""What may come out, see `Finding`."""


@dataclass(frozen=True)
class Finding:
    """What came of one edit on one model type.

    Attributes:
        edit: its kind.
        outcome: `proven`: outputs, gradients, weights, the way back, and saving and loading in the original layout
            all compared, at every place; `in part`: what was compared holds, but `detail` says what could not
            be; `refused`: every place was, and the model is bit for bit as before; `not applicable`: there is no
            such place; `failed`: something differs or raised; `unavailable`: the type cannot be built or run.
        places: how many places were changed.
        difference: the largest relative difference of an output; None where none was compared.
        detail: the reason, or what was left out.
    """

    edit: str
    outcome: str
    places: int = 0
    difference: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class TypeReport:
    """One model type.

    Attributes:
        model_type: as its configuration calls it.
        model: class of the model; empty where it could not be built.
        parameters: of the tiny model.
        inputs: names of the inputs it was run with.
        findings: one for each edit.
        problem: why the tiny model could not be built or run; empty if it could.
        seconds: what it took.
    """

    model_type: str
    model: str = ""
    parameters: int = 0
    inputs: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    problem: str = ""
    seconds: float = 0.0

    def finding(self, edit: str) -> Finding:
        """What came of an edit."""
        return next(
            (one for one in self.findings if one.edit == edit), Finding(edit, "unavailable", detail=self.problem)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TypeReport:
        """The inverse of `to_dict`. Raises `CheckpointError` for anything else."""
        try:
            findings = tuple(Finding(**one) for one in data["findings"])
            return cls(**{**data, "findings": findings, "inputs": tuple(data["inputs"])})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"not a coverage record: {error}; remove the file to start anew") from error


def library_versions() -> dict[str, str]:
    """Versions of what decides the result."""
    names = ("rewire", "torch", "transformers", "peft", "safetensors")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


@dataclass(frozen=True)
class Coverage:
    """All types looked at, with the versions they were looked at with."""

    types: tuple[TypeReport, ...]
    versions: Mapping[str, str] = field(default_factory=library_versions)
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).date().isoformat())

    @property
    def available(self) -> tuple[TypeReport, ...]:
        """The types whose tiny model is built and runs."""
        return tuple(one for one in self.types if not one.problem)

    @property
    def failed(self) -> tuple[TypeReport, ...]:
        """The types on which some edit failed."""
        return tuple(one for one in self.types if any(f.outcome == "failed" for f in one.findings))

    def totals(self, edit: str) -> Counter[str]:
        """How often each outcome occurs for an edit."""
        return Counter(one.finding(edit).outcome for one in self.types)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        types = [one.to_dict() for one in self.types]
        return {"rewire_coverage": FORMAT, "date": self.date, "versions": dict(self.versions), "types": types}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Coverage:
        """The inverse of `to_dict`. Raises `CheckpointError` for anything else."""
        if data.get("rewire_coverage") != FORMAT:
            raise CheckpointError("not a coverage file of this version of Rewire")
        types = tuple(map(TypeReport.from_dict, data["types"]))
        return cls(types, data["versions"], data["date"])

    @classmethod
    def read(cls, text: str) -> Coverage:
        """From JSON text. Raises `CheckpointError` for anything else."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"not JSON: {error}") from error
        return cls.from_dict(data)


def merged(reports: Iterable[TypeReport]) -> tuple[TypeReport, ...]:
    """By type, a later report in place of an earlier one.

    >>> [one.model for one in merged([TypeReport("b", "1"), TypeReport("a"), TypeReport("b", "2")])]
    ['', '2']
    """
    by_type = {one.model_type: one for one in reports}
    return tuple(by_type[name] for name in sorted(by_type))
