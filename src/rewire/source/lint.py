"""What conversion passes over in silence: words cut by renaming, functions nobody calls, names that mean nothing."""

from __future__ import annotations

import builtins
import re
import symtable
from collections.abc import Iterable, Iterator
from pathlib import Path

from rewire.source.build import Conversion, Workspace, collector_paused, workspace
from rewire.source.errors import RULES, Problem, SourceError
from rewire.source.fragments import Definition, Fragment
from rewire.source.import_statements import plain_imports
from rewire.source.lex import WORD, code_only, tokens
from rewire.source.render import Generated
from rewire.source.rules import Rules

LINT_RULES = RULES | {
    "word-renamed": "the renaming of a model has changed an ordinary word",
    "orphan": "a function came along that nothing in the generated file uses",
    "undefined-name": "the generated file uses a name that it neither defines nor imports",
}
"""Every rule that a finding can name, with what it means."""


def lint(
    paths: Iterable[str | Path],
    *,
    package_root: str | Path | None = None,
    rules: str | Rules | None = None,
    ruff: str | None = None,
) -> list[Problem]:
    """Findings about modular files, file by file; one that cannot be converted has its errors."""
    shop = workspace(package_root, "disk", rules, ruff)
    with collector_paused():
        return [one for path in paths for one in _linted(Path(path).resolve(), shop)]


def _linted(path: Path, shop: Workspace) -> list[Problem]:
    try:
        conversion = shop.convert(path)
    except SourceError as error:
        return list(error.problems)
    found = [*conversion.problems, *_renamed_words(conversion)]
    for one in conversion.files:
        found += [*_orphans(one), *_undefined(one)]
    return list(dict.fromkeys(found))


def _problem(fragment: Fragment, position: int, length: int, rule: str, message: str, instead: str = "") -> Problem:
    lines = fragment.view.file.lines
    line = lines.line(position)
    column = position - lines.start(line) + 1
    return Problem(fragment.view.file.path, line, column, rule, message, instead, "warning", column + length)


# ---------------------------------------------------------------- renaming


def _renamed_words(conversion: Conversion) -> Iterator[Problem]:
    """Each word once a generated file, with how often it is hit."""
    for generated in conversion.files:
        hits: dict[tuple[str, str], list[tuple[Fragment, int]]] = {}
        for fragment in (fragment for one in generated.definitions for fragment in one.fragments):
            for start, before, after in _cut_words(fragment):
                hits.setdefault((before, after), []).append((fragment, start))
        for (before, after), places in hits.items():
            fragment, start = places[0]
            times = f" ({len(places)} times)" if len(places) > 1 else ""
            message = f"{before!r} becomes {after!r} in {generated.name}{times}"
            instead = f"write what holds it anew in {conversion.path.name}"
            yield _problem(fragment, start, len(before), "word-renamed", message, instead)


_WORD = re.compile(r"\w+")


def _cut_words(fragment: Fragment) -> Iterator[tuple[int, str, str]]:
    """Start, word and renamed word wherever the model's name was no word, or part of a word, of its own."""
    if fragment.new is not None:
        return
    text = fragment.view.file.text
    for start, end, new in fragment.view.substitutions or ():
        if fragment.start <= start < fragment.end and is_cut(text, start, end):
            first = start
            while first and (text[first - 1].isalnum() or text[first - 1] == "_"):
                first -= 1
            word = _WORD.match(text, first)
            last = word.end() if word else end
            yield first, text[first:last], f"{text[first:start]}{new}{text[end:last]}"


def is_cut(text: str, start: int, end: int) -> bool:
    """Does a lower-case letter follow, so that what was found is the beginning of another word?

    >>> [is_cut(text, 0, 3) for text in ("sample", "SamModel", "sam_model", "sam2", "Sams", "sam")]
    [True, False, False, False, False, False]
    """
    found, rest = text[start:end], re.match(r"[a-z]*", text[end:])
    follows = rest.group() if rest else ""
    return found[-1:].isalnum() and "\n" not in found and follows not in ("", "s")


# ---------------------------------------------------------------- what came along


def _orphans(generated: Generated) -> Iterator[Problem]:
    ending = "".join(one.text for one in generated.ending)
    said = set(WORD.findall(ending))
    for one in generated.definitions:
        others = (other.words for other in generated.definitions if other is not one)
        if one.kind == "function" and one.name not in said and not any(one.name in words for words in others):
            fragment = one.fragments[0]
            start = _position(one, one.name)[1]
            message = f"nothing in {generated.name} uses {one.name}"
            yield _problem(fragment, start, len(one.name), "orphan", message)


def _position(definition: Definition, name: str) -> tuple[Fragment, int]:
    """Where a name stands in the sources of a definition."""
    for fragment in definition.fragments:
        if fragment.new is None and name in fragment.words:
            view = fragment.view
            for found in WORD.finditer(view.file.lines.code, fragment.start, fragment.end):
                if view.word(found.group()) == name:
                    return fragment, found.start()
    return definition.fragments[0], definition.fragments[0].start


# ---------------------------------------------------------------- names

_ALWAYS = frozenset(dir(builtins)) | {"__file__", "__name__", "__doc__", "__package__", "__spec__", "__class__"}


def _undefined(generated: Generated) -> Iterator[Problem]:
    bound = {name.partition(".")[0] for one in plain_imports(generated.imports) for name in one.bound()}
    known = _ALWAYS | bound | {one.name for one in generated.definitions}
    if "*" in bound:
        return
    for one in generated.definitions:
        words = set(WORD.findall(code_only(one.text, tokens(one.text))))
        for name in sorted((words - known) & set(global_names(one.text))):
            fragment, start = _position(one, name)
            message = f"{one.name} in {generated.name} uses {name}, which is neither defined nor imported there"
            instead = "import it, or define it in the modular file"
            yield _problem(fragment, start, len(name), "undefined-name", message, instead)


def global_names(text: str) -> Iterator[str]:
    """Names that a piece of code reads and does not bind itself.

    >>> sorted(set(global_names("def f(x):\\n    import a\\n    return a.b(x, [y for y in z])\\n")))
    ['z']
    """
    try:
        table = symtable.symtable(text, "generated", "exec")
    except SyntaxError:
        return
    own = {one.get_name() for one in table.get_symbols() if one.is_assigned() or one.is_imported()}
    for scope in _scopes(table):
        for symbol in scope.get_symbols():
            if symbol.is_referenced() and (symbol.is_global() or scope is table) and symbol.get_name() not in own:
                yield symbol.get_name()


def _scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _scopes(child)
