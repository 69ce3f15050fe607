"""Tensors that no output can tell anything about, because the untouched model does not read them either."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rewire.errors import RuleError
from rewire.proof.cases import Case
from rewire.proof.execution import forward
from rewire.proof.names import align
from rewire.proof.pair import Pair
from rewire.proof.strength import Reaction, insensitive, movement, random_values
from rewire.proof.weights import parameters_of, state_of
from rewire.tensor_rules import Component, components, invert, run


def with_idle(pair: Pair, reactions: Sequence[Reaction], case: Case) -> tuple[Reaction, ...]:
    """`reactions`, those of parts of a tensor marked that the untouched model ignores too, while it reads the rest.

    Slices for experts that are no more than the identity are such parts. A whole tensor without influence is
    something else: inputs that reach it are missing.
    """
    dead = insensitive(reactions, pair.limits.reaction)
    if not dead:
        return tuple(reactions)
    alive = {name for one in reactions if one not in dead for name in one.names}
    idle = [one for one in dead if _was_idle(pair, one, alive, case)]
    return tuple(replace(one, is_idle=True) if one in idle else one for one in reactions)


def _was_idle(pair: Pair, reaction: Reaction, alive: set[str], case: Case) -> bool:
    names = set(reaction.names)
    parts = [(part, own) for part, own in _parts(pair) if names.intersection(own.values())]
    if not parts or not all(alive.intersection(own.values()) for _, own in parts):
        return False
    state = state_of(pair.after)
    state |= {name: random_values(state[name], salt) for salt, name in enumerate(reaction.names)}
    values: dict[str, Tensor] = {}
    try:
        for part, own in parts:
            values |= run(invert(part.steps), {name: state[found] for name, found in own.items()}, torch)
    except RuleError:  # something was put aside
        return False
    parameters = parameters_of(pair.before)
    group = {name: parameters[name] for name in values if name in parameters}
    order = list(group)
    moved = movement(pair.before, case, forward(pair.before, case), group, lambda _, number: values[order[number]])
    return moved < pair.limits.reaction / 10


def _parts(pair: Pair) -> Iterator[tuple[Component, dict[str, str]]]:
    """The independent parts of the rules, with the names that the edited model has for what they give.

    These may differ: an adapter may have wrapped a module.
    """
    present = list(parameters_of(pair.after))
    for part in components(pair.rules):
        own = align(part.targets, present)
        if len(own) == len(part.targets):
            yield part, own
