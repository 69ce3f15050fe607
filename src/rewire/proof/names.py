"""The same tensor or module under the names that the two models give it.

PEFT wraps what it adapts: `q.weight` becomes `base_model.model.…q.base_layer.weight`. Names are matched as
they are first, and without such wrapping second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

WRAPPED_MODEL = "base_model.model."
WRAPPERS = frozenset({"base_layer", "original_module"})


def plain(name: str) -> str:
    """`name` without what PEFT puts round it.

    >>> plain("base_model.model.encoder.0.q.base_layer.weight")
    'encoder.0.q.weight'
    """
    parts = name.removeprefix(WRAPPED_MODEL).split(".")
    return ".".join(part for part in parts if part not in WRAPPERS)


def align(wanted: Iterable[str], present: Iterable[str]) -> dict[str, str]:
    """For each wanted name the present one that means the same; names without counterpart are left out.

    >>> align(["q.weight", "k.weight", "gone"], ["q.base_layer.weight", "q.lora_A.weight", "k.weight"])
    {'q.weight': 'q.base_layer.weight', 'k.weight': 'k.weight'}
    """
    names = set(present)
    by_plain: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (name.count("."), name)):
        by_plain.setdefault(plain(name), name)
    pairs = ((name, name if name in names else by_plain.get(plain(name))) for name in wanted)
    return {name: found for name, found in pairs if found is not None}


def kind_of(name: str) -> str:
    """What a parameter is, whichever layer it stands in: the last two segments that are not numbers.

    >>> kind_of("encoder.layer.3.attention.q.weight"), kind_of("experts.12.down.weight"), kind_of("scale")
    ('q.weight', 'down.weight', 'scale')
    """
    return ".".join([part for part in plain(name).split(".") if not part.isdigit()][-2:])


def split_layer(path: str) -> tuple[str, int | None, str]:
    """A module path as (stack of layers, number of the layer, place inside it).

    >>> split_layer("encoder.layer.3.attention.q")
    ('encoder.layer', 3, 'attention.q')
    >>> split_layer("pooler.dense")
    ('', None, 'pooler.dense')
    """
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:index]), int(part), ".".join(parts[index + 1 :])
    return "", None, path


def shorten(names: Iterable[str], limit: int = 3) -> str:
    """The first few names and how many more there are.

    >>> shorten(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def count_by_kind(names: Iterable[str]) -> Mapping[str, list[str]]:
    """Names grouped by `kind_of`, kinds in order of first appearance."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(kind_of(name), []).append(name)
    return groups
