"""Import statements as data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import dedent


@dataclass(frozen=True)
class Import:
    """`from module import names` or, without a module, `import names`; names with their alias.

    `lead` are the blank and comment lines above; `path` and `line` say where the statement was written.
    """

    module: str | None
    names: tuple[tuple[str, str | None], ...]
    lead: str = ""
    path: Path | None = None
    line: int = 0

    @property
    def text(self) -> str:
        """The statement on one line."""
        names = ", ".join(f"{name} as {alias}" if alias else name for name, alias in self.names)
        return f"import {names}" if self.module is None else f"from {self.module} import {names}"

    def bound(self) -> Iterator[str]:
        """The names that the statement makes known; `a.b` for `import a.b`."""
        return (alias or name for name, alias in self.names)

    def keep(self, names: Collection[str]) -> Import | None:
        """The same with only those of its names that are bound to one of `names`."""
        kept = tuple((name, alias) for name, alias in self.names if (alias or name) in names)
        return replace(self, names=kept) if kept else None


@dataclass(frozen=True)
class Guard:
    """Imports under an `if`. `otherwise` is the text from `elif` or `else` on, which is kept as it is.

    `rest` is where that text stands in the file; `code` is the line of the first statement under the `if` that is no
    import, 0 if there is none.
    """

    test: str
    body: tuple[Import | Guard, ...]
    otherwise: str = ""
    lead: str = ""
    path: Path | None = None
    line: int = 0
    rest: tuple[int, int] = (0, 0)
    code: int = 0

    @property
    def text(self) -> str:
        """The statement with one import a line."""
        lines = [f"if {self.test}:", *_indented(self.body), self.otherwise]
        return "\n".join(lines).rstrip("\n")

    def keep(self, names: Collection[str]) -> Guard | None:
        """The same with only those of its imports that bind one of `names`."""
        body = tuple(kept for one in self.body if (kept := one.keep(names)))
        return replace(self, body=body) if body else None


def _indented(block: tuple[Import | Guard, ...]) -> list[str]:
    return [f"    {line}" for one in block for line in one.text.splitlines()]


def without_indent(text: str) -> str:
    """Lines moved to the left margin."""
    return dedent(text) if text[:1] in " \t" else text


def plain_imports(imports: Iterable[Import | Guard]) -> Iterator[Import]:
    """All import statements, those under guards included."""
    for one in imports:
        if isinstance(one, Guard):
            yield from plain_imports(one.body)
        else:
            yield one
