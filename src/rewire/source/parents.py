"""The parent files of a modular file: which they are, and the name that their classes take."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from rewire.source.errors import Report
from rewire.source.files import SourceFile
from rewire.source.import_statements import Import, plain_imports
from rewire.source.modules import Package, ParentModule, parent_module
from rewire.source.names import Names, common_suffix
from rewire.source.rename import Renaming
from rewire.source.rules import NEWEST, Rules
from rewire.source.statements import ClassStatement
from rewire.source.view import View


@dataclass(eq=False)
class Parent:
    """One parent file under its renaming; `prefix` is the name that its classes take, in lower case."""

    module: ParentModule
    view: View
    prefix: str

    @property
    def kind(self) -> str:
        """The file type."""
        return self.module.kind


@dataclass(eq=False)
class Modular:
    """A modular file with its parents.

    `load` gives the parsed file of a parent, or nothing if there is none.
    """

    view: View
    name: str
    package: Package | None
    names: Names
    load: Callable[[ParentModule], SourceFile | None]
    report: Report
    rules: Rules = NEWEST
    parents: dict[Path, Parent] = field(default_factory=dict)
    imported: list[tuple[Path, str]] = field(default_factory=list)
    """Names imported from parents, in order."""
    votes: dict[Path, Counter[str]] = field(default_factory=dict)
    """How many classes ask for which name, by parent."""

    def __post_init__(self) -> None:
        self._check_imports()
        files: dict[Path, tuple[ParentModule, SourceFile]] = {}
        for one, module in self.parent_imports():
            if module.path not in files and (file := self._read(one, module)):
                files[module.path] = module, file
            if module.path in files:
                self.imported += [(module.path, name) for name, _ in one.names]
        self._count_votes({path: module.model for path, (module, _) in files.items()})
        for path, (module, file) in files.items():
            prefix = self._prefix(module, file)
            renaming = Renaming(module.model, prefix, self.names, self.rules)
            self.parents[path] = Parent(module, View(file, renaming, self.name, home=self._home(module)), prefix)

    @property
    def file(self) -> SourceFile:
        """The modular file itself."""
        return self.view.file

    @cached_property
    def cased(self) -> str:
        """The model's name as classes carry it."""
        return self.names.cased(self.name)

    @cached_property
    def classes(self) -> list[ClassStatement]:
        """The classes of the modular file; of two that share a name the last, in the place of the first."""
        return [one for one in self.file.definitions.values() if isinstance(one, ClassStatement)]

    def parent_imports(self) -> list[tuple[Import, ParentModule]]:
        """Imports from parent files, those inside functions included. The auto classes are nobody's parents."""
        found = []
        for one in self.file.all_imports:
            module = parent_module(one.module, self.file.path, self.package) if one.module else None
            if module and module.model != "auto":
                found.append((one, module))
        return found

    def merged_base(self, statement: ClassStatement) -> tuple[str, Parent] | None:
        """The base that comes from a parent file, as written, with that parent."""
        base = next(iter(self._model_bases(statement)), None)
        return (base, self.parents[self._bound[base]]) if base else None

    # ------------------------------------------------------------ reading

    def _check_imports(self) -> None:
        for one in plain_imports(self.file.imports):
            if self.package and one.module == self.package.name:
                message = f"{one.names[0][0]} is imported from the top of the package"
                instead = "import it from the module that defines it"
                position = self.file.lines.start(one.line)
                self.report.error(self.file, position, "import-from-package", message, instead)

    def _home(self, module: ParentModule) -> str:
        """The parent's package where relative imports would mean something else in the generated files."""
        if module.package is None or module.package == self.package:
            return ""
        return module.package.dotted(module.path.parent)

    def _read(self, one: Import, module: ParentModule) -> SourceFile | None:
        position = self.file.lines.start(one.line)
        file = self.load(module)
        if file is None:
            self.report.error(
                self.file,
                position,
                "parent-missing",
                f"{one.module} is not at {module.path}",
                "name a file that exists",
            )
        elif module.kind == "modeling" and (configs := [name for name, _ in one.names if "Config" in name]):
            instead = f"import it from {(one.module or '').replace('modeling', 'configuration')}"
            self.report.error(self.file, position, "config-from-modeling", f"{configs[0]} is no model class", instead)
        return file

    @cached_property
    def _bound(self) -> dict[str, Path]:
        return {name: path for path, name in self.imported}

    def _model_bases(self, statement: ClassStatement) -> list[str]:
        written = (self.view.text(*span) for span in statement.bases)
        return [base for base in written if base in self._bound]

    # ------------------------------------------------------------ the name that a parent's classes take

    def _count_votes(self, models: dict[Path, str]) -> None:
        for statement in self.classes:
            bases = self._model_bases(statement)
            if len(bases) > 1:
                message = f"{statement.name} has the parent bases {' and '.join(bases)}"
                instead = "inherit from one of them and write the rest out"
                self.report.error(self.file, statement.keyword, "two-parents", message, instead)
            for base in bases[:1]:
                path = self._bound[base]
                self.votes.setdefault(path, Counter())[self._candidate(statement.name, base, models[path])] += 1

    def _candidate(self, name: str, base: str, model: str) -> str:
        """The name that one class asks for."""
        suffix = common_suffix(name, base)
        if suffix[:1].isupper():
            prefix = name.replace(suffix, "")
            return self.cased if len(prefix) < len(self.cased) and self.cased in name else prefix
        if name.replace(self.cased, "") == base:
            return self.cased + self.names.cased(model)
        return self.cased

    def _prefix(self, module: ParentModule, file: SourceFile) -> str:
        """The name most classes ask for, in lower case, unless the parent has classes of that name already."""
        votes = self.votes.get(module.path)
        if not votes:
            return self.name
        most = max(votes.values())
        tied = [prefix for prefix, count in votes.items() if count == most]
        chosen = self.cased if self.cased in tied else tied[-1]
        if len(votes) > 1:
            self._warn_of_names(votes, module, chosen)
        taken = chosen.replace(self.cased, self.names.cased(module.model))
        if chosen == self.cased or re.search(rf"^class {re.escape(taken)}", file.text, re.MULTILINE):
            return self.name
        return self.names.lower(chosen)

    def _warn_of_names(self, votes: Counter[str], module: ParentModule, chosen: str) -> None:
        counts = ", ".join(f"{prefix} ({count})" for prefix, count in votes.items())
        message = f"classes from {module.path.stem} are called {counts}; {chosen} is taken for all of that file"
        self.report.warn(self.file, self.classes[0].keyword, "competing-names", message)
