"""Globs that match given places of a model and no others."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence

from rewire.errors import ResolveError
from rewire.step_patterns import boxes, ranges
from rewire.targets import Target


def globs(wanted: Collection[str], places: Mapping[str, Hashable]) -> list[str]:
    """Globs that together match all of `wanted` and no other place, and no place twice.

    Args:
        wanted: paths.
        places: every path there is, with what stands there; one thing may have several paths.

    Raises `ResolveError` where no glob tells places apart.

    >>> places = {"layers.0.attn": 1, "layers.1.attn": 2, "layers.0.mlp": 3, "layers.1.mlp": 4, "layers.2.mlp": 5}
    >>> globs(["layers.0.attn", "layers.1.attn"], places), globs(["layers.0.mlp"], places)
    (['layers.*.attn'], ['layers.0.mlp'])
    >>> globs(["layers.0.mlp", "layers.2.mlp"], places)
    ['layers.[0,2].mlp']
    """
    rows: dict[tuple[str | None, ...], list[tuple[int, ...]]] = {}
    for path in wanted:
        levels = path.split(".")
        shape = tuple(None if _is_number(level) else _plain(level) for level in levels)
        rows.setdefault(shape, []).append(tuple(int(level) for level in levels if _is_number(level)))
    found = [(shape, box) for shape, numbers in rows.items() for box in boxes(numbers)]
    return [_glob(shape, box, _others(shape, box, wanted, places)) for shape, box in found]


def _others(
    shape: Sequence[str | None], box: Sequence[Sequence[int]], wanted: Collection[str], places: Mapping[str, Hashable]
) -> list[str]:
    """The paths of what the glob of this box must not match."""
    exact = Target.parse(_joined(shape, [_listed(numbers) for numbers in box]))
    meant = {places[path] for path in wanted if exact.path_matches(path)}
    return [path for path, place in places.items() if place not in meant]


def _is_number(level: str) -> bool:
    return re.fullmatch(r"0|[1-9][0-9]{0,8}", level) is not None


def _plain(level: str) -> str:
    """A level without what has a meaning in globs."""
    return re.sub(r"[^\w-]", "?", level)


def _glob(shape: Sequence[str | None], box: Sequence[Sequence[int]], others: Collection[str]) -> str:
    """The numbers of `box` in the places of `shape` that are open; `*` for all of them where nothing else fits."""
    texts = [_listed(numbers) for numbers in box]
    for place, numbers in enumerate(box):
        wider = [*texts[:place], "*", *texts[place + 1 :]]
        if len(numbers) > 1 and not _hits(_joined(shape, wider), others):
            texts = wider
    glob = _joined(shape, texts)
    if found := _hits(glob, others):
        raise ResolveError(f"no target tells {glob} from {found}; give the modules names that differ")
    return glob


def _joined(shape: Sequence[str | None], texts: Sequence[str]) -> str:
    numbers: Iterator[str] = iter(texts)
    return ".".join(next(numbers) if level is None else level for level in shape)


def _hits(glob: str, others: Collection[str]) -> str | None:
    target = Target.parse(glob)
    return next((path for path in others if target.path_matches(path)), None)


def _listed(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    listed = (f"{low}-{high}" if low < high else str(low) for low, high in ranges(numbers))
    return f"[{','.join(listed)}]"
