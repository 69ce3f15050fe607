"""Generated code as a list of fragments, each of which knows where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from rewire.source.lex import WORD, code_only, tokens
from rewire.source.statements import Statement
from rewire.source.view import View


@dataclass(frozen=True)
class Origin:
    """Where a piece of generated code stands in the source: file, lines and the renaming that was applied."""

    path: Path
    line: int
    last_line: int
    renamed: tuple[str, str] | None = None

    def __str__(self) -> str:
        renamed = f", {self.renamed[0]} renamed to {self.renamed[1]}" if self.renamed else ""
        return f"{self.path}:{self.line}{renamed}"


@dataclass(frozen=True)
class Fragment:
    """Characters `start` to `end` of a view; `new` is their text where it is not the view's own.

    `label` names what the fragment is part of: `LlamaMLP`, `LlamaMLP.forward`.
    """

    view: View
    start: int
    end: int
    label: str
    new: str | None = None

    @property
    def text(self) -> str:
        """The generated text."""
        return self.view.text(self.start, self.end) if self.new is None else self.new

    @property
    def words(self) -> set[str]:
        """The identifiers in it."""
        if self.new is None:
            return self.view.words(self.start, self.end)
        return set(WORD.findall(code_only(self.new, tokens(self.new))))

    @property
    def origin(self) -> Origin:
        """Where it came from."""
        lines, renaming = self.view.file.lines, self.view.renaming
        names = (renaming.old, renaming.new) if renaming else None
        first = lines.line(self.start)
        return Origin(self.view.file.path, first, max(first, lines.line(max(self.start, self.end - 1))), names)


@dataclass(eq=False)
class Definition:
    """A top-level statement of a generated file (with its satellites: assignments into it)."""

    kind: Literal["class", "function", "assign"]
    name: str
    fragments: list[Fragment]

    @cached_property
    def text(self) -> str:
        """The generated text."""
        return "".join(one.text for one in self.fragments)

    @cached_property
    def words(self) -> set[str]:
        """Identifiers in it, its own name left out."""
        return set().union(*(one.words for one in self.fragments)) - {self.name}


def whole(view: View, statement: Statement, label: str) -> Fragment:
    """A statement with all that belongs to it."""
    return Fragment(view, statement.lead, statement.end, label)
