"""`__all__` and a module-level `__getattr__`, divided among the generated files by the names they speak of."""

from __future__ import annotations

import ast

from rewire.source.fragments import Fragment
from rewire.source.gather import ENDING, Gatherer
from rewire.source.statements import Block, Statement


def exports(gathered: Gatherer) -> dict[str, list[Fragment]]:
    """By file type, the end of each generated file."""
    modular = gathered.modular
    found: dict[str, list[Fragment]] = {}
    for name in ENDING:
        statement = modular.file.definitions.get(name)
        if statement is None or statement.kind != "assign":
            continue
        if name == "__getattr__" and not modular.rules.module_getattr:
            continue
        parts = _all_parts(gathered, statement) if name == "__all__" else _getattr_parts(gathered, statement)
        for kind, text in parts.items():
            lead = Fragment(modular.view, statement.lead, statement.start, name)
            rest = Fragment(modular.view, statement.start, statement.end, name, f"{name} = {text}\n")
            found.setdefault(kind, []).extend((lead, rest))
    return found


def _value(gathered: Gatherer, statement: Statement) -> tuple[ast.expr, Block]:
    lines = gathered.modular.file.lines
    node = ast.parse(lines.text[statement.header : statement.end]).body[0]
    assert isinstance(node, ast.Assign)
    return node.value, Block(lines, lines.line(statement.header) - 1)


def _all_parts(gathered: Gatherer, statement: Statement) -> dict[str, str]:
    """The list is written anew, so that comments in it and a trailing comma go."""
    value, _ = _value(gathered, statement)
    names: dict[str, list[str]] = {}
    for element in value.elts if isinstance(value, ast.List) else []:
        match element:
            case ast.Constant(value=str(name)):
                names.setdefault(gathered.type_of(name), []).append(f'"{name}"')
    return {kind: f"[{', '.join(found)}]" for kind, found in names.items()}


def _getattr_parts(gathered: Gatherer, statement: Statement) -> dict[str, str]:
    """The call is written anew for each type of file, with the entries of that type."""
    value, block = _value(gathered, statement)
    if not isinstance(value, ast.Call):
        return {}
    positional = [block.text(one) for one in value.args]
    keywords: dict[str, list[str]] = {}
    for keyword in value.keywords:
        for kind, text in _entries(gathered, keyword.value, block).items():
            keywords.setdefault(kind, []).append(f"{keyword.arg}={text}")
    function = block.text(value.func)
    return {kind: f"{function}({', '.join([*positional, *found])})" for kind, found in keywords.items()}


def _entries(gathered: Gatherer, value: ast.expr, block: Block) -> dict[str, str]:
    """A dict's entries by the file type of their keys; a dict with entries of one type stays as written."""
    found: dict[str, list[str]] = {}
    for key, entry in zip(value.keys, value.values, strict=True) if isinstance(value, ast.Dict) else ():
        match key:
            case ast.Constant(value=str(name)):
                found.setdefault(gathered.type_of(name), []).append(f"{block.text(key)}: {block.text(entry)}")
    if len(found) == 1:
        return dict.fromkeys(found, block.text(value))
    return {kind: f"{{{', '.join(entries)}}}" for kind, entries in found.items()}
