"""The architecture, enforced: who may import what inside `rewire`, and what loads without torch.

A *unit* is a file or folder directly under `src/rewire` (`plan`, `edits`, …). The checker reads the source
with `ast` and imports nothing, so it works on a tree in which only some units exist. `violations` is its
whole surface; the rules it applies are the tables at the top.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "rewire"

# ---------------------------------------------------------------- the rules, as data

# Lowest first. A unit imports from its own row and from the rows before it in this table, never from a later
# one, and never in a circle. `rewire` itself is the public face that `cli` calls.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "targets", "tensor_rules", "step_patterns", "plan", "artefact"),
    ("modules", "source"),
    ("module_tree",),
    (
        "edit_rules",
        "moves",
        "linears",
        "roles",
        "family_rules",
        "family_table",
        "separate",
        "families",
        "encoder_table",
        "encoder_trial",
        "encoders",
        "probe",
        "experts",
        "expert_trial",
        "hf_seam",
        "hf_conversions",
        "surgery",
    ),
    ("edits",),
    ("resolve", "receipts", "checkpoint"),
    ("live", "explicit", "stream", "adapters", "loading", "saving"),
    ("proof", "inspection", "measure", "fastpath"),
    ("zoo",),
    ("export", "coverage"),
    (PACKAGE,),
    ("cli", "demo"),
    ("__main__",),
)

ROWS = {unit: row for row, units in enumerate(LAYERS) for unit in units}

# Units that a unit may not import although they lie below it: a proof must not inherit an edit's mistakes.
FORBIDDEN_UNITS: dict[str, frozenset[str]] = {"proof": frozenset({"edits", "resolve"})}

# The exporter copies these files into a model's folder, so they need nothing but torch.
SELF_CONTAINED: dict[str, frozenset[str]] = {"modules": frozenset({"torch"})}

# Outside packages with one door each. Imports for type checkers only are free.
DOORS: dict[str, frozenset[str]] = {
    "transformers": frozenset({"hf_seam", "hf_conversions"}),
    "peft": frozenset({"hf_seam", "edits.lora"}),
    "safetensors": frozenset({"checkpoint", "hf_seam"}),
}

# Units that do what users do, with Rewire and without it; they need no door.
USERS = frozenset({"demo"})

# Packages whose import costs seconds (the last two import torch).
HEAVY = frozenset({"torch", "transformers", "accelerate", "peft"})

# No heavy import anywhere, inside functions neither.
NEVER_HEAVY = frozenset(
    {"errors", "targets", "plan", "artefact", "tensor_rules", "edit_rules", "moves", "step_patterns", "source"}
)

# Loading the unit, with all that it loads in turn, imports nothing heavy; its functions may, when called.
LOADS_LIGHT = NEVER_HEAVY | {PACKAGE, "checkpoint", "stream", "cli", "__main__"}

# ---------------------------------------------------------------- reading a tree

LOAD, CALL, TYPING = "when loaded", "when called", "for type checkers"


@dataclass(frozen=True)
class Import:
    """One imported module: where the statement stands, what it names and when it runs."""

    importer: str  # dotted, `rewire.edits.lora`
    line: int
    target: str  # dotted; inside rewire a module, not a name in one
    when: str

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}: imports {self.target} ({self.when})"


class Tree:
    """The modules of a package and the imports between them."""

    def __init__(self, source: Path) -> None:
        files = {module_name(path, source): path for path in sorted(source.glob(f"{PACKAGE}/**/*.py"))}
        self.modules = frozenset(files)
        self.imports = [found for name, path in files.items() for found in self._read(name, path)]

    def _read(self, name: str, path: Path) -> Iterator[Import]:
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        for node, when in timed_nodes(ast.parse(path.read_text("utf-8"), str(path)), LOAD):
            for target in imported_names(node, package):
                yield Import(name, node.lineno, self._settle(target), when)

    def _settle(self, target: str) -> str:
        """`rewire.plan.Plan` is a name in the module `rewire.plan`; other packages stay as written."""
        parts = target.split(".")
        if parts[0] != PACKAGE:
            return target
        known = (".".join(parts[:length]) for length in range(len(parts), 1, -1))
        is_unit = len(parts) > 2 or parts[-1] in ROWS  # though perhaps not written yet
        return next((name for name in known if name in self.modules), ".".join(parts[: 1 + is_unit]))


def module_name(path: Path, source: Path) -> str:
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def timed_nodes(node: ast.AST, when: str) -> Iterator[tuple[ast.stmt | ast.expr, str]]:
    """Every statement and expression with the moment at which it runs."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        for child in node.body:
            yield from timed_nodes(child, TYPING)
        for child in node.orelse:
            yield from timed_nodes(child, when)
        return
    if isinstance(node, ast.stmt | ast.expr):
        yield node, when
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and when == LOAD:
        when = CALL
    for child in ast.iter_child_nodes(node):
        yield from timed_nodes(child, when)


def imported_names(node: ast.AST, package: str) -> list[str]:
    """Absolute dotted names that a statement imports; `from a import b` may mean the module `a.b`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = absolute(node.module or "", node.level, package)
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and called_name(node) in {"import_module", "__import__"}:
        return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return []


def absolute(name: str, level: int, package: str) -> str:
    if not level:
        return name
    parents = package.split(".")
    return ".".join([*parents[: len(parents) - level + 1], *([name] if name else [])])


def called_name(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


# ---------------------------------------------------------------- the checks


def unit_of(module: str) -> str:
    """`rewire.edits.lora` belongs to `edits`; the package's own `__init__` is the unit `rewire`."""
    return module.split(".")[1] if "." in module else module


def top(target: str) -> str:
    return target.split(".")[0]


def is_own(target: str) -> bool:
    return top(target) == PACKAGE


def violations(source: Path) -> list[str]:
    """Every breach of the rules in the tree under `source`, as sentences."""
    tree = Tree(source)
    found = [f"{unit} has no place in LAYERS" for unit in sorted({unit_of(m) for m in tree.modules} - set(ROWS))]
    for one in tree.imports:
        found += [f"{one}: {reason}" for reason in reasons_against(one)]
    return found + heavy_chains(tree) + circles(tree)


def reasons_against(one: Import) -> Iterator[str]:
    yield from layer_reasons(one) if is_own(one.target) else outside_reasons(one)
    unit = unit_of(one.importer)
    allowed = SELF_CONTAINED.get(unit)
    if allowed is not None and not (
        top(one.target) in allowed | sys.stdlib_module_names or unit_of(one.target) == unit
    ):
        yield f"{unit} imports nothing but {', '.join(sorted(allowed))} and the standard library"


def layer_reasons(one: Import) -> Iterator[str]:
    importer, target = unit_of(one.importer), unit_of(one.target)
    if importer in ROWS and target in ROWS and ROWS[target] > ROWS[importer]:
        yield f"{target} lies above {importer}; imports run downwards only"
    if target in FORBIDDEN_UNITS.get(importer, ()):
        yield f"{importer} must not know {target}"


def outside_reasons(one: Import) -> Iterator[str]:
    unit, package = unit_of(one.importer), top(one.target)
    doors = DOORS.get(package)
    is_door = doors is None or unit in USERS or unit in doors or one.importer.removeprefix(f"{PACKAGE}.") in doors
    if not is_door and one.when != TYPING:
        yield f"only {', '.join(sorted(doors or ()))} may import {package}"
    if package in HEAVY and unit in NEVER_HEAVY:
        yield f"{unit} has no use for {package}"


def heavy_chains(tree: Tree) -> list[str]:
    """Modules that must load lightly but reach a heavy package, with the way there."""
    loads: dict[str, list[str]] = {}
    for one in tree.imports:
        if one.when == LOAD:
            loads.setdefault(one.importer, []).append(one.target)
    light = sorted(module for module in tree.modules if unit_of(module) in LOADS_LIGHT)
    chains = (way_to_heavy(module, loads) for module in light)
    return [f"{' -> '.join(way)}: {way[0]} must load without {top(way[-1])}" for way in chains if way]


def way_to_heavy(start: str, loads: Mapping[str, list[str]]) -> tuple[str, ...]:
    """Shortest chain of load-time imports from `start` to a heavy package; empty when there is none."""
    ways: list[tuple[str, ...]] = [(start,)]
    seen = {start}
    for way in ways:
        for target in loads.get(way[-1], []):
            if top(target) in HEAVY:
                return (*way, target)
            for module in loaded_with(target):
                if module not in seen:
                    seen.add(module)
                    ways.append((*way, module))
    return ()


def loaded_with(target: str) -> Iterable[str]:
    """Importing `rewire.edits.lora` runs `rewire` and `rewire.edits` first."""
    parts = target.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)] if is_own(target) else []


def circles(tree: Tree) -> list[str]:
    """Pairs of units that need each other, directly or round about."""
    needs: dict[str, set[str]] = {}
    for one in tree.imports:
        if is_own(one.target) and one.when != TYPING and unit_of(one.importer) != unit_of(one.target):
            needs.setdefault(unit_of(one.importer), set()).add(unit_of(one.target))
    reached = {unit: reachable(unit, needs) for unit in needs}
    units = sorted(needs)
    pairs = ((a, b) for a in units for b in units if a < b)
    return [f"{a} and {b} import each other" for a, b in pairs if b in reached[a] and a in reached[b]]


def reachable(start: str, needs: Mapping[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    todo = [start]
    while todo:
        for unit in needs.get(todo.pop(), set()) - reached:
            reached.add(unit)
            todo.append(unit)
    return reached
