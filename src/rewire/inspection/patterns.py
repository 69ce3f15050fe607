"""Few targets for many places: paths that differ in layer numbers alone become one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rewire.targets import Target

_Numbers = tuple[int, ...]
_Levels = tuple[tuple[int, ...], ...]


def skeleton(path: str) -> str:
    """The path without its layer numbers; places with the same one may become one target.

    >>> skeleton("encoder.layer.11.attention.self")
    'encoder.layer.*.attention.self'
    """
    return ".".join("*" if level.isdigit() else level for level in path.split("."))


def patterns(paths: Iterable[str], everything: Iterable[str]) -> list[str]:
    """Targets that match `paths` (all of one skeleton) and nothing else of `everything`.

    >>> paths = [f"layers.{number}.attn" for number in range(6)]
    >>> patterns(paths, paths), patterns(paths[:3], paths), patterns(["layers.4.attn"], paths)
    (['layers.*.attn'], ['layers.[0-2].attn'], ['layers.4.attn'])
    """
    found = sorted({_numbers(path): path for path in paths})
    if not found:
        return []
    form = next(iter(paths := list(paths)))
    return [_widest(levels, form, list(everything)) for levels in _boxes(found)]


def _numbers(path: str) -> _Numbers:
    return tuple(int(level) for level in path.split(".") if level.isdigit())


def _boxes(rows: list[_Numbers]) -> Iterator[_Levels]:
    """Rows of numbers as few products of sets: {0, 1} × {0, 1, 2}, say."""
    if not rows[0]:
        yield ()
        return
    rests: dict[int, list[_Numbers]] = {}
    for first, *rest in rows:
        rests.setdefault(first, []).append(tuple(rest))
    alike: dict[tuple[_Numbers, ...], list[int]] = {}
    for first, found in rests.items():
        alike.setdefault(tuple(found), []).append(first)
    for found_rests, firsts in alike.items():
        for box in _boxes(list(found_rests)):
            yield (tuple(firsts), *box)


def _widest(levels: _Levels, form: str, everything: list[str]) -> str:
    """The box as a target, with `*` for every level where that matches nothing more."""
    shown = [_brackets(numbers) for numbers in levels]
    wanted = set(_matches(_render(form, shown), everything))
    for place, numbers in enumerate(levels):
        wider = [*shown[:place], "*", *shown[place + 1 :]]
        if len(numbers) > 1 and set(_matches(_render(form, wider), everything)) == wanted:
            shown = wider
    return _render(form, shown)


def _matches(target: str, paths: list[str]) -> list[str]:
    parsed = Target.parse(target)
    return [path for path in paths if parsed.path_matches(path)]


def _render(form: str, shown: list[str]) -> str:
    levels = iter(shown)
    return ".".join(next(levels) if level.isdigit() else level for level in form.split("."))


def _brackets(numbers: tuple[int, ...]) -> str:
    """Numbers as a level of a target.

    >>> _brackets((4,)), _brackets((0, 1, 2, 5))
    ('4', '[0-2,5]')
    """
    return str(numbers[0]) if len(numbers) == 1 else f"[{','.join(runs(numbers, '-'))}]"


def runs(numbers: Iterable[int], dash: str) -> list[str]:
    """Ascending numbers with runs of three and more drawn together.

    >>> runs([0, 1, 2, 5, 7, 8], "-")
    ['0-2', '5', '7', '8']
    """
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    drawn = (map(str, run) if len(run) < 3 else (f"{run[0]}{dash}{run[-1]}",) for run in found)
    return [text for texts in drawn for text in texts]
