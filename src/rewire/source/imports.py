"""The import statements of a generated file: candidates from the modular file and its parents, and which are taken."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from rewire.source.import_statements import Guard, Import, plain_imports
from rewire.source.modules import LIBRARY
from rewire.source.parents import Modular
from rewire.source.rules import Rules

TESTS = {"torch": "is_torch_available", "torchvision": "is_torchvision_available"}


def candidates(modular: Modular, crossed: Iterable[Import]) -> list[Import | Guard]:
    """All import statements that a generated file may take names from, in order, each text once."""
    parents = {one.module for one, _ in modular.parent_imports() if not (one.module or "").startswith("...models")}
    own = (kept for one in modular.view.imports if (kept := _without(one, parents)))
    inherited = (one for parent in modular.parents.values() for one in parent.view.imports)
    found: dict[str, Import | Guard] = {}
    for one in (*own, *crossed, *inherited):
        found.setdefault(one.text, one)
    return list(found.values())


def _without(one: Import | Guard, modules: set[str | None]) -> Import | Guard | None:
    """The statement without imports from those modules."""
    if isinstance(one, Import):
        return None if one.module in modules and one.module else one
    body = tuple(kept for inner in one.body if (kept := _without(inner, modules)))
    return replace(one, body=body) if body else None


def select(found: Iterable[Import | Guard], names: set[str]) -> list[Import | Guard]:
    """The statements with those of the names that no earlier statement has, guards last."""
    taken: list[Import | Guard] = []
    left = set(names)
    for one in found:
        if kept := one.keep(left):
            taken.append(kept)
            left.difference_update(name for part in plain_imports([kept]) for name in part.bound())
    return sorted(taken, key=lambda one: isinstance(one, Guard))


# ---------------------------------------------------------------- files that must load without torch


def soft_torch(rules: Rules) -> tuple[str, ...]:
    """The types of files that must load without torch."""
    return (
        ("image_processing_pil", "feature_extraction") if rules.soft_feature_extraction else ("image_processing_pil",)
    )


def soften(taken: list[Import | Guard], utilities: str) -> list[Import | Guard]:
    """Puts imports of torch and torchvision under guards of their own, at the end.

    `utilities`: the module that has the tests of these guards.
    """
    moved: dict[str, list[Import]] = {kind: [] for kind in TESTS}
    rest = [kept for one in taken if (kept := _without_torch(one, moved))]
    for kind, test in TESTS.items():
        if moved[kind]:
            rest = [*_with_name(rest, test, utilities), Guard(f"{test}()", tuple(moved[kind]))]
    return rest


def _without_torch(one: Import | Guard, moved: dict[str, list[Import]]) -> Import | Guard | None:
    """The statement without imports of torch; these are added to `moved`."""
    if isinstance(one, Import):
        kind = _torch_kind(one)
        if kind:
            moved[kind].append(one)
        return None if kind else one
    if one.otherwise or not _TORCH_TEST.search(one.test):
        return one
    body = tuple(kept for inner in one.body if (kept := _without_torch(inner, moved)))
    return replace(one, body=body) if body else None


_TORCH_TEST = re.compile(r"is_torch(?:vision)?_available\b")


def _torch_kind(one: Import) -> str | None:
    kinds = sorted(TESTS, key=len, reverse=True)
    return next((kind for kind in kinds if one.text.startswith((f"import {kind}", f"from {kind}"))), None)


def _with_name(taken: list[Import | Guard], name: str, utilities: str) -> list[Import | Guard]:
    """The statements with one more name from a `utils` module, in a statement of its own where none lacks it."""
    for number, one in enumerate(taken):
        is_utilities = isinstance(one, Import) and one.module and one.module.rpartition(".")[2] == "utils"
        if isinstance(one, Import) and is_utilities and name not in one.bound():
            return [*taken[:number], replace(one, names=(*one.names, (name, None))), *taken[number + 1 :]]
    return [Import(utilities, ((name, None),)), *taken]


def utilities_of(modular: Modular) -> str:
    """The library's `utils`, as a generated file imports it."""
    is_library = modular.package is not None and modular.package.name == LIBRARY
    return "...utils" if is_library else f"{LIBRARY}.utils"


def guard_tests(found: Iterable[Import | Guard]) -> Iterator[str]:
    """The tests of all guards; the names in them count as used in every file."""
    return (one.test for one in found if isinstance(one, Guard))
