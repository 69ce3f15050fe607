"""Reading configurations: the ones inside them, their numbers, their lists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

LAYERS = 2
"""Layers of a small model, or of a stage of it, that has one kind of them."""

Config = Any
"""A configuration object of Transformers."""


def configs_within(config: Config) -> Iterator[Config]:
    """A configuration and all those inside it, in lists too; every object once."""
    seen: set[int] = set()
    pending = [config]
    while pending:
        current = pending.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        for value in vars(current).values():
            inside = value if isinstance(value, list | tuple) else [value]
            pending += [one for one in inside if is_config(one)]


def is_config(value: object) -> bool:
    """Whether `value` is a configuration object."""
    return hasattr(value, "to_dict") and hasattr(value, "__dict__") and not isinstance(value, type)


def numbers(config: Config) -> dict[str, int]:
    """The positive whole numbers of a configuration."""
    return {name: value for name, value in vars(config).items() if is_int(value) and value > 0}


def is_int(value: object) -> TypeGuard[int]:
    """Whether `value` is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_list(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    """Whether `value` is a list or tuple."""
    return isinstance(value, list | tuple)


def is_numbers(value: object) -> TypeGuard[list[int] | tuple[int, ...]]:
    """Whether `value` is a list of at least two whole numbers."""
    return is_list(value) and len(value) > 1 and all(map(is_int, value))


def listed(value: Any) -> list[Any]:
    """The values of a list, or the one value as a list."""
    return list(value) if is_list(value) else [value]
