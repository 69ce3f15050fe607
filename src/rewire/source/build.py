"""From a modular file to its generated files."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rewire.source.errors import Problem, Report, SourceError
from rewire.source.files import SourceFile
from rewire.source.gather import Gatherer
from rewire.source.graph import outline
from rewire.source.modules import (
    LIBRARY,
    Package,
    ParentModule,
    generating_file,
    installed,
    package_around,
    shown_path,
)
from rewire.source.names import Names, names_of
from rewire.source.parents import Modular
from rewire.source.render import Generated, render
from rewire.source.rules import NEWEST, Rules, rules_for, version_of
from rewire.source.tidy import find_ruff, tidy
from rewire.source.view import View

Parents = Literal["disk", "memory"]


@dataclass(frozen=True)
class Conversion:
    """What a modular file gives, before formatting. `problems` are warnings."""

    path: Path
    files: list[Generated]
    parents: list[ParentModule]
    problems: tuple[Problem, ...]

    @property
    def texts(self) -> dict[str, str]:
        """The unformatted files by name."""
        return {one.name: one.text for one in self.files}


@dataclass
class Workspace:
    """The files that conversions read, each read and parsed once.

    Attributes:
        package: the package that the modular files belong to; found by their place where it is not given.
        parents: `disk` reads parent files as they are, and makes only those that are missing; `memory` makes every
            parent that has a modular file, as if no generated file existed.
        rules: the rules to convert by; where they are not given, those of the package's version.
        ruff: the formatter; needed only to make parents.
        generated: texts of generated files that stand for those on disk, by path.
    """

    package: Package | None = None
    parents: Parents = "disk"
    rules: Rules | None = None
    ruff: str | None = None
    generated: dict[Path, str] = field(default_factory=dict)
    _files: dict[Path, SourceFile] = field(default_factory=dict)
    _open: list[Path] = field(default_factory=list)

    def package_of(self, path: Path) -> Package | None:
        """The package that a modular file belongs to."""
        return self.package or package_around(path)

    def names_for(self, path: Path) -> Names:
        """The table of model names: that of the file's package if it is the library, else of the installed library."""
        package = self.package_of(path)
        library = package if package and package.name == LIBRARY else installed(LIBRARY)
        return names_of(library.root) if library else Names({})

    def rules_of(self, path: Path) -> Rules:
        """The rules that a modular file is converted by."""
        package = self.package_of(path)
        version = version_of(package.root) if package and package.name == LIBRARY else None
        return self.rules or (rules_for(version) if version else NEWEST)

    def convert(self, path: Path) -> Conversion:
        """Converts a modular file. Raises `SourceError` with all that stands in the way."""
        report = Report()
        package = self.package_of(path)
        view = View(_parse(path, path.read_text("utf-8-sig")))
        name = path.stem.removeprefix("modular_")
        rules = self.rules_of(path)
        modular = Modular(view, name, package, self.names_for(path), self.parent, report, rules)
        report.check()
        gathered = Gatherer(modular)
        gathered.run()
        report.check()
        files = list(render(gathered, shown_path(path, package)))
        parents = [one.module for one in modular.parents.values()]
        return Conversion(path, files, parents, tuple(report.problems))

    def parent(self, module: ParentModule) -> SourceFile | None:
        """A parent file, made from its modular file if need be; nothing if there is no such file."""
        path = module.path
        if path not in self._files:
            if path not in self.generated and (source := self._source(module)):
                self.generated |= {path.with_name(name): text for name, text in self.build(source).items()}
            text = self.generated.get(path) or (path.read_text("utf-8-sig") if path.is_file() else None)
            if text is None:
                return None
            self._files[path] = _parse(path, text)
        return self._files[path]

    def build(self, path: Path) -> dict[str, str]:
        """The formatted files that a modular file gives, by name."""
        if path in self._open:
            raise _circular([*self._open[self._open.index(path) :], path])
        self._open.append(path)
        try:
            conversion = self.convert(path)
        finally:
            self._open.pop()
        texts = tidy(conversion.texts, find_ruff(self.ruff))
        if broken := broken_outputs(conversion.path, conversion.texts, texts):
            raise SourceError(broken)
        return texts

    def _source(self, module: ParentModule) -> Path | None:
        """The modular file that a parent is to be made from."""
        source = generating_file(module.path)
        if source is None or (self.parents == "disk" and module.path.is_file()):
            return None
        kinds = outline(source, self.names_for(source), self.package_of(source), self.rules_of(source)).kinds
        return source if module.kind in kinds else None


def build(
    path: str | Path,
    *,
    package_root: str | Path | None = None,
    parents: Parents = "disk",
    rules: str | Rules | None = None,
    ruff: str | None = None,
) -> dict[str, str]:
    """The files that one modular file gives: file name to text.

    Nothing is written, and no code of a model is imported.

    Args:
        path: the modular file.
        package_root: folder of the package that it belongs to; by default the outermost one around it.
        parents: `disk` reads generated parent files as they are; `memory` makes them anew.
        rules: a release of Transformers, like `5.10`, or `Rules`; by default what the package's version tells.
        ruff: path of the formatter; by default `rewire.source.find_ruff()`.

    Raises:
        SourceError: with every problem found, with file, line and column.
        FormatterError: there is no suitable ruff.
    """
    path = Path(path).resolve()
    with collector_paused():
        return workspace(package_root, parents, rules, ruff).build(path)


def convert(
    path: str | Path,
    *,
    package_root: str | Path | None = None,
    parents: Parents = "disk",
    rules: str | Rules | None = None,
    ruff: str | None = None,
) -> Conversion:
    """Like `build`, but not formatted, and with the origin of every fragment and the warnings."""
    with collector_paused():
        return workspace(package_root, parents, rules, ruff).convert(Path(path).resolve())


def workspace(
    package_root: str | Path | None = None,
    parents: Parents = "disk",
    rules: str | Rules | None = None,
    ruff: str | None = None,
) -> Workspace:
    """A workspace with what the arguments of `build` mean."""
    root = Path(package_root).resolve() if package_root is not None else None
    package = Package(root.name, root) if root else None
    return Workspace(package, parents, rules_for(rules) if isinstance(rules, str) else rules, ruff)


def broken_outputs(path: Path, raw: dict[str, str], tidied: dict[str, str]) -> list[Problem]:
    """A problem for each generated file that the formatter could not read."""
    return [
        Problem(path, 1, 1, "broken-output", f"{name} would not be valid Python") for name in raw if name not in tidied
    ]


def _parse(path: Path, text: str) -> SourceFile:
    try:
        return SourceFile(path, text)
    except SyntaxError as error:
        line, column = error.lineno or 1, error.offset or 1
        raise SourceError([Problem(path, line, column, "syntax", error.msg)]) from None


def _circular(chain: Sequence[Path]) -> SourceError:
    message = " inherits from ".join(one.name for one in chain)
    return SourceError([Problem(chain[0], 1, 1, "circular-inheritance", message)])


@contextmanager
def collector_paused() -> Iterator[None]:
    """Syntax trees are large and have no cycles; looking for cycles in them takes longer than making them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
