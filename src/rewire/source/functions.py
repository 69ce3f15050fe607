"""The parts of a function: parameters, return annotation, statements. Read only for methods that are merged."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from rewire.source.statements import Block, Lines, Statement

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Function:
    """Positions in the file: `keyword` of `def`, the span between the parentheses, `colon`.

    `returns` is the span of `-> annotation`, empty where there is none.
    """

    keyword: int
    parameters: Span
    returns: Span
    colon: int
    body: tuple[Statement, ...]
    is_one_line: bool

    @property
    def docstring(self) -> Statement | None:
        """The string in triple double quotes that the body begins with."""
        return self.body[0] if self.body and self.body[0].kind == "string" else None


def read_function(lines: Lines, statement: Statement) -> Function:
    """Parses a function of the file on its own, so that the file's whole tree need not be kept."""
    text = lines.text[statement.header : statement.end]
    first = lines.line(statement.header)
    is_indented = bool(lines.indent(_def_line(lines, statement)))
    tree = ast.parse(f"class _:\n{text}" if is_indented else text)
    node = tree.body[0]
    if is_indented and isinstance(node, ast.ClassDef):
        node = node.body[0]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    block = Block(lines, first - (2 if is_indented else 1), keep_nodes=True)
    keyword, _ = block.span(node)
    colon = lines.colon(keyword)
    opening = lines.code.index("(", keyword + len(node.name))
    closing = lines.code.rindex(")", opening, colon if node.returns is None else block.span(node.returns)[0])
    header_line = lines.line(colon)
    is_one_line = node.body[0].lineno + block.shift == header_line
    last = lines.line(statement.end - 1)
    body = block.one_line(node) if is_one_line else block.read(node.body, header_line + 1, last + 1)
    return Function(keyword, (opening + 1, closing), (closing + 1, colon), colon, tuple(body), is_one_line)


def _def_line(lines: Lines, statement: Statement) -> int:
    """Comments may stand between the decorators and `def`."""
    line = lines.line(statement.header)
    while lines.is_comment(line) or not lines[line].strip():
        line += 1
    return line


_COMMA = re.compile(r"[()\[\]{},]")
_DEPTH = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def split_at_commas(code: str, span: Span) -> Iterator[Span]:
    """The parts between the commas of a parenthesis; the last is empty after a trailing comma.

    >>> code = "f(a, b=(1, 2),)"
    >>> [code[slice(*part)] for part in split_at_commas(code, (2, 14))]
    ['a', ' b=(1, 2)', '']
    """
    start, end = span
    depth = 0
    for mark in _COMMA.finditer(code, start, end):
        depth += _DEPTH.get(mark.group(), 0)
        if mark.group() == "," and not depth:
            yield start, mark.start()
            start = mark.end()
    yield start, end
