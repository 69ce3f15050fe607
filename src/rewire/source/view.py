"""A parent file under a renaming: identifiers, strings and comments, but not the text of f-strings.

The file is never changed. A `View` holds what is to be substituted, and gives the renamed text of any part of the file.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from rewire.source.files import SourceFile, Span
from rewire.source.import_statements import Guard, Import, without_indent
from rewire.source.lex import WORD
from rewire.source.names import type_of_module
from rewire.source.rename import Renaming, Substitution


@dataclass(eq=False)
class View:
    """A file under a renaming (none: as it is). Positions are always those of the file.

    `model` is the model that the generated files belong to. `home` is the file's package if they go to another
    package: relative imports, which would mean something else there, are made absolute.
    """

    file: SourceFile
    renaming: Renaming | None = None
    model: str = ""
    home: str = ""
    substitutions: list[Substitution] | None = None
    _starts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        if self.substitutions is None:
            self.substitutions = sorted(_substitutions(self, self.renaming)) if self.renaming else []
        self._starts = [start for start, _, _ in self.substitutions]

    def text(self, start: int, end: int) -> str:
        """The renamed text of a part."""
        first, last = bisect_left(self._starts, start), bisect_left(self._starts, end)
        if first == last:
            return self.file.text[start:end]
        parts: list[str] = []
        for begin, stop, new in (self.substitutions or [])[first:last]:
            parts += [self.file.text[start:begin], new]
            start = stop
        return "".join([*parts, self.file.text[start:end]])

    def word(self, name: str) -> str:
        """An identifier of the file, renamed."""
        return self.renaming.word(name) if self.renaming else name

    def code(self, text: str) -> str:
        """A piece of code without strings, renamed."""
        return WORD.sub(lambda found: self.word(found.group()), text)

    def words(self, start: int, end: int) -> set[str]:
        """The renamed identifiers of a part."""
        found = self.file.words(start, end)
        return self.renaming.words(found) if self.renaming else set(found)

    def again(self, renaming: Renaming, start: int, end: int) -> View:
        """The view with a second renaming, of strings and comments alone, inside a part."""
        first = bisect_left(self.file.tokens, (start,))
        last = bisect_left(self.file.tokens, (end,))
        changed: dict[Span, str] = {}
        for token in self.file.tokens[first:last]:
            before = self.text(token.start, token.end)
            is_fixed = token.kind == "ftext" or before.strip('"') in renaming.kept
            if not is_fixed and (after := renaming.apply(before)) != before:
                changed[token.start, token.end] = after
        if not changed:
            return self
        spans = sorted(changed)
        outside = [one for one in self.substitutions or [] if not _is_inside(one[0], spans)]
        return replace(self, substitutions=sorted([*outside, *((*span, text) for span, text in changed.items())]))

    @cached_property
    def imports(self) -> list[Import | Guard]:
        """The renamed module-level imports."""
        return list(self._block(self.file.imports))

    def _block(self, block: Iterable[Import | Guard]) -> tuple[Import | Guard, ...]:
        return tuple(self._guard(one) if isinstance(one, Guard) else self._import(one) for one in block)

    def _guard(self, guard: Guard) -> Guard:
        otherwise = without_indent(self.text(*guard.rest))
        return replace(guard, test=self.code(guard.test), body=self._block(guard.body), otherwise=otherwise)

    def _import(self, one: Import) -> Import:
        if not self.renaming or (one.module is not None and not one.module.startswith(".")):
            return one
        if self.home and one.module is not None and is_far(one.module):
            return replace(one, module=absolute(one.module, self.home))
        names = tuple((self.code(name), alias and self.word(alias)) for name, alias in one.names)
        if one.module is None:
            return replace(one, names=names)
        return replace(one, module=renamed_module(one.module, self.renaming, self.model), names=names)


def renamed_module(module: str, renaming: Renaming, model: str) -> str:
    """A relative module, renamed. A sibling is called after the model, whatever name its classes take.

    >>> from rewire.source.names import Names
    >>> renaming = Renaming("llama", "gemma_text", Names({}))
    >>> (
    ...     renamed_module(".configuration_llama", renaming, "gemma"),
    ...     renamed_module("..llama.modeling_llama", renaming, "gemma"),
    ... )
    ('.configuration_gemma', '..gemma_text.modeling_gemma_text')
    """
    renamed = ".".join(map(renaming.word, module.split(".")))
    kind = type_of_module(renamed.lstrip("."))
    is_sibling = kind and "." not in renamed.lstrip(".") and renaming.new != model
    return renamed.replace(f"{kind}_{renaming.new}", f"{kind}_{model}") if is_sibling else renamed


def is_far(module: str) -> bool:
    """Does a relative module lie outside the model's own generated files?"""
    return module.startswith("..") or (module.startswith(".") and type_of_module(module[1:]) is None)


def absolute(module: str, home: str) -> str:
    """A relative module, as seen from anywhere.

    >>> absolute("...utils", "transformers.models.llama"), absolute("..auto", "transformers.models.llama")
    ('transformers.utils', 'transformers.models.auto')
    """
    dots = len(module) - len(module.lstrip("."))
    parents = home.split(".")
    rest = module[dots:]
    return ".".join([*parents[: len(parents) - dots + 1], *([rest] if rest else [])])


# ---------------------------------------------------------------- what a renaming changes in a file


def _substitutions(view: View, renaming: Renaming) -> Iterator[Substitution]:
    file = view.file
    whole = dict(_whole(view, renaming))
    yield from ((start, end, new) for (start, end), new in whole.items())
    fixed = sorted([*whole, *(statement for statement, module in file.from_imports if _is_fixed_import(view, module))])
    for start, end, new in renaming.matches(file.text, file.lower):
        if not _is_inside(start, fixed) and not _is_fixed(file, start, renaming.kept):
            yield start, end, new


def _whole(view: View, renaming: Renaming) -> Iterator[tuple[Span, str]]:
    """What is replaced as a whole: markers of copies, and the modules of relative imports."""
    file = view.file
    for token in file.tokens:
        if token.kind == "comment" and "# Copied from" in file.text[token.start : token.end]:
            yield (token.start, token.end), ""
    for _, (start, end) in file.from_imports:
        module = file.text[start:end]
        if module.startswith("."):
            is_absolute = view.home and is_far(module)
            yield (
                (start, end),
                absolute(module, view.home) if is_absolute else renamed_module(module, renaming, view.model),
            )


def _is_fixed_import(view: View, module: Span) -> bool:
    """Are the names of an import left as they are, because the module is?"""
    text = view.file.text[slice(*module)]
    return not text.startswith(".") or bool(view.home and is_far(text))


def _is_inside(position: int, spans: list[Span]) -> bool:
    """Is the position inside one of the sorted spans?"""
    number = bisect_right(spans, (position, sys.maxsize)) - 1
    return number >= 0 and position < spans[number][1]


def _is_fixed(file: SourceFile, position: int, kept: frozenset[str]) -> bool:
    """Does the word or string at the position stay as it is?"""
    number = bisect_right(file.tokens, (position, sys.maxsize)) - 1
    token = file.tokens[number] if number >= 0 else None
    if token is None or token.end <= position:
        return _word_at(file.text, position) in kept
    return token.kind == "ftext" or file.text[token.start : token.end].strip('"') in kept


def _word_at(text: str, position: int) -> str:
    start = position
    while start and (text[start - 1].isalnum() or text[start - 1] == "_"):
        start -= 1
    word = WORD.match(text, start)
    return word.group() if word else ""
