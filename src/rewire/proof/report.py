"""What a proof found, as one immutable record that goes to JSON and back."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rewire.errors import OutputError, ProofError
from rewire.proof.divergence import Divergence, ModuleDifference

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1
"""Version of the JSON form, under the key `rewire_proof`."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    `value` is a relative difference and passes at or below `tolerance`; with `at_least` it is a movement and
    passes at or above. An infinite tolerance means: reported, not judged.
    """

    name: str
    passed: bool
    value: float
    tolerance: float
    detail: str = ""
    at_least: bool = False

    @property
    def limit(self) -> str:
        """The tolerance in words.

        >>> Check("outputs", True, 0.0, 1e-5).limit, Check("round trip", True, 0.0, 0.0).limit
        ('≤ 1.0e-05', 'bit-equal')
        """
        if math.isinf(self.tolerance):
            return "not judged"
        if self.at_least:
            return f"≥ {self.tolerance:.1e}"
        return "bit-equal" if self.tolerance == 0 else f"≤ {self.tolerance:.1e}"


@dataclass(frozen=True)
class Group:
    """The checks of one subject, over all inputs."""

    subject: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether all of them passed."""
        return all(check.passed for check in self.checks)

    @property
    def worst(self) -> Check:
        """The check that says most: the first that failed, or else the one with the largest value."""
        failed = [check for check in self.checks if not check.passed]
        return failed[0] if failed else max(self.checks, key=lambda check: check.value)

    @property
    def title(self) -> str:
        """The subject, and over how many inputs where there are several.

        >>> checks = (Check("outputs · a", True, 0.0, 1e-5), Check("outputs · b", False, 1.0, 1e-5))
        >>> grouped(checks)[0].title
        'outputs, 1 of 2 inputs'
        """
        good = sum(check.passed for check in self.checks)
        if len(self.checks) == 1:
            return self.checks[0].name
        return f"{self.subject}, {good if good < len(self.checks) else 'all'} of {len(self.checks)} inputs"


def grouped(checks: Iterable[Check]) -> tuple[Group, ...]:
    """Checks by subject, in order of first appearance."""
    groups: dict[str, list[Check]] = {}
    for check in checks:
        groups.setdefault(check.name.partition(" · ")[0], []).append(check)
    return tuple(Group(subject, tuple(found)) for subject, found in groups.items())


@dataclass(frozen=True)
class Proof:
    """The result of `prove`.

    `max_difference` is the largest relative difference of any output at real positions, in the model's own
    type. `first_divergence` is the first module, in order of execution, that differs beyond the tolerance;
    None when all outputs agree. `module_differences` has the largest difference of every module that both
    models have. `skipped` names inputs that the untouched model does not take, with the reason.
    """

    model: str
    promise: str
    checks: tuple[Check, ...]
    max_difference: float
    first_divergence: Divergence | None = None
    cases: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    module_differences: tuple[ModuleDifference, ...] = ()
    seconds: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def summary(self) -> str:
        """One line.

        >>> Proof("Tiny", "exact", (Check("outputs", True, 0.0, 1e-5),), 0.0, cases=("one",), seconds=0.25).summary()
        'passed: Tiny, exact, 1 of 1 checks over 1 inputs, largest difference 0, 0.2 s'
        """
        good = len(self.checks) - len(self.failures)
        text = (
            f"{'passed' if self.passed else 'FAILED'}: {self.model}, {self.promise}, "
            f"{good} of {len(self.checks)} checks over {len(self.cases)} inputs, "
            f"largest difference {show(self.max_difference)}, {self.seconds:.1f} s"
        )
        if self.first_divergence is not None:
            text += f"; first divergence: {self.first_divergence}"
        elif self.failures:
            text += f"; {self.failures[0].name}: {self.failures[0].detail}"
        return text

    def to_json(self) -> str:
        """As JSON text; numbers that JSON lacks are written as "inf" and "nan"."""
        data = {"rewire_proof": FORMAT, "passed": self.passed, **asdict(self)}
        return json.dumps(_plain(data), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Proof:
        """The inverse of `to_json`. Raises `ProofError` for any other text.

        >>> proof = Proof("Tiny", "exact", (Check("outputs", False, float("inf"), 1e-5),), float("inf"))
        >>> Proof.from_json(proof.to_json()) == proof
        True
        """
        try:
            data = json.loads(text)
            if data.pop("rewire_proof") != FORMAT:
                raise ValueError(f"format {FORMAT} expected")
            return cls._from_data(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ProofError(f"not the JSON text of a proof: {type(error).__name__}: {error}") from error

    @classmethod
    def _from_data(cls, data: dict[str, Any]) -> Proof:
        data.pop("passed", None)
        divergence = data.pop("first_divergence")
        checks = tuple(Check(**_numbers(one)) for one in data.pop("checks"))
        modules = tuple(ModuleDifference(**_numbers(one)) for one in data.pop("module_differences"))
        return cls(
            checks=checks,
            module_differences=modules,
            first_divergence=None if divergence is None else Divergence(**_numbers(divergence)),
            cases=tuple(data.pop("cases")),
            skipped=tuple(data.pop("skipped")),
            **_numbers(data),
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Writes JSON, or the page of `to_html` where `path` ends in `.html`; all or nothing. Returns the
        path.

        Raises `OutputError` when the folder is absent or not writable.
        """
        target = Path(path)
        text = self.to_html() if target.suffix == ".html" else self.to_json() + "\n"
        provisional = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            provisional.write_text(text, encoding="utf-8")
            provisional.replace(target)
        except OSError as error:
            provisional.unlink(missing_ok=True)
            raise OutputError(f"{target} cannot be written: {error}") from error
        return target

    def to_html(self) -> str:
        """A page that needs no network: summary, checks, and a heat map of differences per layer."""
        from rewire.proof.html import page

        return page(self)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.summary()), title_justify="left", show_edge=False)
        for heading in ("", "check", "value", "limit", "detail"):
            table.add_column(heading, overflow="fold")
        for group in grouped(self.checks):
            mark = Text("✓", style="green") if group.passed else Text("✗", style="bold red")
            worst = group.worst
            table.add_row(mark, Text(group.title), show(worst.value), worst.limit, Text(worst.detail))
        return table


def show(value: float) -> str:
    """A difference for people.

    >>> show(0.0), show(0.00012), show(float("inf"))
    ('0', '1.2e-04', '∞')
    """
    if value == 0:
        return "0"
    return "∞" if math.isinf(value) else f"{value:.1e}"


def environment_of(device: torch.device) -> dict[str, str]:
    """The machine and the versions under which a proof was made."""
    versions = {name: _version(name) for name in ("rewire", "torch", "transformers", "peft")}
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return {
        "python": platform.python_version(),
        **{name: version for name, version in versions.items() if version},
        "machine": f"{platform.system()} {platform.machine()}",
        "device": f"{device.type}, {place}",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


NUMBERS = frozenset({"value", "tolerance", "difference", "max_difference", "seconds"})


def _numbers(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(value) if key in NUMBERS else value for key, value in data.items()}
