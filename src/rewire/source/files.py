"""A Python file as the converter sees it: top-level statements, what they define, imports. Read once, never changed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from rewire.source.functions import Function, read_function
from rewire.source.import_statements import Guard, Import, plain_imports, without_indent
from rewire.source.indent import indented_by_four, is_indented_by_four
from rewire.source.lex import WORD, Token, code_only, lowered, tokens
from rewire.source.statements import Block, ClassStatement, Lines, Statement

Words = frozenset[str]
Span = tuple[int, int]


@dataclass(eq=False)
class SourceFile:
    """A parsed file. Raises `SyntaxError` where it is not valid Python.

    `definitions` holds classes, functions and plain assignments by name: a name that is defined twice has its first
    place and its last definition. `satellites` are `NAME[...] = value` and `NAME.attr = value`, by NAME.
    """

    path: Path
    text: str
    tokens: list[Token] = field(init=False)
    lines: Lines = field(init=False)
    statements: list[Statement] = field(init=False)
    definitions: dict[str, Statement] = field(default_factory=dict, init=False)
    satellites: dict[str, list[Statement]] = field(default_factory=dict, init=False)
    imports: list[Import | Guard] = field(init=False)
    """Import statements at module level, then the `if` statements that hold some."""
    _functions: dict[int, Function] = field(default_factory=dict, init=False)
    _words: dict[Span, Words] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.text.endswith("\n"):
            self.text += "\n"
        tree = ast.parse(self.text, str(self.path))
        if not is_indented_by_four(tree):
            self.text = indented_by_four(self.text)
            tree = ast.parse(self.text, str(self.path))
        self.tokens = tokens(self.text)
        self.lines = Lines(self.text, code_only(self.text, self.tokens))
        block = Block(self.lines, keep_nodes=True)
        self.statements = list(block.read(tree.body, 1, len(self.lines.starts))) if tree.body else []
        if self.statements:
            self.statements[0].lead = self.statements[0].start  # the lines above are the file's head
        self.imports = [*self._plain_imports(), *self._guarded_imports()]
        self._record()
        for one in self.statements:
            _forget_tree(one)

    def _record(self) -> None:
        for one in self.statements:
            node = one.node
            if one.kind in ("class", "function"):
                self.definitions[one.name] = one
            elif isinstance(node, ast.Assign) and len(node.targets) == 1:
                target = node.targets[0]
                if isinstance(target, ast.Name):
                    self.definitions[one.name] = one
                elif isinstance(target, ast.Subscript | ast.Attribute) and isinstance(target.value, ast.Name):
                    self.satellites.setdefault(target.value.id, []).append(one)

    # ------------------------------------------------------------ text

    @property
    def head(self) -> str:
        """The lines above the first statement."""
        return self.text[: self.statements[0].start] if self.statements else self.text

    @cached_property
    def lower(self) -> str:
        """The text in lower case."""
        return lowered(self.text)

    def words(self, start: int, end: int) -> Words:
        """Identifiers (and keywords) in a part of the file."""
        found = self._words.get((start, end))
        if found is None:
            found = self._words[start, end] = frozenset(WORD.findall(self.lines.code, start, end))
        return found

    def function(self, statement: Statement) -> Function:
        """The parts of a function or method of this file."""
        found = self._functions.get(statement.start)
        if found is None:
            found = self._functions[statement.start] = read_function(self.lines, statement)
        return found

    # ------------------------------------------------------------ imports

    @cached_property
    def from_imports(self) -> list[tuple[Span, Span]]:
        """Every `from module import names`, those inside functions too: where it stands, and where its module."""
        return [(found.span(), found.span(1)) for found in _FROM.finditer(self.lines.code)]

    @property
    def all_imports(self) -> Iterator[Import]:
        """Every import at module level, and every `from` import elsewhere."""
        yield from plain_imports(self.imports)
        for (start, end), (module, _) in self.from_imports:
            line = self.lines.line(module)
            if self.lines.indent(line):
                node = ast.parse(self.lines.code[start:end].strip()).body[0]
                assert isinstance(node, ast.ImportFrom)
                yield replace(self._import(node), line=line)

    def _plain_imports(self) -> Iterator[Import]:
        for one in self.statements:
            if isinstance(one.node, ast.Import | ast.ImportFrom):
                yield replace(self._import(one.node), lead=self.text[one.lead : one.start])

    def _guarded_imports(self) -> Iterator[Guard]:
        for one in self.statements:
            if one.node is not None:
                lead = self.text[one.lead : one.start]
                yield from (replace(guard, lead=lead) for guard in self._guards(one.node))

    def _guards(self, node: ast.stmt) -> Iterator[Guard]:
        """Every `if` with imports, however deep, outside functions and classes."""
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.If) and any(isinstance(one, ast.Import | ast.ImportFrom) for one in node.body):
            yield self._guard(node)
        for block in ("body", "orelse", "finalbody"):
            for one in getattr(node, block, []):
                yield from self._guards(one)

    def _guard(self, node: ast.If) -> Guard:
        test = Block(self.lines).text(node.test)
        code = next((one.lineno for one in node.body if not isinstance(one, _IN_GUARD)), 0)
        kept = (one for one in node.body if isinstance(one, _IN_GUARD))
        body = tuple(self._guard(one) if isinstance(one, ast.If) else self._import(one) for one in kept)
        rest = (0, 0)
        if node.orelse:
            after = (node.body[-1].end_lineno or node.lineno) + 1
            rest = self.lines.start(after), self.lines.start((node.end_lineno or after) + 1)
        return Guard(test, body, without_indent(self.text[slice(*rest)]), "", self.path, node.lineno, rest, code)

    def _import(self, node: ast.Import | ast.ImportFrom) -> Import:
        module = "." * node.level + (node.module or "") if isinstance(node, ast.ImportFrom) else None
        names = tuple((one.name, one.asname) for one in node.names)
        return Import(module, names, path=self.path, line=node.lineno)


_IN_GUARD = (ast.Import, ast.ImportFrom, ast.If)
_FROM = re.compile(r"^[ \t]*from[ \t]+([.\w]+)[ \t]+import\b[ \t]*(?:\([^)]*\)|[^\n]*)", re.MULTILINE)


def _forget_tree(statement: Statement) -> None:
    """A file's tree is many times as large as its text."""
    statement.node = None
    if isinstance(statement, ClassStatement):
        for one in statement.members:
            _forget_tree(one)
