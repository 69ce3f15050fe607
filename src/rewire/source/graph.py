"""Which modular file inherits from which. Nothing is parsed for it: without strings and comments, lines tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rewire.source.lex import code_only, tokens
from rewire.source.modules import Package, ParentModule, generating_file, package_around, parent_module
from rewire.source.names import Names, file_type
from rewire.source.rules import NEWEST, Rules

_FROM = re.compile(r"^[ \t]*from[ \t]+([.\w]+)[ \t]+import\b", re.MULTILINE)
_CLASS = re.compile(r"^class[ \t]+(\w+)", re.MULTILINE)
_ALL = re.compile(r"^__all__[ \t]*=[ \t]*\[", re.MULTILINE)


@dataclass(frozen=True)
class Outline:
    """What a modular file inherits from and which types of files it gives."""

    path: Path
    parents: tuple[ParentModule, ...]
    kinds: frozenset[str]


def outline(path: Path, names: Names, package: Package | None = None, rules: Rules = NEWEST) -> Outline:
    """Reads a modular file for its parents and the files it gives."""
    text = path.read_text("utf-8-sig")
    found = tokens(text)
    code = code_only(text, found)
    package = package or package_around(path)
    modules = (parent_module(one.group(1), path, package) for one in _FROM.finditer(code))
    parents = {one.path: one for one in modules if one and one.model != "auto"}
    classes = _CLASS.findall(code)
    if exported := _ALL.search(code):
        end = code.find("]", exported.end())
        classes += [text[one.start : one.end].strip("\"'") for one in found if exported.end() <= one.start < end]
    cased = names.cased(path.stem.removeprefix("modular_"))
    kinds = frozenset(file_type(name, cased, rules) for name in classes)
    return Outline(path, tuple(parents.values()), kinds)


def inheritance(outlines: Mapping[Path, Outline]) -> dict[Path, tuple[Path, ...]]:
    """By modular file, those among the outlines that give its parent files."""
    return {path: tuple(dict.fromkeys(_generating(one, outlines))) for path, one in outlines.items()}


def _generating(one: Outline, outlines: Mapping[Path, Outline]) -> Iterable[Path]:
    for parent in one.parents:
        source = generating_file(parent.path)
        if source and source in outlines and parent.kind in outlines[source].kinds:
            yield source


def levels(graph: Mapping[Path, Iterable[Path]]) -> list[list[Path]]:
    """The files by depth: each inherits only from files of earlier lists. Those in or above a circle are missing.

    >>> a, b, c = map(Path, "abc")
    >>> [[str(path) for path in level] for level in levels({c: [b], a: [], b: [a]})]
    [['a'], ['b'], ['c']]
    """
    found: list[list[Path]] = []
    done: set[Path] = set()
    left = dict(graph)
    while ready := [path for path, parents in left.items() if done.issuperset(parents)]:
        found.append(ready)
        done.update(ready)
        for path in ready:
            del left[path]
    return found


def circle(graph: Mapping[Path, Iterable[Path]], start: Path) -> list[Path]:
    """A chain of inheritance from a file that leads into a circle, up to the first file that comes twice."""
    levelled = {path for level in levels(graph) for path in level}
    chain = [start]
    while chain[-1] not in chain[:-1]:
        chain.append(next(parent for parent in graph[chain[-1]] if parent not in levelled))
    return chain
