"""`# Copied from package.module.Object with A->B` markers: where they stand and what they say.

A marker speaks of the class, function or method below it, without its decorators and its own name: that must be the
original with the replacements made in order. `# Ignore copy` anywhere in a member of a class takes that member out of
the comparison; `# End copy` ends it. Blank lines and formatting do not count.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

MARKER = re.compile(r"^([ \t]*)#[ \t]*Copied from[ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
GENERATED = "This file was automatically generated from "


@dataclass(frozen=True)
class Replacement:
    """One `old->new` of a marker. With `all_casing` also in lower and in upper case."""

    old: str
    new: str
    all_casing: bool = False

    def apply(self, text: str) -> str:
        """The text with every occurrence replaced.

        >>> Replacement("Bert", "MobileBert", all_casing=True).apply("Bert bert BERT")
        'MobileBert mobilebert MOBILEBERT'
        """
        text = text.replace(self.old, self.new)
        if self.all_casing:
            text = text.replace(self.old.lower(), self.new.lower()).replace(self.old.upper(), self.new.upper())
        return text


@dataclass(frozen=True)
class Marker:
    """What one marker says. `fault` tells what of it cannot be read; without a readable name `dotted` is empty."""

    path: Path
    line: int
    indent: str
    text: str
    dotted: str = ""
    replacements: tuple[Replacement, ...] = ()
    fault: str = ""


def markers(path: Path, text: str) -> Iterator[Marker]:
    """The markers of a file, in order. Text that only looks like one, inside a string, is one too.

    >>> [found] = markers(Path("m.py"), "# Copied from transformers.models.bert.modeling_bert.BertPooler with Bert->My")
    >>> found.dotted, found.replacements
    ('transformers.models.bert.modeling_bert.BertPooler', (Replacement(old='Bert', new='My', all_casing=False),))
    """
    for found in MARKER.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield _read(path, line, found.group(1), found.group(2))


_DOTTED = re.compile(r"\w+(?:\.\w+)+(?=\s|$)")


def _read(path: Path, line: int, indent: str, said: str) -> Marker:
    dotted = _DOTTED.match(said)
    if not dotted:
        return Marker(path, line, indent, said, fault="names no object of a package")
    rest = said[dotted.end() :].strip()
    replacements, fault = _replacements(rest)
    return Marker(path, line, indent, said, dotted.group(), replacements, fault)


def _replacements(text: str) -> tuple[tuple[Replacement, ...], str]:
    """What stands behind `with`, and what is wrong with it."""
    if not text:
        return (), ""
    faults = [] if re.match(r"with\s", text) else ["'with' is missing before A->B"]
    found: list[Replacement] = []
    for part in text.split(","):
        read = _PAIR.match(part)
        if not read or (read.group(3) and read.group(3) != "all-casing"):
            faults.append(f"{part.removeprefix('with').strip()!r} is not of the form A->B, without blanks")
        if read:
            found.append(Replacement(read.group(1), read.group(2), read.group(3) == "all-casing"))
    return tuple(found), "; ".join(faults)


_PAIR = re.compile(r"\s*(?:with\s+)?(\S+?)->(\S+)\s*(.*?)\s*$")


# ---------------------------------------------------------------- files with their objects


@dataclass(frozen=True, slots=True)
class Code:
    """A statement: a class, a function or (without a name) another. Lines count from 1.

    `line` is that of `class` or `def`; `inner` holds the statements of a class, and classes and functions elsewhere.
    """

    name: str
    is_class: bool
    line: int
    last: int
    column: int
    decorators: tuple[tuple[int, int], ...]
    inner: tuple[Code, ...]

    @property
    def first(self) -> int:
        """The line of the first decorator, or of `class` or `def`."""
        return min([self.line, *(line for line, _ in self.decorators)])


def _code(node: ast.stmt) -> Code:
    last = node.end_lineno or node.lineno
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return Code("", False, node.lineno, last, node.col_offset, (), ())
    is_class = isinstance(node, ast.ClassDef)
    decorators = tuple((one.lineno, one.end_lineno or one.lineno) for one in node.decorator_list)
    inner = tuple(map(_code, node.body)) if is_class else tuple(_objects(node.body))
    return Code(node.name, is_class, node.lineno, last, node.col_offset, decorators, inner)


def _objects(body: Iterable[ast.AST]) -> Iterator[Code]:
    """Classes and functions of a block; those under an `if` or `try` too."""
    for one in body:
        if isinstance(one, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield _code(one)
        else:
            for block in ("body", "orelse", "finalbody", "handlers"):
                yield from _objects(getattr(one, block, ()) if isinstance(one, _COMPOUND) else ())


_COMPOUND = (ast.If, ast.Try, ast.With, ast.For, ast.While, ast.ExceptHandler)


@dataclass(eq=False)
class Module:
    """A file with markers, or with originals. Raises `SyntaxError` where it is not valid Python."""

    path: Path
    text: str
    top: tuple[Code, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.top = tuple(_objects(ast.parse(self.text, str(self.path)).body))

    @cached_property
    def lines(self) -> list[str]:
        """The lines, each with its end."""
        return self.text.splitlines(keepends=True)

    @cached_property
    def objects(self) -> list[Code]:
        """Every class and function, in order of their `def` lines."""
        return sorted(_all(self.top), key=lambda one: one.line)

    @property
    def is_generated(self) -> bool:
        """Is it written by a converter?"""
        return GENERATED in self.text[:2000]

    def find(self, names: list[str]) -> Code | None:
        """An object by the names that lead to it; of two of one name the first."""
        inner, found = self.top, None
        for name in names:
            found = next((one for one in inner if one.name == name), None)
            if found is None:
                return None
            inner = found.inner
        return found

    def below(self, marker: Marker) -> Code | None:
        """The object that a marker speaks of: between them there is nothing but decorators and comments."""
        one = next((one for one in self.objects if one.line > marker.line), None)
        if one is None or len(marker.indent.expandtabs()) != one.column:
            return None
        decorated = {line for first, last in one.decorators for line in range(first, last + 1)}
        between = (self.lines[line - 1].strip() for line in range(marker.line + 1, one.line) if line not in decorated)
        return one if all(not text or text.startswith("#") for text in between) else None

    def span(self, one: Code) -> tuple[int, int]:
        """First line of an object, at `class` or `def`, and its last, comments at the end of the body included."""
        last = one.last
        for number in range(last + 1, len(self.lines) + 1):
            text = self.lines[number - 1]
            bare = text.strip()
            if bare and not (bare.startswith("#") and len(text) - len(text.lstrip()) > one.column):
                break
            last = number if bare else last
        return one.line, last

    def code(self, one: Code) -> str:
        """The text of an object without decorators, from the left margin on."""
        first, last = self.span(one)
        return outdented("".join(self.lines[first - 1 : last]), one.column)


def _all(inner: Iterable[Code]) -> Iterator[Code]:
    for one in inner:
        if one.name:
            yield one
            yield from _all(one.inner)


def outdented(text: str, columns: int) -> str:
    """The text moved left; lines that do not begin with so many blanks stay.

    >>> outdented("    def f():\\n        pass\\n", 4)
    'def f():\\n    pass\\n'
    """
    return re.sub(rf"^ {{{columns}}}", "", text, flags=re.MULTILINE) if columns else text


def indented(text: str, columns: int) -> str:
    """The text moved right; empty lines stay empty."""
    return re.sub(r"^(?=[^\n])", " " * columns, text, flags=re.MULTILINE) if columns else text
