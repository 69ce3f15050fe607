"""In which order definitions that are added together come."""

from __future__ import annotations

from collections.abc import Iterable

from rewire.source.scopes import Entry, ModularScope, ParentScope

LAST = 1 << 30


def modular_order(scope: ModularScope, names: Iterable[str]) -> list[str]:
    """For a plain class: what came from parents, file by file, then what the modular file defines itself."""
    inherited: dict[int, list[str]] = {}
    own: list[str] = []
    for name in sorted(names):
        home = scope.entries[name].home
        (own if home is scope.home else inherited.setdefault(id(home), [])).append(name)
    groups = [*inherited.values(), own]
    return [name for group in groups for name in sorted(group, key=lambda one: scope.entries[one].position)]


def parent_order(scope: ParentScope, modular: ModularScope, names: set[str]) -> list[str]:
    """For a merged class: the parent's classes by position, each behind what it needs; then the rest."""
    home = scope.home.entries
    placed: dict[str, None] = {}
    classes = [name for name in names if name in home and home[name].is_class]
    for name in sorted(classes, key=lambda one: home[one].position):
        needed = [one for one in scope.class_needs(name) if one in names and one not in placed]
        ordered = sorted((one for one in needed if one in home), key=lambda one: home[one].position)
        ordered += sorted((one for one in needed if one not in home), key=lambda one: _position(modular, one))
        placed.update(dict.fromkeys([*ordered, name]))
    rest = sorted((name for name in names if name not in placed), reverse=True)
    others = sorted((one for one in rest if one not in modular.home.entries), key=lambda one: _home_position(home, one))
    own = sorted((one for one in rest if one in modular.home.entries), key=lambda one: _position(modular, one))
    return [*placed, *others, *own]


def _position(modular: ModularScope, name: str) -> int:
    return modular.entries[name].position if name in modular.entries else LAST


def _home_position(home: dict[str, Entry], name: str) -> int:
    return home[name].position if name in home else LAST
