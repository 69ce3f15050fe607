"""Plain JSON data: kept so that it cannot change, compared and hashed by one canonical text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rewire.plan.messages import show


class FrozenMapping(Mapping[str, Any]):
    """A mapping of plain JSON data that cannot change, hashable, lists in it kept as tuples.

    >>> frozen = FrozenMapping({"r": 16, "rank_pattern": {"q": 4}})
    >>> frozen["r"], frozen == {"rank_pattern": {"q": 4.0}, "r": 16}, frozen == {"r": True}
    (16, True, False)
    """

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any] | None = None, depth: int = 0) -> None:
        self._items = {_key(name): freeze(value, depth + 1) for name, value in (items or {}).items()}

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        try:
            return canonical(self) == canonical(FrozenMapping(other))
        except ValueError:  # not plain data, so not equal to any
            return False

    def __hash__(self) -> int:
        return hash(canonical(self))

    def __repr__(self) -> str:
        return repr(thaw(self))


def freeze(value: object, depth: int = 0) -> Any:
    """Plain JSON data in a form that cannot change; `ValueError` for anything else."""
    if depth > 32:
        raise ValueError("is nested too deeply (or within itself)")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text(str.__str__(value))  # members of a text enumeration become the text
    if isinstance(value, int):
        return bounded(int(value))
    if isinstance(value, float):
        return _finite(float(value))
    if isinstance(value, list | tuple):
        return tuple(freeze(item, depth + 1) for item in value)
    if isinstance(value, FrozenMapping):
        return value
    if isinstance(value, Mapping):
        return FrozenMapping(value, depth)
    raise ValueError(f"must be plain data (text, number, true, false, null, list, mapping), not {show(value)}")


def thaw(value: Any) -> Any:
    """Fresh lists and dicts in place of tuples and frozen mappings."""
    if isinstance(value, Mapping):
        return {name: thaw(item) for name, item in value.items()}
    return [thaw(item) for item in value] if isinstance(value, tuple | list) else value


def canonical(value: Any) -> str:
    """The one JSON text of plain data: equal data, equal text. `16.0` counts as `16`, `true` does not as `1`.

    >>> canonical({"b": 16.0, "a": [True, -0.0]})
    '{"a":[true,0],"b":16}'
    """
    return json.dumps(_whole_numbers(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _whole_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _whole_numbers(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _key(name: object) -> str:
    if not isinstance(name, str):
        raise ValueError(f"has the key {show(name)}, and keys must be text")
    return text(name)


def bounded(number: int) -> int:
    """A whole number that every reader of JSON can hold."""
    if abs(number) >= 2**63:
        raise ValueError("is a number beyond 64 bits")
    return number


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError(f"must be a finite number, but is {number}")
    return number


def text(value: object) -> str:
    """Text that a file can hold."""
    if not isinstance(value, str):
        quote = f'; put it in quotes: "{value}"' if isinstance(value, bool | int | float) else ""
        raise ValueError(f"must be text, but is {show(value)}{quote}")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError("holds half a surrogate pair, which is no character")
    return value
