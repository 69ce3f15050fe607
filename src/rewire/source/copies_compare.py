"""Is a copy still what its original says? And the text that it should have."""

from __future__ import annotations

import ast
import difflib
import io
import re
import tokenize
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from rewire.source.copies import Module, Replacement

_MARK = re.compile(r"[ \t]*#[ \t]*(?:Copied from|Ignore copy|End copy)\b.*")
_IGNORE = re.compile(r"#[ \t]*Ignore copy\b")
_END = re.compile(r"^[ \t]*#[ \t]*End copy\b", re.MULTILINE)

Span = tuple[int, int]


class Part:
    """A class or function as text from the left margin on, without decorators.

    `members` are the methods and inner classes by name, with the lines of each, its decorators and the comments above
    included. What stands above the first of them counts as one member without a name.
    """

    def __init__(self, text: str) -> None:
        self.module = Module(Path(), text)
        [self.code] = self.module.top
        self.members = dict(self._members()) if self.code.is_class else {}

    @property
    def lines(self) -> list[str]:
        """The lines, each with its end."""
        return self.module.lines

    def _members(self) -> Iterator[tuple[str, Span]]:
        before, names = self.code.line, set[str]()
        for one in self.code.inner:
            if one.name:
                first, (_, last) = one.first, self.module.span(one)
                while first - 1 > before and self.lines[first - 2].lstrip().startswith("#"):
                    first -= 1
                if not names and before > self.code.line:
                    yield "", (self._beginning(), before)
                name = f"{one.name} again" if one.name in names else one.name  # the setter of a property
                names.add(name)
                yield name, (first, last)
            before = self.module.span(one)[1] if one.name else one.last

    def _beginning(self) -> int:
        """The first line below the `class` line, comments included."""
        first = self.code.inner[0].line
        while first - 1 > self.code.line and self.lines[first - 2].lstrip().startswith("#"):
            first -= 1
        return first

    def ignored(self) -> dict[str, str]:
        """The members that say `# Ignore copy`, with their text."""
        texts = {name: "".join(self.lines[first - 1 : last]) for name, (first, last) in self.members.items()}
        return {name: text for name, text in texts.items() if _IGNORE.search(text)}

    def without(self, names: Collection[str]) -> str:
        """The text without members of those names."""
        return self.with_members(dict.fromkeys(names, ""))

    def with_members(self, texts: dict[str, str]) -> str:
        """The text with those members replaced."""
        lines = self.lines[:]
        for name, text in texts.items():
            if name in self.members:
                first, last = self.members[name]
                lines[first - 1 : last] = [text, *[""] * (last - first)]
        return "".join(lines)


def until_end(text: str) -> str:
    """The part of a copy that is compared.

    >>> until_end("def f():\\n    a()\\n    # End copy\\n    b()\\n")
    'def f():\\n    a()\\n'
    """
    end = _END.search(text)
    return text[: end.start()] if end else text


def expected(original: str, observed: str, replacements: Sequence[Replacement]) -> str | None:
    """What a copy should say, members that it takes out left as they are; nothing if all of it is taken out.

    >>> bert = "class BertPooler(nn.Module):\\n    dense = Bert()\\n"
    >>> print(expected(bert, "class MyPooler(nn.Module):\\n    pass\\n", [Replacement("Bert", "My")]), end="")
    class MyPooler(nn.Module):
        dense = My()
    """
    copy = Part(until_end(observed))
    if _IGNORE.search(copy.module.text) and not copy.code.is_class:
        return None
    text = _MARKS.sub("", original)
    for one in replacements:
        text = one.apply(text)
    text = _NAME.sub(rf"\g<1>{copy.code.name}", text, count=1)
    kept = copy.ignored()
    try:
        should = Part(text)
    except SyntaxError:  # a replacement has made something else of the code
        return text
    return should.with_members(kept) + "".join(text for name, text in kept.items() if name not in should.members)


_MARKS = re.compile(rf"^{_MARK.pattern}\n", re.MULTILINE)
_NAME = re.compile(r"^((?:async[ \t]+)?(?:class|def)[ \t]+)\w+")


def is_same(observed: str, should: str) -> bool:
    """Do they differ in nothing but formatting, blank lines and members taken out of the comparison?"""
    texts = [_normal(until_end(observed)), _normal(should)]
    if texts[0] == texts[1]:
        return True
    names = Part(until_end(observed)).ignored()
    try:
        texts = [_normal(Part(one).without(names) + "    pass\n") for one in (until_end(observed), should)]
        return texts[0] == texts[1] or _shape(texts[0]) == _shape(texts[1])
    except SyntaxError:  # a replacement has made something else of the code
        return False


def _normal(text: str) -> str:
    """The text without blank lines and markers."""
    lines = (_MARK.sub("", line).rstrip() for line in text.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def _shape(text: str) -> tuple[str, list[tuple[int, str]]]:
    """What no formatter changes: the syntax tree, and the comments with the number of tokens before each."""
    comments: list[tuple[int, str]] = []
    number = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.append((number, token.string))
        elif token.type in (tokenize.NAME, tokenize.NUMBER):
            number += 1
    return ast.dump(ast.parse(text)), comments


def corrected(observed: str, should: str) -> str:
    """The copy as it should be, with its own marks and blank lines, and with what stands behind `# End copy`.

    >>> corrected("def f():\\n    a()\\n    # Ignore copy\\n    c()\\n", "def f():\\n\\n    b()\\n    c()\\n")
    'def f():\\n    # Ignore copy\\n\\n    b()\\n    c()\\n'
    """
    compared = until_end(observed)
    before, after = _with_blanks(compared), _with_blanks(should)
    matcher = difflib.SequenceMatcher(None, [line for _, line in before], [line for _, line in after], autojunk=False)
    parts: list[str] = []
    for kind, start, end, first, last in matcher.get_opcodes():
        if kind == "equal":
            parts += [blanks + line for blanks, line in before[start:end]]
        else:
            parts += [blanks + line for blanks, line in before[start:end] if _MARK.fullmatch(line.rstrip("\n"))]
            parts += [blanks + line for blanks, line in after[first:last]]
    return "".join(parts) + observed[len(compared) :]


def _with_blanks(text: str) -> list[tuple[str, str]]:
    """The lines that are not blank, each with the blank ones above it."""
    return re.findall(r"((?:[ \t]*\n)*)([^\n]+\n)", text)
