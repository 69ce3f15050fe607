"""Many steps in few records: the form in which a plan file holds a tensor rule.

A record is `tensor_rules.to_record` of a step, defaults left out, with patterns for names:

```
step: split                                        {0}, {1} … stand for the numbers that `each` lists;
whole: layers.{0}.attn.qkv.weight                  there is one step for every combination of them
parts: [layers.{0}.attn.q.weight, layers.{0}.attn.k.weight]
sizes: [8, 4]
each: ["0..31"]

step: stack                                        {0..127}, {0,2,4..6} stand for that list of names,
whole: layers.{0}.experts.wi                       in place
parts: ["layers.{0}.experts.{0..127}.wi.weight"]
each: ["0,2,4..6"]
```

A brace that belongs to a name is written twice: `{{`, `}}`. What a record stands for is counted before any of it
is made, so that no file can fill the memory.

>>> from rewire.tensor_rules import Rename
>>> rule = tuple(Rename(f"h.{layer}.attn.c_proj.bias", f"h.{layer}.attn.o.bias") for layer in range(12))
>>> compress(rule)
[{'step': 'rename', 'source': 'h.{0}.attn.c_proj.bias', 'target': 'h.{0}.attn.o.bias', 'each': ['0..11']}]
>>> expand(compress(rule)) == rule
True
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from math import prod
from typing import Any

from rewire.errors import RuleError
from rewire.tensor_rules import KEPT, STEPS, Rule, Step

MAX_NAMES = 2_000_000
"""Names that a list of records may stand for, all together."""

EACH = "each"

_NAMES = ("source", "target", "whole")
_NAME_LISTS = ("parts",)
_DTYPES = ("dtype", "from_dtype")
_NUMBER_LISTS = ("sizes", "grid", "order", "rows")
_MAX_DIMS = 16

Record = Mapping[str, Any]


# ---------------------------------------------------------------- from records to steps


def expand(records: Iterable[Record]) -> Rule:
    """The steps that `records` stand for, in their order.

    Raises `RuleError` for anything that is no such record, and for more than `MAX_NAMES` names.

    >>> [
    ...     step.whole
    ...     for step in expand([{"step": "unstack", "whole": "{0}.w", "parts": ["{0}.{1..2}"], "each": ["4,7"]}])
    ... ]
    ['4.w', '7.w']
    """
    forms = [_Form.read(record) for record in records]
    names = sum(form.names for form in forms)
    if names > MAX_NAMES:
        raise RuleError(f"the steps stand for {names:,} names, more than the {MAX_NAMES:,} that are allowed")
    return tuple(step for form in forms for step in form.steps())


def count_names(record: Record) -> int:
    """How many names a record stands for; none of them is made. Raises `RuleError` as `expand` does.

    >>> count_names({"step": "drop", "source": "layers.{0}.bias", "each": ["0..999999"]})
    1000000
    """
    form = _Form.read(record)
    if form.names > MAX_NAMES:
        raise RuleError(f"stands for {form.names:,} names, more than the {MAX_NAMES:,} that are allowed")
    next(form.steps())
    return form.names


@dataclass(frozen=True)
class _Form:
    """A record, read: what every step of it is made from."""

    kind: type[Step]
    single: Mapping[str, _Pattern]
    listed: Mapping[str, tuple[_Pattern, ...]]
    fixed: Mapping[str, Any]
    each: tuple[_Numbers, ...]

    @staticmethod
    def read(record: Record) -> _Form:
        kind = STEPS.get(record.get("step", "")) if isinstance(record.get("step", ""), str) else None
        if kind is None:
            raise RuleError(f"no step {record.get('step')!r}; known steps: {', '.join(STEPS)}")
        known = {field.name: field.default for field in fields(kind)}
        given = {name: value for name, value in record.items() if name not in ("step", EACH)}
        if unknown := sorted(set(given) - set(known)):
            raise RuleError(f"{kind.kind}: unknown key {unknown[0]!r} (allowed: {', '.join([*known, EACH])})")
        if missing := [name for name, default in known.items() if default is MISSING and name not in given]:
            raise RuleError(f"{kind.kind}: missing key {missing[0]!r}; it has to be given")
        each = tuple(_numbers(text) for text in _texts(EACH, record.get(EACH, ())))
        single = {name: _pattern(_text(name, given[name])) for name in _NAMES if name in given}
        listed = {name: tuple(map(_pattern, _texts(name, given[name]))) for name in _NAME_LISTS if name in given}
        rest = {name: _value(name, given[name]) for name in given if name not in (*_NAMES, *_NAME_LISTS)}
        form = _Form(kind, single, listed, rest, each)
        form._check_patterns()
        return form

    def _check_patterns(self) -> None:
        for name, pattern in self.single.items():
            if pattern.lists:
                raise RuleError(f"{self.kind.kind}: {name} takes one name, so no list such as {{0..3}} can stand in it")
        used = {number for pattern in self._patterns() for number in pattern.places}
        if wrong := sorted(used ^ set(range(len(self.each)))):
            raise RuleError(
                f"{self.kind.kind}: {{{wrong[0]}}} stands in {'the names' if wrong[0] in used else 'no name'}, "
                f"and `each` lists numbers for {len(self.each)} places"
            )

    def _patterns(self) -> tuple[_Pattern, ...]:
        return (*self.single.values(), *(pattern for found in self.listed.values() for pattern in found))

    @property
    def names(self) -> int:
        return prod(numbers.count for numbers in self.each) * sum(pattern.count for pattern in self._patterns())

    def steps(self) -> Iterator[Step]:
        """Only once the number of names is known to be bearable."""
        single = {name: pattern.templates()[0] for name, pattern in self.single.items()}
        listed = {name: [t for p in patterns for t in p.templates()] for name, patterns in self.listed.items()}
        for numbers in itertools.product(*(numbers.listed() for numbers in self.each)):
            named: dict[str, Any] = {name: template.format(*numbers) for name, template in single.items()}
            for name, templates in listed.items():
                named[name] = tuple([template.format(*numbers) for template in templates])
                if len(set(named[name])) < len(templates):
                    raise RuleError(f"{self.kind.kind}: {name} lists a name twice: {named[name][:8]}")
            try:
                yield self.kind(**named, **self.fixed)
            except (TypeError, ValueError) as error:
                raise RuleError(f"{self.kind.kind}: {error}") from None


@dataclass(frozen=True)
class _Numbers:
    """A list such as `0,2,4..6`."""

    ranges: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        return sum(last - first + 1 for first, last in self.ranges)

    def listed(self) -> list[int]:
        return [number for first, last in self.ranges for number in range(first, last + 1)]


_NUMBER = r"(?:0|[1-9][0-9]{0,8})"
_RANGE = re.compile(rf"({_NUMBER})(?:\.\.({_NUMBER}))?")


def _numbers(text: str) -> _Numbers:
    ranges = []
    for item in text.split(","):
        found = _RANGE.fullmatch(item)
        if found is None:
            raise RuleError(f"{_short(text)} is no list of numbers such as 0,2,4..6")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise RuleError(f"the range {item} runs backwards")
        ranges.append((first, last))
    return _Numbers(tuple(ranges))


@dataclass(frozen=True)
class _Pattern:
    """A name with places: literal text, numbers of `each`, and lists."""

    pieces: tuple[str | int | _Numbers, ...]

    @property
    def places(self) -> set[int]:
        return {piece for piece in self.pieces if isinstance(piece, int)}

    @property
    def lists(self) -> list[_Numbers]:
        return [piece for piece in self.pieces if isinstance(piece, _Numbers)]

    @property
    def count(self) -> int:
        return prod(numbers.count for numbers in self.lists)

    def templates(self) -> list[str]:
        """One `str.format` template for every combination of the lists; its fields are the numbers of `each`."""
        choices = [
            list(map(str, piece.listed())) if isinstance(piece, _Numbers) else [_field(piece)] for piece in self.pieces
        ]
        return ["".join(choice) for choice in itertools.product(*choices)]


def _field(piece: str | int) -> str:
    return f"{{{piece}}}" if isinstance(piece, int) else _escaped(piece)


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def _pattern(text: str) -> _Pattern:
    pieces: list[str | int | _Numbers] = []
    last = 0
    for found in _TOKEN.finditer(text):
        pieces.append(text[last : found.start()])
        last = found.end()
        if found[0] in ("{{", "}}"):
            pieces.append(found[0][0])
        elif found[1] is None:
            raise RuleError(f"{_short(text)}: a single `{found[0]}`; a brace that belongs to the name is written twice")
        else:
            pieces.append(int(found[1]) if re.fullmatch(_NUMBER, found[1]) else _numbers(found[1]))
    return _Pattern((*pieces, text[last:]))


# ---------------------------------------------------------------- values of a record


def _value(name: str, value: object) -> Any:
    if name in _DTYPES:
        return _dtype(name, value)
    if name in _NUMBER_LISTS:
        return tuple(_number(name, item) for item in _sequence(name, value))
    number = _number(name, value)
    if name == "dim" and number >= _MAX_DIMS:
        raise RuleError(f"dim is {number}, and no tensor has {_MAX_DIMS} dimensions")
    return number


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise RuleError(f"{name} must be text, but is {_short(value)}")
    if value.startswith(KEPT):
        raise RuleError(f"{name} is {_short(value)}, and names that begin with {KEPT} are for what steps put aside")
    return value


def _texts(name: str, value: object) -> tuple[str, ...]:
    return tuple(_text(name, item) for item in _sequence(name, value))


def _sequence(name: str, value: object) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise RuleError(f"{name} must be a list, but is {_short(value)}")
    return value


def _number(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise RuleError(f"{name} must be a whole number of 0 or more, but is {_short(value)}")
    return value


def _dtype(name: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"(bfloat|float|complex|u?int)\d+(_\w+)?|bool", value):
        raise RuleError(f"{name} must be a type such as float16, but is {_short(value)}")
    return value


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:79] + "…"


# ---------------------------------------------------------------- from steps to records


def compress(rule: Iterable[Step]) -> list[dict[str, Any]]:
    """Records that stand for the steps of `rule`: the same steps, in an order that leads to the same tensors.

    Steps that touch the same name keep their order; among others, those alike are put together.
    """
    return [record for steps in _levels(rule) for record in _records(steps)]


def _levels(rule: Iterable[Step]) -> list[list[Step]]:
    """The steps by how many others must come before them: those of one level have no name in common."""
    level_of: dict[str, int] = {}
    levels: list[list[Step]] = []
    for step in rule:
        names = {name.removeprefix(KEPT) for name in (*step.inputs, *step.outputs)}
        level = max((level_of.get(name, 0) for name in names), default=0)
        level_of |= dict.fromkeys(names, level + 1)
        if level == len(levels):
            levels.append([])
        levels[level].append(step)
    return levels


_Text = tuple[str, ...]
"""The literal text of the names of a step, cut where numbers stand."""


def _records(steps: Iterable[Step]) -> Iterator[dict[str, Any]]:
    """Records of steps whose order is free."""
    groups: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
    shapes: dict[tuple[Any, ...], _Shape] = {}
    for step in steps:
        shape, numbers = _Shape.of(step)
        groups.setdefault(shape.key, []).append(numbers)
        shapes.setdefault(shape.key, shape)
    for key, rows in groups.items():
        yield from shapes[key].records(rows)


@dataclass(frozen=True)
class _Shape:
    """What steps have in common that differ in numbers alone: a record with names cut at their numbers."""

    record: Mapping[str, Any]
    names: Mapping[str, tuple[_Text, ...]]
    key: tuple[Any, ...]

    @staticmethod
    def of(step: Step) -> tuple[_Shape, tuple[int, ...]]:
        values = {field.name: (getattr(step, field.name), field.default) for field in fields(step)}
        said = {name: value for name, (value, default) in values.items() if value != default}
        record = {"step": step.kind, **said}
        names: dict[str, tuple[_Text, ...]] = {}
        numbers: list[int] = []
        for name in (*_NAMES, *_NAME_LISTS):
            if name in record:
                cut = _folded(record[name]) if name in _NAME_LISTS else [_cut(record[name])]
                names[name] = tuple(text for text, _ in cut)
                numbers += [number for _, found in cut for number in found]
        others = [(name, value) for name, value in record.items() if name not in names]
        return _Shape(record, names, (tuple(names.items()), tuple(others))), tuple(numbers)

    def records(self, rows: Sequence[tuple[int, ...]]) -> Iterator[dict[str, Any]]:
        """`rows`: the numbers of every step."""
        first_with = {column: place for place, column in reversed(list(enumerate(zip(*rows, strict=True))))}
        columns = sorted(first_with.values())
        place_of = [columns.index(first_with[column]) for column in zip(*rows, strict=True)]
        for box in boxes([tuple(row[column] for column in columns) for row in rows]):
            varied = [place for place, numbers in enumerate(box) if len(numbers) > 1]
            fill = [f"{{{varied.index(place)}}}" if place in varied else str(box[place][0]) for place in place_of]
            each = {EACH: [spell(box[place]) for place in varied]} if varied else {}
            yield {**self._filled(iter(fill)), **each}

    def _filled(self, fill: Iterator[str]) -> dict[str, Any]:
        filled = {name: [_joined(text, fill) for text in texts] for name, texts in self.names.items()}
        single = {name: filled[name][0] for name in filled if name not in _NAME_LISTS}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in self.record.items()}
        return {**plain, **filled, **single}


def _joined(text: _Text, fill: Iterator[str]) -> str:
    """The literal texts with what stands between them."""
    return text[0] + "".join(next(fill) + piece for piece in text[1:])


_DIGITS = re.compile("([0-9]+)")
_CANONICAL = re.compile(_NUMBER)


def _cut(name: str) -> tuple[_Text, tuple[int, ...]]:
    """A name cut at its numbers, braces escaped. Numbers with leading zeros count as text."""
    texts, numbers = [""], []
    for place, piece in enumerate(_DIGITS.split(name)):
        if place % 2 and _CANONICAL.fullmatch(piece):
            numbers.append(int(piece))
            texts.append("")
        else:
            texts[-1] += _escaped(piece)
    return tuple(texts), tuple(numbers)


_Cut = tuple[_Text, tuple[int, ...]]


def _folded(names: Sequence[str]) -> list[_Cut]:
    """Names cut at their numbers; runs of names that differ in one number are one name with a list."""
    found: list[_Cut] = []
    run: list[_Cut] = []
    for cut in map(_cut, names):
        if run and _one_differs([*run[-2:], cut], run[0]) is None:
            found += _fold(run)
            run = []
        run.append(cut)
    return [*found, *_fold(run)]


def _one_differs(cuts: Sequence[_Cut], first: _Cut) -> int | None:
    """The one place where `cuts` and `first` have different numbers."""
    if any(text != first[0] for text, _ in cuts):
        return None
    differing = {place for _, numbers in cuts for place, number in enumerate(numbers) if number != first[1][place]}
    return differing.pop() if len(differing) == 1 else None


def _fold(run: Sequence[_Cut]) -> list[_Cut]:
    if len(run) < 3:
        return list(run)
    text, numbers = run[0]
    place = next(place for place, number in enumerate(run[1][1]) if number != numbers[place])
    listed = f"{{{spell([cut[1][place] for cut in run])}}}"
    merged = (*text[:place], text[place] + listed + text[place + 1], *text[place + 2 :])
    return [(merged, (*numbers[:place], *numbers[place + 1 :]))]


def spell(numbers: Sequence[int]) -> str:
    """Numbers as a list with ranges, in their order.

    >>> spell([0, 1, 2, 5, 7, 8])
    '0..2,5,7..8'
    """
    return ",".join(f"{first}..{last}" if first < last else str(first) for first, last in ranges(numbers))


def ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of numbers that follow one another, each by its first and last.

    >>> ranges([0, 1, 2, 5])
    [(0, 2), (5, 5)]
    """
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return runs


def boxes(rows: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Tuples of numbers as few products of sets: for each, the numbers in every place.

    >>> boxes([(0, 0), (0, 1), (1, 0), (1, 1), (2, 1)])
    [((0, 1), (0, 1)), ((2,), (1,))]
    """
    if not rows or not rows[0]:
        return [()] if rows else []
    rest: dict[int, list[tuple[int, ...]]] = {}
    for first, *others in rows:
        rest.setdefault(first, []).append(tuple(others))
    firsts: dict[tuple[Any, ...], list[int]] = {}
    for first, below in rest.items():
        for box in boxes(below):
            firsts.setdefault(box, []).append(first)
    return [(tuple(sorted(first)), *box) for box, first in firsts.items()]
