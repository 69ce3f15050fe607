"""Problems of a modular file as records: where, which rule, and what to write instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rewire.errors import RewireError

if TYPE_CHECKING:
    from rewire.source.files import SourceFile

Severity = Literal["error", "warning"]

RULES = {
    "syntax": "the file is not valid Python",
    "parent-missing": "a file that is inherited from cannot be found",
    "circular-inheritance": "modular files inherit from each other in a circle",
    "two-parents": "a class has more than one base from a parent file",
    "base-missing": "the parent file has no class of that name",
    "base-not-a-name": "a base of a merged class is not a plain or dotted name",
    "config-from-modeling": "a config class is imported from a modeling file",
    "import-from-package": "names are imported from the top of the package",
    "super-without-parent": "super() is called for a method that the parent class does not define",
    "nothing-to-delete": "an attribute is deleted that the parent does not have",
    "mixed-decorators": "no_inherit_decorator stands beside other decorators",
    "code-in-guard": "something other than an import stands under an import guard",
    "broken-output": "what comes out is not valid Python",
    "dropped": "a statement has no place in any generated file",
    "unused": "a definition is in no generated file",
    "not-deleted": "a method that only raises replaces the parent's instead of deleting it",
    "carried-over": "an assignment of one method replaces one in another method",
    "competing-names": "classes of one parent file ask for different names",
}
"""Every rule that a `Problem` can name, with what it means."""


@dataclass(frozen=True)
class Problem:
    """One problem. `column` counts from 1; `end_column` is where the caret's line ends; `instead` is advice."""

    path: Path
    line: int
    column: int
    rule: str
    message: str
    instead: str = ""
    severity: Severity = "error"
    end_column: int = 0

    def __str__(self) -> str:
        advice = f"; {self.instead}" if self.instead else ""
        return f"{self.path}:{self.line}:{self.column}: {self.rule}: {self.message}{advice}"


@dataclass
class Report:
    """Collects the problems of one modular file."""

    problems: list[Problem] = field(default_factory=list)

    def error(self, file: SourceFile, position: int, rule: str, message: str, instead: str = "") -> None:
        """Adds a problem that makes conversion impossible."""
        self._add(file, position, rule, message, instead, "error")

    def warn(self, file: SourceFile, position: int, rule: str, message: str, instead: str = "") -> None:
        """Adds a problem that conversion passes over, as the reference does."""
        self._add(file, position, rule, message, instead, "warning")

    def _add(self, file: SourceFile, position: int, rule: str, message: str, instead: str, severity: Severity) -> None:
        line = file.lines.line(position)
        text = file.lines[line]
        start = max(position - file.lines.start(line), len(text) - len(text.lstrip()))
        problem = Problem(file.path, line, start + 1, rule, message, instead, severity, len(text.rstrip()) + 1)
        if problem not in self.problems:
            self.problems.append(problem)

    @property
    def errors(self) -> tuple[Problem, ...]:
        """Those that make conversion impossible."""
        return tuple(one for one in self.problems if one.severity == "error")

    def check(self) -> None:
        """Raises `SourceError` if there are errors."""
        if self.errors:
            raise SourceError(self.errors)


class SourceError(RewireError):
    """Modular files cannot be converted. `problems` lists all that was found."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))
