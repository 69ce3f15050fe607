"""Where a Python text holds strings, comments and the literal text of f-strings; all the rest is code.

Renaming and dependency rules treat those three differently from code, and need nothing finer: an identifier is
a word of the code. One regular expression finds the tokens, which is many times faster than `tokenize`.

>>> [(token.kind, 'f"{a!r:>{width}} b"  # c'[token.start : token.end]) for token in tokens('f"{a!r:>{width}} b"  # c')]
[('ftext', 'f"'), ('ftext', '>'), ('ftext', ' b"'), ('comment', '# c')]
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

Kind = Literal["string", "comment", "ftext"]


class Token(NamedTuple):
    """Characters `start` to `end` of a text. `ftext` is the part of an f-string that is not an expression."""

    start: int
    end: int
    kind: Kind


WORD = re.compile(r"\b[^\W\d]\w*")
"""An identifier or keyword, where only code is searched."""

_OPENING = re.compile(r"#[^\n]*|\"{3}|'{3}|[\"']")
_CLOSING = {
    quote: re.compile(pattern, re.DOTALL)
    for quote, pattern in {
        '"': r'[^"\\\n]*(?:\\.[^"\\\n]*)*"',
        "'": r"[^'\\\n]*(?:\\.[^'\\\n]*)*'",
        '"""': r'[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""',
        "'''": r"[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''",
    }.items()
}
_PREFIX = re.compile(r"(?<!\w)[rbuft]{1,2}\Z", re.IGNORECASE)
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
_IN_EXPRESSION = re.compile(r"[(\[{}\])]|\"{3}|'{3}|[\"']|!(?!=)|:|#[^\n]*")


def tokens(text: str) -> list[Token]:
    """Tokens of a text that parses, in order. Prefixes belong to their string."""
    found: list[Token] = []
    position = 0
    while opening := _OPENING.search(text, position):
        start, position = opening.span()
        if text[start] == "#":
            found.append(Token(start, position, "comment"))
        else:
            position = _string(text, start, position, found)
    return found


def _string(text: str, quote_at: int, inside: int, found: list[Token]) -> int:
    """Adds the tokens of the string whose quotes end at `inside`; returns where it ends."""
    quote = text[quote_at:inside]
    start = quote_at
    if (
        quote_at
        and (text[quote_at - 1]).isalpha()
        and (prefix := _PREFIX.search(text[max(0, quote_at - 3) : quote_at]))
    ):
        start -= len(prefix.group())
        if "f" in prefix.group().lower() or "t" in prefix.group().lower():
            return _f_string(text, start, inside, quote, found)
    closing = _CLOSING[quote].match(text, inside)
    end = closing.end() if closing else len(text)
    found.append(Token(start, end, "string"))
    return end


_IN_TEXT = {quote: re.compile(rf"{quote}|\\N\{{[^}}]*\}}|\\[^{{]|\{{\{{|\}}\}}|\{{", re.DOTALL) for quote in _CLOSING}


def _f_string(text: str, start: int, inside: int, quote: str, found: list[Token]) -> int:
    """Adds the tokens of an f-string: its text, and whatever is no code in its expressions."""
    position = inside
    while mark := _IN_TEXT[quote].search(text, position):
        position = mark.end()
        if mark.group() == quote:
            found.append(Token(start, position, "ftext"))
            return position
        if mark.group() == "{":
            found.append(Token(start, mark.start(), "ftext"))
            start = position = _replacement_field(text, position, found)
    found.append(Token(start, len(text), "ftext"))
    return len(text)


def _replacement_field(text: str, position: int, found: list[Token]) -> int:
    """Goes from behind `{` to behind its `}`; adds what is no code."""
    depth = 0
    while mark := _IN_EXPRESSION.search(text, position):
        what, position = mark.group(), mark.end()
        if what[0] in "\"'":
            position = _string(text, mark.start(), position, found)
        elif what[0] == "#":
            found.append(Token(mark.start(), position, "comment"))
        elif what == "}" and not depth:
            return position
        elif what == ":" and not depth:
            return _format_spec(text, position, found)
        else:
            depth += _BRACKETS.get(what, 0)
    return len(text)


def _format_spec(text: str, position: int, found: list[Token]) -> int:
    start = position
    while position < len(text) and text[position] != "}":
        position += 1
        if text[position - 1] == "{":
            found.append(Token(start, position - 1, "ftext"))
            start = position = _replacement_field(text, position, found)
    if start < position:
        found.append(Token(start, position, "ftext"))
    return position + 1


def code_only(text: str, found: list[Token]) -> str:
    """`text` with every token blanked, so that positions stay and only code is left.

    >>> code_only("x = 'y'  # z", tokens("x = 'y'  # z"))
    'x =             '
    """
    return "".join(_code_parts(text, found))


def _code_parts(text: str, found: list[Token]) -> Iterator[str]:
    position = 0
    for start, end, _ in found:
        yield text[position:start]
        yield " " * (end - start)
        position = end
    yield text[position:]


def lowered(text: str) -> str:
    """The text in lower case, every character in its place (a few letters have longer lower forms)."""
    lower = text.lower()
    return lower if len(lower) == len(text) else "".join(one.lower()[0] for one in text)
