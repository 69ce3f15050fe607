"""From a modular file to the definitions of each generated file, in order."""

from __future__ import annotations

from dataclasses import dataclass, field

from rewire.source.classes import Side, merge_class
from rewire.source.fragments import Definition, whole
from rewire.source.import_statements import Guard, Import
from rewire.source.names import common_suffix, file_type, module_name
from rewire.source.order import modular_order, parent_order
from rewire.source.parents import Modular, Parent
from rewire.source.rename import Renaming
from rewire.source.scopes import Home, ModularScope, ParentScope
from rewire.source.statements import ClassStatement

BEGINNING = ("logger", "_CHECKPOINT_FOR_DOC", "_CONFIG_FOR_DOC")
"""These stand before everything else, in this order."""

ENDING = ("__getattr__", "__all__")
"""These are divided among the generated files."""


@dataclass
class Output:
    """The definitions of one generated file by name, each with its place in the order."""

    kind: str
    placed: dict[str, tuple[float, Definition]] = field(default_factory=dict)
    crossed: set[str] = field(default_factory=set)
    """Classes that come by import from another generated file of the model."""
    _next: int = 0

    def place(self, definition: Definition) -> None:
        """Puts a definition at the end, also one whose name is there already."""
        self.placed[definition.name] = (self._next, definition)
        self._next += 1

    def definitions(self) -> list[Definition]:
        """All, in order."""
        first = {name: number - len(BEGINNING) for number, name in enumerate(BEGINNING)}
        order = sorted(self.placed, key=lambda name: first.get(name, self.placed[name][0]))
        return [self.placed[name][1] for name in order]


class Gatherer:
    """Goes through the classes of one modular file and fills `outputs`, by file type."""

    def __init__(self, modular: Modular) -> None:
        self.modular = modular
        self.outputs: dict[str, Output] = {}
        self.cross_imports: list[Import] = []
        self.scope = ModularScope(Home(modular.view))
        self.homes = {path: Home(parent.view) for path, parent in modular.parents.items()}
        for path, name in modular.imported:
            self.scope.add_imported(name, self.homes[path])
        self.scopes = {path: ParentScope(home, self.scope) for path, home in self.homes.items()}

    def run(self) -> None:
        """Places every class of the modular file with all that it needs."""
        for statement in self.modular.classes:
            kind = self.type_of(statement.name)
            output = self.outputs.setdefault(kind, Output(kind))
            if found := self.modular.merged_base(statement):
                self._merged(statement, output, *found)
            else:
                self._plain(statement, output)
        self._warn_of_dropped()

    def type_of(self, name: str) -> str:
        """The type of the generated file that a class goes to."""
        return file_type(name, self.modular.cased, self.modular.rules)

    def unused(self) -> list[str]:
        """Functions and assignments of the modular file that no generated file needs."""
        placed = {name for output in self.outputs.values() for name in output.placed}
        return [name for name in self.modular.file.definitions if name not in placed and name not in ENDING]

    # ------------------------------------------------------------ classes

    def _plain(self, statement: ClassStatement, output: Output) -> None:
        definition = Definition("class", statement.name, [whole(self.modular.view, statement, statement.name)])
        needed = self._needed(self.scope, definition.words, output)
        for name in modular_order(self.scope, {one for one in needed if one not in output.placed}):
            output.place(self.scope.entries[name].definition())
        output.place(definition)

    def _merged(self, statement: ClassStatement, output: Output, base: str, parent: Parent) -> None:
        side = self._parent_side(statement, base, parent)
        if side is None:
            return
        own = Side(self.modular.view, statement)
        fragments = list(merge_class(own, side, base, self.modular.rules, self.modular.report))
        definition = Definition("class", statement.name, fragments)
        scope = self.scopes[parent.module.path]
        own_classes = {one.name for one in self.modular.classes}
        start = self._needed(scope, definition.words, output) - own_classes
        needed = scope.walk(start, output.placed) - {statement.name}
        for name in parent_order(scope, self.scope, {one for one in needed if one not in output.placed}):
            output.place(scope.entries[name].definition())
        output.place(definition)

    def _parent_side(self, statement: ClassStatement, base: str, parent: Parent) -> Side | None:
        """The parent class, its strings and comments speaking of the class that inherits from it."""
        old, new = parent.view.word(base), statement.name
        entry = self.homes[parent.module.path].entries.get(old)
        found = entry.statement if entry else None
        if not isinstance(found, ClassStatement):
            message = f"{parent.module.path.name} has no class {base}"
            self.modular.report.error(
                self.modular.file, statement.keyword, "base-missing", message, "name a class that it has"
            )
            return None
        if old == new:
            return Side(parent.view, found)
        suffix = common_suffix(new, old)
        names = self.modular.names
        old, new = (names.lower(one.removesuffix(suffix)) for one in (old, new))
        return Side(parent.view.again(Renaming(old, new, names, self.modular.rules), found.lead, found.end), found)

    def _needed(self, scope: ModularScope | ParentScope, words: set[str], output: Output) -> set[str]:
        """What the words mean in a scope, without what the output gets by import."""
        siblings = (
            self.homes[path].siblings for path, parent in self.modular.parents.items() if parent.kind == output.kind
        )
        needed = scope.with_functions(words) - output.crossed.union(*siblings)
        for name in sorted(needed):
            if scope.entries[name].is_class and (kind := self.type_of(name)) != output.kind:
                output.crossed.add(name)
                self.cross_imports.append(Import(f".{module_name(kind, self.modular.name)}", ((name, None),)))
        return needed - output.crossed

    # ------------------------------------------------------------ what is passed over

    def _warn_of_dropped(self) -> None:
        file, report = self.modular.file, self.modular.report
        recorded = {id(one) for one in file.definitions.values()}
        recorded |= {id(one) for many in file.satellites.values() for one in many}
        for number, one in enumerate(file.statements):
            is_docstring = number == 0 and one.kind in ("string", "other")
            if id(one) not in recorded and one.kind not in ("import", "if") and not is_docstring:
                is_twice = one.name in file.definitions
                kinds = "this is no import, class, function or `NAME = value`"
                message = f"{one.name} is defined again below" if is_twice else kinds
                report.warn(file, one.start, "dropped", message)
        for guard in file.imports:
            if isinstance(guard, Guard) and guard.code:
                message = "under an import guard there may be nothing but imports"
                report.error(file, file.lines.start(guard.code), "code-in-guard", message, "move it out")
        for name in self.unused():
            message = f"no class needs {name}, so that no generated file has it"
            instead = "use it in a class, or remove it"
            report.warn(file, file.definitions[name].header, "unused", message, instead)
