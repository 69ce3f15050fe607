"""What names mean: in the modular file, and in each parent file as the modular file extends it.

An `Entry` is a definition with the names it uses. Dependencies are sets of identifiers and are worked out when asked
for, so that of a large parent only the part that is needed is ever looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from rewire.source.fragments import Definition, whole
from rewire.source.import_statements import Import, plain_imports
from rewire.source.names import type_of_module
from rewire.source.statements import Statement
from rewire.source.view import View


@dataclass(eq=False)
class Entry:
    """A recorded class, function or assignment of a file; `position` counts the definitions of the file."""

    view: View
    statement: Statement
    name: str
    position: int
    home: Home

    @property
    def is_class(self) -> bool:
        """Is it a class?"""
        return self.statement.kind == "class"

    @cached_property
    def words(self) -> set[str]:
        """Identifiers in it, those of its satellites included, its own name left out."""
        found = [self.view.words(one.lead, one.end) for one in self._statements]
        return set().union(*found) - {self.name}

    @property
    def needs(self) -> set[str]:
        """Names of its own file that it uses."""
        return self.words & self.home.entries.keys()

    @property
    def _statements(self) -> list[Statement]:
        return [self.statement, *self.view.file.satellites.get(self.statement.name, [])]

    def definition(self) -> Definition:
        """It, as it goes into a generated file."""
        kind = self.statement.kind
        assert kind in ("class", "function", "assign")
        return Definition(kind, self.name, [whole(self.view, one, self.name) for one in self._statements])


class Home:
    """The definitions of one file under its view, by (renamed) name."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.entries: dict[str, Entry] = {}
        for position, (name, statement) in enumerate(view.file.definitions.items()):
            name = view.word(name)
            self.entries[name] = Entry(view, statement, name, position, self)

    @cached_property
    def siblings(self) -> set[str]:
        """Names imported from files beside it that have a file type."""
        return {name for one in plain_imports(self.view.imports) if is_sibling(one) for name in one.bound()}


def is_sibling(one: Import) -> bool:
    """Is it an import from a generated file beside this one?"""
    return one.module is not None and one.module[:1] == "." and type_of_module(one.module[1:]) is not None


def closure(start: Entry, entries: Mapping[str, Entry], needs: Callable[[Entry], set[str]]) -> set[str]:
    """All that a function or assignment needs, functions and assignments followed, classes not."""
    found: set[str] = set()
    todo = [start]
    while todo:
        entry = todo.pop()
        if not entry.is_class:
            new = needs(entry) - found
            found |= new
            todo += [entries[name] for name in new]
    return found


class Scope:
    """Names with their entries, and closures over what they need."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)
        self._closures: dict[str, set[str]] = {}
        self._class_needs: dict[str, set[str]] = {}

    def needs(self, entry: Entry) -> set[str]:
        """Names of this scope that a function or assignment uses."""
        return {name for name in entry.words if name in self.entries}

    def with_functions(self, names: Iterable[str]) -> set[str]:
        """The known among the names, and all that the functions and assignments among these need in turn."""
        found = {name for name in names if name in self.entries}
        return found.union(*(self._closure(name) for name in found if not self.entries[name].is_class))

    def _closure(self, start: str) -> set[str]:
        found = self._closures.get(start)
        if found is None:
            found = self._closures[start] = closure(self.entries[start], self.entries, self.needs)
        return found

    def class_needs(self, name: str) -> set[str]:
        """What a class uses, functions and assignments followed, classes not."""
        found = self._class_needs.get(name)
        if found is None:
            found = self._class_needs[name] = self.with_functions(self.entries[name].words) - {name}
        return found


class ParentScope(Scope):
    """A renamed parent file, extended by the modular file."""

    def __init__(self, home: Home, modular: ModularScope) -> None:
        super().__init__(home.entries)
        self.home, self.modular = home, modular
        for entry in modular.imported:
            if entry.home is not home:
                theirs = entry.home.entries
                needed = closure(entry, theirs, lambda one: one.needs)
                self.entries |= {name: theirs[name] for name in (entry.name, *needed)}
        for name, entry in modular.home.entries.items():
            if self._takes(name, entry):
                self.entries[name] = entry

    def _takes(self, name: str, entry: Entry) -> bool:
        match entry.statement.kind:
            case "function":
                return True
            case "class":
                return name not in self.entries and name not in self.home.siblings
        return name not in self.entries or is_overriding_constant(name, entry)

    def needs(self, entry: Entry) -> set[str]:
        """Names that a function or assignment uses: of its own file, of this parent or of the modular file."""
        homes = (entry.home, self.home, self.modular.home)
        return {name for name in entry.words if name in self.entries and any(name in home.entries for home in homes)}

    def walk(self, start: set[str], done: Iterable[str]) -> set[str]:
        """`start` and all that the parent's classes among it need, classes followed; stops at what is done."""
        found, todo = set(start), [name for name in start if name not in done]
        while todo:
            entry = self.entries.get(todo.pop())
            if entry is None or not entry.is_class or entry.home is not self.home:
                continue
            new = self.class_needs(entry.name) - found
            found |= new
            todo += [name for name in new if name not in done]
        return found


_CONSTANTS = ("_CHECKPOINT", "_EXPECTED", "_FOR_DOC", "_HIDDEN_STATES_START_POSITION")


def is_overriding_constant(name: str, entry: Entry) -> bool:
    """Does an assignment of the modular file replace the parent's of the same name?"""
    if any(part in name for part in _CONSTANTS):
        return True
    text = entry.view.text(entry.statement.start, entry.statement.end).partition("=")[2]
    return "_DOCSTRING" in name and text.strip() != "None"


class ModularScope(Scope):
    """The modular file, with the functions and assignments that it imports from its parents."""

    def __init__(self, home: Home) -> None:
        super().__init__(home.entries)
        self.home = home
        self.imported: list[Entry] = []
        """Functions imported by name."""

    def add_imported(self, name: str, home: Home) -> None:
        """Makes a function or assignment of a parent known, with what it uses directly."""
        entry = home.entries.get(name)
        if entry is None or entry.is_class or name in self.home.entries:
            return
        self.entries[name] = entry
        if entry.statement.kind == "function":
            self.imported.append(entry)
        for needed in entry.needs - self.home.entries.keys():
            self.entries[needed] = home.entries[needed]
