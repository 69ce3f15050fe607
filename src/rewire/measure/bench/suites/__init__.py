"""The suites: a file each in this folder, and those that other packages bring.

A suite is a `Suite` (see `base`). One of Rewire's is a file here, with a line in `BUILTIN`. Another package adds its
own through an entry point of the group `rewire.bench_suites` that leads to a `Suite`:

    [project.entry-points."rewire.bench_suites"]
    classify = "my_package.bench:SUITE"
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from rewire.errors import MeasureError
from rewire.measure.bench.suites.base import Case, Suite, Work

__all__ = ["Suite", "Case", "Work", "BUILTIN", "GROUP", "ALL", "suite_names", "find_suites"]

BUILTIN = {name: f"rewire.measure.bench.suites.{name}" for name in ("load", "decode", "encode", "train")}
"""Suites of this folder, in the order in which `all` runs them."""

GROUP = "rewire.bench_suites"
"""Entry points of other packages' suites."""

ALL = "all"
"""Stands for every suite that fits the model."""


def suite_names() -> tuple[str, ...]:
    """The names of all suites there are."""
    return tuple(dict.fromkeys((*BUILTIN, *_others())))


def find_suites(names: Sequence[str]) -> list[Suite]:
    """The suites of these names, each once; `all` are all of them.

    Raises `MeasureError` for a name that no suite has.
    """
    known = suite_names()
    unknown = [name for name in names if name not in known and name != ALL]
    if unknown:
        raise MeasureError(f"there is no suite {unknown[0]!r}; there are {', '.join(known)}, and {ALL} for all of them")
    chosen = dict.fromkeys(one for name in names for one in (known if name == ALL else (name,)))
    return [_load(name) for name in chosen]


def _others() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in BUILTIN}


def _load(name: str) -> Suite:
    if name in BUILTIN:
        found = import_module(BUILTIN[name]).SUITE
    else:
        point = _others()[name]
        try:
            found = point.load()
        except Exception as error:
            raise MeasureError(f"the suite {name} ({point.value}) cannot be loaded: {error}") from error
    if not isinstance(found, Suite):
        raise MeasureError(f"the suite {name} is a {type(found).__name__}, not a rewire.measure.bench.Suite")
    return found
