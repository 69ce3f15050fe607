"""Would the outputs show a mistake? Measured by disturbing the edited tensors, kind by kind.

Freshly initialised models hide mistakes: with attention close to uniform, exchanging q and k changes nothing
that a comparison could see; SAM's own initialisation gives image embeddings of 1e-19.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rewire.proof.cases import Case
from rewire.proof.compare import largest, relative_difference
from rewire.proof.execution import Outputs, forward
from rewire.proof.guard import replaced
from rewire.proof.names import align, count_by_kind
from rewire.proof.weights import parameters_of

Disturbance = Callable[[Tensor, int], Tensor]
"""Gives other values for a tensor; the number makes tensors of one kind differ from each other."""

NOISE = 0.5
"""Standard deviation of the values that tell whether a bias has any influence at all."""


@dataclass(frozen=True)
class Reaction:
    """How far the outputs moved, relative to their scale, when all tensors of one kind were disturbed.

    `names` are theirs. `is_idle` is set for biases that move nothing whatever their values are, as those of key
    projections before softmax, and for what the untouched model does not read (see `idle`); no output can tell
    anything about them.
    """

    kind: str
    names: tuple[str, ...]
    movement: float
    is_idle: bool = False


def measure_reactions(
    model: nn.Module, names: Sequence[str], case: Case, enough: float, by_module: bool = False
) -> tuple[Reaction, ...]:
    """Disturbs the named tensors of `model`, one kind at a time, and measures the outputs of `case`.

    Disturbed means: rows in another order, as a wrong layout would leave them. The outputs should move by
    `enough`. The model's own tensors are never written to. With `by_module` a weight and its bias are
    disturbed together, which takes half the forwards.
    """
    parameters = parameters_of(model)
    present = align(names, [name for name, one in parameters.items() if one.is_floating_point()])
    reference = forward(model, case)
    groups = _grouped(present.values(), by_module)
    reactions = [
        Reaction(kind, tuple(group), movement(model, case, reference, {n: parameters[n] for n in group}, shuffled))
        for kind, group in groups.items()
    ]
    return tuple(
        _idle_if_ignored(model, case, reference, {n: parameters[n] for n in groups[one.kind]}, one, reactions, enough)
        for one in reactions
    )


def _grouped(names: Iterable[str], by_module: bool) -> Mapping[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for kind, group in count_by_kind(names).items():
        groups.setdefault(kind.partition(".")[0] if by_module else kind, []).extend(group)
    return groups


def movement(
    model: nn.Module, case: Case, reference: Outputs, group: Mapping[str, nn.Parameter], change: Disturbance
) -> float:
    """How far the outputs move when every tensor of `group` is changed."""
    changed = {name: (one, change(one.detach(), index)) for index, (name, one) in enumerate(group.items())}
    with replaced(changed):
        try:
            moved = forward(model, case)
        except Exception:  # disturbed values may be refused by the model; that too is a reaction
            return math.inf
    return max((_moved(tensor, moved.get(name)) for name, tensor in reference.items()), default=0.0)


def _moved(before: Tensor, after: Tensor | None) -> float:
    """Relative to the scale of `before`; what was all zero has none, and shows nothing."""
    if after is None or not before.is_floating_point() or largest(before) == 0:
        return 0.0
    return relative_difference(before, after)


def _idle_if_ignored(
    model: nn.Module,
    case: Case,
    reference: Outputs,
    group: Mapping[str, nn.Parameter],
    reaction: Reaction,
    all_reactions: Sequence[Reaction],
    enough: float,
) -> Reaction:
    """A bias that moves nothing, in a module whose weight does, is idle if large random values move nothing
    either.
    """
    weight = reaction.kind.removesuffix("bias") + "weight"
    siblings = [one.movement for one in all_reactions if one.kind == weight]
    if reaction.movement >= enough or weight == reaction.kind or max(siblings, default=0.0) < enough:
        return reaction
    is_idle = movement(model, case, reference, group, random_values) < enough / 10
    return replace(reaction, is_idle=is_idle)


def shuffled(tensor: Tensor, salt: int) -> Tensor:
    """The rows of `tensor` in random order; the elements where there is only one row.

    >>> sorted(shuffled(torch.arange(6.0), 0).tolist())
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    flat = tensor.reshape(-1) if tensor.ndim == 0 or tensor.shape[0] == 1 else tensor
    order = torch.randperm(flat.shape[0], generator=torch.Generator().manual_seed(salt))
    if torch.equal(order, torch.arange(len(order))):
        order = order.flip(0)
    return flat[order.to(tensor.device)].reshape(tensor.shape)


def random_values(tensor: Tensor, salt: int) -> Tensor:
    """Normal random numbers of the shape and type of `tensor`, at least `NOISE` in standard deviation."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(salt))
    return (noise * max(NOISE, largest(tensor))).to(tensor.device, tensor.dtype)


def weakest(reactions: Sequence[Reaction]) -> float:
    """The smallest movement, idle biases left out; infinite when there is nothing to measure."""
    return min((one.movement for one in reactions if not one.is_idle), default=math.inf)


def insensitive(reactions: Sequence[Reaction], enough: float) -> list[Reaction]:
    """The kinds that the outputs do not react to."""
    return [one for one in reactions if not one.is_idle and not one.movement >= enough]
