"""From a rule, and the types and shapes of the tensors before it, to the copies that make the tensors after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from rewire.errors import RuleError
from rewire.moves.array import CODES, Array, Library
from rewire.moves.copies import Axis, Move
from rewire.tensor_rules import Cast, CastBack, Shape, Step, check_names, visible


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor after a rule: the copies that fill it, in the order of their target starts.

    `casts` are the safetensors codes of the types that the values go through, from the sources' to `dtype`;
    it is empty where the bytes stay as they are. A tensor without elements has no moves.
    """

    name: str
    shape: Shape
    dtype: str
    moves: tuple[Move, ...]
    casts: tuple[str, ...] = ()


def compile_rule(rule: Iterable[Step], infos: Mapping[str, tuple[str, Shape]]) -> dict[str, Made]:
    """Every tensor after `rule`, those that it does not touch included; side tensors are left out.

    `infos` gives the dtype code and shape of every tensor before. What was put aside earlier may be among them
    under its name (`kept:…`), for the steps that bring it back. Raises `RuleError` where the rule does not fit
    or needs values that only a model in memory has.

    >>> from rewire.tensor_rules import SplitRows
    >>> made = compile_rule([SplitRows("qk", ("q", "k"), sizes=(4, 2), groups=2)], {"qk": ("BF16", (6, 8))})
    >>> (move,) = made["k"].moves
    >>> move.name, move.source_start, move.target_start
    ('qk', 16, 0)
    >>> [(axis.count, axis.source, axis.target) for axis in move.axes]
    [(2, 24, 8), (8, 1, 1)]
    """
    current: dict[str, Any] = {name: Array.whole(name, dtype, shape) for name, (dtype, shape) in infos.items()}
    library = Library()
    for step in rule:
        _check_values(step)
        check_names(step, current)
        _check_type(step, current)
        step.apply(current, library)
    return {name: _made(name, array) for name, array in visible(current).items()}


def _made(name: str, array: Array) -> Made:
    size, filled = prod(array.shape), sum(move.size for move in array.moves)
    if size != filled:
        raise RuleError(f"{name}: {filled} of {size} elements would be written; this is a fault of Rewire, report it")
    return Made(name, array.shape, array.dtype, array.moves, array.casts)


def _check_values(step: Step) -> None:
    if isinstance(step, CastBack) and not step.inverse().exact:
        raise RuleError(
            f"{step.kind} {step.source}: {step.from_dtype} holds less than {step.dtype} and the checkpoint does not "
            "have the values before the cast; convert the original checkpoint instead"
        )


def _check_type(step: Step, current: Mapping[str, Array]) -> None:
    if isinstance(step, Cast | CastBack):
        expected, found = CODES.get(step.from_dtype, step.from_dtype), current[step.source].dtype
        if expected != found:
            raise RuleError(
                f"{step.kind} {step.source}: the rule expects {expected}, the tensor is {found}; "
                "resolve the plan for this checkpoint"
            )


def check_bytes(made: Made, bits: int) -> str | None:
    """Why `made` cannot be copied byte by byte, its sources having `bits` per element; None if it can.

    Only elements narrower than a byte can be in the way: every run of elements that lie together must begin and
    end between two bytes, in the source and in the target.

    >>> rows = Made("q", (2, 3), "F4", (Move("qk", 0, 0, (Axis(2, 6, 3), Axis(3, 1, 1))),))
    >>> check_bytes(rows, 4)
    'q takes runs of 3 elements of 4 bits out of qk: they begin or end within a byte'
    >>> check_bytes(rows, 8)
    """
    for move in made.moves:
        run, outer = _run(move)
        places = [run, move.source_start, move.target_start]
        places += [stride for axis in outer for stride in (axis.source, axis.target)]
        if any(place * bits % 8 for place in places):
            many = "runs of 1 element" if run == 1 else f"runs of {run} elements"
            return f"{made.name} takes {many} of {bits} bits out of {move.name}: they begin or end within a byte"
    return None


def _run(move: Move) -> tuple[int, tuple[Axis, ...]]:
    """How many elements lie together on both sides, and the axes that go over such runs."""
    last = move.axes[-1] if move.axes else Axis(1, 1, 1)
    return (last.count, move.axes[:-1]) if last.source == last.target == 1 else (1, move.axes)
