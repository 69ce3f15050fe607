"""Code that is indented by two spaces or by tabs, indented by four, so that it fits between a parent's lines."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator


def is_indented_by_four(tree: ast.Module) -> bool:
    """Are the members of all top-level classes indented by four columns?"""
    return all(
        node.body[0].col_offset == 4 or node.body[0].lineno == node.lineno
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    )


def indented_by_four(text: str) -> str:
    """The same code with four spaces a level. Lines inside brackets and strings stay as they are.

    >>> print(indented_by_four("class A:\\n  def f(self):\\n    # why\\n    return '''\\n  x'''\\n"), end="")
    class A:
        def f(self):
            # why
            return '''
      x'''
    """
    lines = text.splitlines(keepends=True)
    for number, level in _levels(text):
        line = lines[number - 1]
        lines[number - 1] = " " * (4 * level) + line.lstrip(" \t")
    return "".join(lines)


def _levels(text: str) -> Iterator[tuple[int, int]]:
    """Lines that begin a statement or a comment, with how deep they stand."""
    columns = [0]
    is_start = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        column = token.start[1]
        if token.type == tokenize.INDENT:
            columns.append(len(token.string))
        elif token.type == tokenize.DEDENT:
            columns.pop()
        elif token.type == tokenize.NEWLINE:
            is_start = True
        elif is_start and token.type == tokenize.COMMENT:
            yield token.start[0], sum(one <= column for one in columns) - (column <= columns[-1])
        elif is_start and token.type not in (tokenize.NL, tokenize.ENDMARKER):
            yield token.start[0], len(columns) - 1
            is_start = False
