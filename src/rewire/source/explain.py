"""Where every line of a generated file came from, and every class, method, attribute, function and import in it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal

from rewire.errors import RewireError
from rewire.source.build import convert
from rewire.source.fragments import Fragment, Origin
from rewire.source.import_statements import plain_imports
from rewire.source.modules import generating_file
from rewire.source.render import Generated
from rewire.source.rules import Rules
from rewire.source.tidy import find_ruff, tidy

Kind = Literal["class", "method", "attribute", "function", "assignment", "import"]


@dataclass(frozen=True)
class Entry:
    """One named thing of a generated file, with its lines and their origins in order.

    For a class these are the origins of its first lines, down to its docstring.
    """

    kind: Kind
    name: str
    line: int
    last_line: int
    origins: tuple[Origin, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "kind": self.kind,
            "name": self.name,
            "line": self.line,
            "last_line": self.last_line,
            "origins": [
                {
                    "file": str(one.path),
                    "line": one.line,
                    "last_line": one.last_line,
                    "renamed": list(one.renamed) if one.renamed else None,
                }
                for one in self.origins
            ],
        }


@dataclass(frozen=True)
class Explanation:
    """A generated file as its modular file gives it, with the origin of each line (of the banner there is none)."""

    path: Path
    modular: Path
    text: str
    origins: tuple[Origin | None, ...]
    entries: tuple[Entry, ...]

    def named(self, name: str | None) -> list[Entry]:
        """The entries of that name with what is inside them; all without a name."""
        return [one for one in self.entries if name is None or one.name == name or one.name.startswith(f"{name}.")]


def explain(
    path: str | Path,
    *,
    package_root: str | Path | None = None,
    rules: str | Rules | None = None,
    ruff: str | None = None,
) -> list[Explanation]:
    """Explains a generated file, or all files that a modular file gives.

    Raises `SourceError` where the modular file cannot be converted, `RewireError` where no modular file is behind it.
    """
    path = Path(path).resolve()
    modular = path if path.stem.startswith("modular_") else generating_file(path)
    if modular is None:
        raise RewireError(f"{path.name} is not generated: there is no modular file beside it")
    conversion = convert(modular, package_root=package_root, rules=rules, ruff=ruff)
    wanted = [one for one in conversion.files if path in (modular, modular.with_name(one.name))]
    if not wanted:
        raise RewireError(f"{modular.name} gives {', '.join(conversion.texts)}, but no {path.name}")
    texts = tidy({one.name: one.text for one in wanted}, find_ruff(ruff))
    return [_explained(one, modular, texts[one.name]) for one in wanted if one.name in texts]


def _explained(generated: Generated, modular: Path, text: str) -> Explanation:
    raw = list(_raw_lines(generated, modular))
    origins = _aligned(raw, text.splitlines())
    imported = {
        name: Origin(one.path, one.line, one.line)
        for one in plain_imports(reversed(generated.imports))
        if one.path
        for name in one.bound()
    }
    for one in _import_nodes(text):
        found = [imported[name] for name in _bound(one) if name in imported]
        for line in range(one.lineno, (one.end_lineno or one.lineno) + 1):
            origins[line - 1] = found[0] if found else None
    entries = tuple(_entries(ast.parse(text), origins, imported))
    return Explanation(modular.with_name(generated.name), modular, text, tuple(origins), entries)


# ---------------------------------------------------------------- lines

Line = tuple[str, Origin | None]


def _raw_lines(generated: Generated, modular: Path) -> Iterator[Line]:
    """The lines before formatting, each with the origin of the first code on it."""
    head = generated.head.splitlines()
    banner = 6
    for number, text in enumerate(head):
        yield text, Origin(modular, number - banner + 1, number - banner + 1) if number >= banner else None
    fragments = [fragment for one in generated.definitions for fragment in one.fragments]
    line, origin = "", None
    for text, source in _pieces([*fragments, *generated.ending]):
        origin = origin or (source if text.strip() else None)
        line += text
        if text.endswith("\n"):
            yield line.rstrip("\n"), origin
            line, origin = "", None


def _pieces(fragments: Iterable[Fragment]) -> Iterator[Line]:
    """Whole or partial lines with where they came from."""
    for one in fragments:
        origin = one.origin
        for number, text in enumerate(one.text.splitlines(keepends=True)):
            line = origin.line + number if one.new is None else origin.line
            yield text, Origin(origin.path, line, line, origin.renamed)


def _aligned(raw: Sequence[Line], lines: Sequence[str]) -> list[Origin | None]:
    """The origins of the formatted lines. Where the formatter has broken up lines, in the order of these."""
    numbered = [(text.strip(), origin) for text, origin in raw if text.strip()]
    numbers = [number for number, text in enumerate(lines) if text.strip()]
    matcher = SequenceMatcher(None, [text for text, _ in numbered], [lines[number].strip() for number in numbers])
    found: list[Origin | None] = [None] * len(lines)
    for _, start, end, first, last in matcher.get_opcodes():
        for offset, number in enumerate(numbers[first:last]):
            if start < end:
                found[number] = numbered[min(start + offset, end - 1)][1]
    return found


# ---------------------------------------------------------------- names


def _import_nodes(text: str) -> Iterator[ast.Import | ast.ImportFrom]:
    for one in ast.parse(text).body:
        for node in ast.walk(one) if isinstance(one, ast.If) else (one,):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield node


def _bound(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [one.asname or one.name for one in node.names]


def _entries(tree: ast.Module, origins: Sequence[Origin | None], imported: dict[str, Origin]) -> Iterator[Entry]:
    for one in tree.body:
        for node in ast.walk(one) if isinstance(one, ast.If) else (one,):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name in _bound(node):
                    found = (imported[name],) if name in imported else ()
                    yield Entry("import", name, node.lineno, node.end_lineno or node.lineno, found)
        if isinstance(one, ast.ClassDef):
            yield _entry("class", one.name, one, origins, _head_end(one))
            for member in one.body:
                kind: Kind = "method" if isinstance(member, _FUNCTION) else "attribute"
                if name := _name(member):
                    yield _entry(kind, f"{one.name}.{name}", member, origins)
        elif name := _name(one):
            yield _entry("function" if isinstance(one, _FUNCTION) else "assignment", name, one, origins)


_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def _name(node: ast.stmt) -> str:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return name
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
    return ""


def _head_end(node: ast.ClassDef) -> int:
    """The last line of a class's own lines: the docstring, or the line above the first member."""
    first = node.body[0]
    if isinstance(first, ast.Expr):
        return first.end_lineno or first.lineno
    return max(node.lineno, _first(first) - 1)


def _first(node: ast.stmt) -> int:
    decorated = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.decorator_list
    return min(node.lineno, decorated[0].lineno) if decorated else node.lineno


def _entry(kind: Kind, name: str, node: ast.stmt, origins: Sequence[Origin | None], last: int = 0) -> Entry:
    first, end = _first(node), node.end_lineno or node.lineno
    return Entry(kind, name, first, end, tuple(_ranges(origins[first - 1 : last or end])))


def _ranges(origins: Iterable[Origin | None]) -> Iterator[Origin]:
    """Neighbouring lines of one file as one origin."""
    current: Origin | None = None
    for one in origins:
        if one is None:
            continue
        if current and current.path == one.path and current.line <= one.line <= current.last_line + _GAP:
            last = max(current.last_line, one.last_line)
            current = Origin(one.path, current.line, last, current.renamed or one.renamed)
        else:
            if current:
                yield current
            current = one
    if current:
        yield current


_GAP = 3  # blank lines and comments between statements, or a line that the formatter has joined
