"""Statements with everything that belongs to them: the lines above, decorators, the comment behind, footers.

A statement owns the blank and comment lines directly above it. A block owns the comments behind its last
statement that are indented as deep as the block; what stands further left belongs to the next statement outside.
So a block falls into statements without gaps, and one can be cut out or put elsewhere as text.
"""

from __future__ import annotations

import ast
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["class", "function", "assign", "annotated", "import", "if", "string", "delete", "other"]


class Lines:
    """A text, the same text with only its code left, and where its lines begin."""

    def __init__(self, text: str, code: str) -> None:
        assert text.endswith("\n")
        self.text = text
        self.code = code
        self.starts = [0]
        position = text.find("\n") + 1
        while position:
            self.starts.append(position)
            position = text.find("\n", position) + 1
        self.is_ascii = text.isascii()

    def start(self, line: int) -> int:
        """First character of a line; lines count from 1, and the line behind the last starts at the end."""
        return self.starts[line - 1]

    def line(self, position: int) -> int:
        """The line of a character."""
        return bisect_right(self.starts, position)

    def at(self, line: int, column: int) -> int:
        """The character at a line and byte column, as `ast` counts them."""
        start = self.start(line)
        if self.is_ascii:
            return start + column
        return start + len(self.text[start : self.start(line + 1)].encode()[:column].decode())

    def __getitem__(self, line: int) -> str:
        return self.text[self.start(line) : self.start(line + 1)]

    def indent(self, line: int) -> str:
        """The white space a line begins with."""
        text = self[line]
        return text[: len(text) - len(text.lstrip())]

    def is_comment(self, line: int) -> bool:
        """Is there nothing but a comment on the line?"""
        return self[line].lstrip().startswith("#")

    def colon(self, position: int) -> int:
        """The colon that ends the `class` or `def` line beginning at `position`."""
        depth = 0
        while mark := _MARKS.search(self.code, position):
            position = mark.end()
            if mark.group() == ":" and not depth:
                return mark.start()
            depth += _DEPTH.get(mark.group(), 0)
        return len(self.code)


_MARKS = re.compile(r"[()\[\]{}:]")
_DEPTH = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


@dataclass(slots=True, eq=False)
class Statement:
    """One line of simple statements, or one compound statement; positions are characters of its file.

    `lead` to `start`: the lines above; `start` to `header`: decorators; `header` to `end`: the rest, footers
    included. Without decorators `header` equals `start`.
    """

    kind: Kind
    name: str
    lead: int
    start: int
    header: int
    end: int
    decorators: tuple[tuple[int, int], ...] = ()
    node: ast.stmt | None = None


@dataclass(slots=True, eq=False)
class ClassStatement(Statement):
    """A class with its members. `bases` and `keywords` are spans of what stands in its parentheses."""

    keyword: int = 0
    colon: int = 0
    type_parameters: str = ""
    bases: tuple[tuple[int, int], ...] = ()
    keywords: tuple[tuple[int, int], ...] = ()
    comma: str = ""
    members: list[Statement] = field(default_factory=list)


@dataclass(slots=True)
class Block:
    """Reads the statements of one block. `shift` is added to the line numbers of the nodes."""

    lines: Lines
    shift: int = 0
    keep_nodes: bool = False

    def read(self, nodes: Sequence[ast.stmt], first: int, limit: int) -> Iterator[Statement]:
        """Statements of a block that may own the lines from `first` to before `limit`."""
        groups = list(_by_line(nodes))
        for number, group in enumerate(groups):
            after = self._first_line(groups[number + 1][0]) if number + 1 < len(groups) else limit
            end = self._end(group[-1], after)
            yield self._statement(group, first, end)
            first = end + 1

    def span(self, node: ast.expr | ast.stmt | ast.arg | ast.keyword) -> tuple[int, int]:
        """Where a node stands."""
        start = self.lines.at(node.lineno + self.shift, node.col_offset)
        return start, self.lines.at((node.end_lineno or node.lineno) + self.shift, node.end_col_offset or 0)

    def text(self, node: ast.expr | ast.stmt) -> str:
        """What stands there."""
        return self.lines.text[slice(*self.span(node))]

    def _first_line(self, node: ast.stmt) -> int:
        decorators = node.decorator_list if isinstance(node, DECORATED) else []
        return min([node.lineno, *(decorator.lineno for decorator in decorators)]) + self.shift

    def _end(self, node: ast.stmt, limit: int) -> int:
        """Last line of a statement, with the footers of the blocks that end with it, innermost first."""
        end = (node.end_lineno or node.lineno) + self.shift
        block = _last_block(node)
        if (
            end + 1 >= limit
            or not block
            or "#" not in self.lines.text[self.lines.start(end + 1) : self.lines.start(limit)]
        ):
            return end
        first = self._first_line(block[0])
        indent = self.lines.text[self.lines.start(first) : self.lines.at(first, block[0].col_offset)]
        if indent.strip():  # the block stands behind the colon
            return end
        end = self._end(block[-1], limit)
        footers = (line for line in range(limit - 1, end, -1) if self.lines.is_comment(line))
        return next((line for line in footers if self.lines.indent(line).startswith(indent)), end)

    def _statement(self, group: list[ast.stmt], first: int, end: int) -> Statement:
        node = group[0]
        kind, name = classify(node, self.text) if len(group) == 1 else ("other", "")
        start = header = self._first_line(node)
        decorators: tuple[tuple[int, int], ...] = ()
        if isinstance(node, DECORATED) and node.decorator_list:
            ends = [(one.end_lineno or one.lineno) + 1 + self.shift for one in node.decorator_list]
            header = ends[-1]
            decorators = tuple(zip(map(self.lines.start, [start, *ends]), map(self.lines.start, ends), strict=False))
        line = self.lines.start
        positions = (line(first), line(start), line(header), line(end + 1))
        kept = node if self.keep_nodes else None
        if isinstance(node, ast.ClassDef):
            return ClassStatement(kind, name, *positions, decorators, kept, **self._class_parts(node, end))
        return Statement(kind, name, *positions, decorators, kept)

    def _class_parts(self, node: ast.ClassDef, end: int) -> dict[str, Any]:
        start, _ = self.span(node)
        colon = self.lines.colon(start)
        bases, keywords = tuple(map(self.span, node.bases)), tuple(map(self.span, node.keywords))
        arguments = sorted(bases + keywords)
        is_comma = arguments and self.lines.code[arguments[-1][1] : colon].lstrip().startswith(",")
        opening = self.lines.line(colon)
        is_one_line = opening == node.body[0].lineno + self.shift
        head = self.lines.code[start:colon].partition("(")[0]
        return {
            "keyword": start,
            "colon": colon,
            "type_parameters": head[head.index("[") :].rstrip() if "[" in head else "",
            "bases": bases,
            "keywords": keywords,
            "comma": "," if is_comma else "",
            "members": list(self.one_line(node)) if is_one_line else list(self.read(node.body, opening + 1, end + 1)),
        }

    def one_line(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[Statement]:
        """Members behind the colon of `class X: x = 1`."""
        for one in node.body:
            start, end = self.span(one)
            yield Statement(*classify(one, self.text), start, start, start, end, (), one if self.keep_nodes else None)


DECORATED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _by_line(nodes: Sequence[ast.stmt]) -> Iterator[list[ast.stmt]]:
    """Statements that share a line, separated by semicolons, come together."""
    group: list[ast.stmt] = []
    for node in nodes:
        if group and node.lineno != group[-1].end_lineno:
            yield group
            group = []
        group.append(node)
    yield group


def _last_block(node: ast.stmt) -> list[ast.stmt]:
    """The statements of a compound statement's last block."""
    cases = getattr(node, "cases", [])
    handlers = getattr(node, "handlers", [])
    blocks: list[list[ast.stmt]] = [
        getattr(node, "finalbody", []),
        getattr(node, "orelse", []),
        handlers[-1].body if handlers else [],
        cases[-1].body if cases else [],
        getattr(node, "body", []),
    ]
    return next((block for block in blocks if block), [])


def classify(node: ast.stmt, text: Callable[[ast.expr | ast.stmt], str]) -> tuple[Kind, str]:
    """Kind of a statement and the name it goes by: what it defines, or the text of its first target."""
    match node:
        case ast.ClassDef(name=name):
            return "class", name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return "function", name
        case ast.Assign(targets=[target, *_]):
            return "assign", target.id if isinstance(target, ast.Name) else text(target)
        case ast.AnnAssign(target=target):
            return "annotated", text(target)
        case ast.Import() | ast.ImportFrom():
            return "import", ""
        case ast.If():
            return "if", ""
        case ast.Delete(targets=[target]):
            return "delete", text(target)
        case ast.Expr(value=ast.Constant(value=str())) if '"""' in text(node):
            return "string", ""
    return "other", ""
