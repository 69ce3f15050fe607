"""JSON read member by member, and more strictly than Python's `json` does it.

Headers and indexes can hold a hundred thousand members. `read_object` hands them over one at a time, so the
caller keeps only what it wants. Refused on top of what `json` refuses: keys given twice, `NaN` and `Infinity`,
halves of surrogate pairs, nesting that exhausts the stack. Numbers that the format's own library would not take
for whole ones (`1.0`, `1e2`, `-0`, more than 20 digits) arrive as floats.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable
from typing import Any, NoReturn

_BLANKS = re.compile(r"[ \t\n\r]*")
_KEY = re.compile(r'[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*')
_LONGEST = len(str(2**64))


class JsonError(ValueError):
    """The text is not JSON, or JSON that has two meanings."""


def read_object(text: str, at: int, member: Callable[[str, int], int]) -> int:
    """Reads the object that begins at `at`, and returns where it ends.

    Args:
        text: the JSON text.
        at: where the object, or the blanks before it, begins.
        member: called with each key and the place of its value; returns where the value ends.

    Raises:
        JsonError: the text is malformed. What `member` raises passes through.

    >>> found = {}
    >>> def member(key, at):
    ...     found[key], end = read_value('{"a": 1, "b": [2]}', at)
    ...     return end
    >>> read_object('{"a": 1, "b": [2]}', 0, member), found
    (18, {'a': 1, 'b': [2]})
    """
    at = _expect(text, at, "{")
    after = skip_blanks(text, at)
    if text.startswith("}", after):
        return after + 1
    while True:
        key, at = _read_key(text, at)
        at = skip_blanks(text, member(key, at))
        if text.startswith("}", at):
            return at + 1
        at = _expect(text, at, ",")


def read_value(text: str, at: int) -> tuple[Any, int]:
    """The value at `at` and where it ends. Raises `JsonError`."""
    try:
        value, end = _DECODER.raw_decode(text, at)
        if text.find("\\u", at, end) >= 0:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise JsonError(f"half a surrogate pair after character {at}") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"{error.msg} at character {error.pos}") from None  # the error would keep the text alive
    except RecursionError:
        raise JsonError(f"nested too deeply after character {at}") from None
    return value, end


def skip_blanks(text: str, at: int) -> int:
    """The first place from `at` on that is no blank."""
    found = _BLANKS.match(text, at)
    return found.end() if found else at


def expect_end(text: str, at: int) -> None:
    """Raises `JsonError` if anything but blanks follows."""
    end = skip_blanks(text, at)
    if end != len(text):
        raise JsonError(f"something follows the JSON at character {end}")


def _expect(text: str, at: int, mark: str) -> int:
    at = skip_blanks(text, at)
    if not text.startswith(mark, at):
        raise JsonError(f"{mark!r} expected at character {at}")
    return at + 1


def _read_key(text: str, at: int) -> tuple[str, int]:
    plain = _KEY.match(text, at)
    if plain:
        return plain[1], plain.end()
    start = skip_blanks(text, at)
    if not text.startswith('"', start):
        raise JsonError(f"a key in quotes expected at character {start}")
    key, end = read_value(text, start)
    return key, skip_blanks(text, _expect(text, end, ":"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, _ in pairs:
            if key not in found:
                raise JsonError(f"the key {shown(key)} is given twice")
            del found[key]
    return found


def _whole(text: str) -> int | float:
    return float(text) if len(text) > _LONGEST or text == "-0" else int(text)


def _refuse(name: str) -> NoReturn:
    raise JsonError(f"{name} is no JSON")


def shown(value: object) -> str:
    """A value from a file as it may stand in a message: escaped, of bounded length and depth.

    >>> shown("a\\nb"), shown([1, 2, [[]]])
    ("'a\\\\nb'", '[1, 2, [[]]]')
    """
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_whole)
