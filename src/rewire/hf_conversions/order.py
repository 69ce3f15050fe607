"""Steps of independent jobs in an order in which no name is given before the tensor that had it is taken."""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rewire.tensor_rules import Rename, Rule, Step, with_names


@dataclass
class Part:
    """Steps of one job, which share no tensor with those of another."""

    steps: list[Step]

    def __post_init__(self) -> None:
        made: set[str] = set()
        taken: dict[str, None] = {}
        for step in self.steps:
            taken |= dict.fromkeys(name for name in step.inputs if name not in made)
            made = (made - set(step.inputs)) | set(step.outputs)
        self.taken, self.made = tuple(taken), made


def in_order(parts: Sequence[Part]) -> Rule:
    """The steps of all parts, so that no name is given before the tensor that had it is taken."""
    parts = [part for part in parts if part.steps]
    aside: list[Step] = []
    while True:
        taker = {name: number for number, part in enumerate(parts) for name in part.taken}
        graph = {
            number: {taker[name] for name in part.made if name in taker} - {number} for number, part in enumerate(parts)
        }
        try:
            order = tuple(graphlib.TopologicalSorter(graph).static_order())
        except graphlib.CycleError as error:
            first, second = error.args[1][:2]  # the first is to come before the second: it takes what that makes
            name = next(name for name in parts[first].taken if name in parts[second].made)
            parts[first] = Part([with_names(step, _aside(name)) for step in parts[first].steps])
            aside.append(Rename(name, f"{name}~"))
        else:
            return (*aside, *(step for number in order for step in parts[number].steps))


def _aside(name: str) -> Callable[[str], str]:
    return lambda other: f"{name}~" if other == name else other
