"""`Cast`: the floating-point tensors of a module get another type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rewire import tensor_rules
from rewire.edits.base import Match, Outcome, Refusal, Scene
from rewire.module_tree import get_tensor, under
from rewire.plan import Cast
from rewire.surgery import CastTensors, Change


def decide(edit: Cast, number: int, matches: Sequence[Match], scene: Scene) -> Iterator[Outcome]:
    """One outcome per module or parameter matched; a tensor matched twice is cast once.

    Modules without floating-point tensors are passed over, unless nothing else was matched.
    """
    saved = frozenset(scene.model.state_dict())
    found = {match: _names(match, scene) for match in matches}
    everything = frozenset(name for names in found.values() for name in names)
    seen: set[str] = set()
    for match, all_names in found.items():
        names = tuple(name for name in all_names if name not in seen)
        if everything and not names:
            continue
        seen.update(names)
        yield _decide(edit, number, match, names, everything, saved, scene)


def _names(match: Match, scene: Scene) -> tuple[str, ...]:
    if match.module is None:
        return (match.path,)
    module = match.module
    own = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    # Buffers too, as with `module.to(dtype)`.
    return tuple(under(match.path, name) for name, tensor in own if tensor.is_floating_point())


def _decide(
    edit: Cast,
    number: int,
    match: Match,
    names: Sequence[str],
    everything: frozenset[str],
    saved: frozenset[str],
    scene: Scene,
) -> Outcome:
    if not names:
        return Refusal(match.path, "has no floating-point tensors")
    for name, other in scene.tied_elsewhere(sorted(everything)).items():
        if name in names:
            return Refusal(match.path, f"{name} is tied to {other}, which the target leaves out; target both")
    steps = {name: _step(scene, name, edit.dtype) for name in names}
    # Buffers that are not saved have no place in the record: no checkpoint holds them.
    rule = tuple(step for name, step in steps.items() if name in saved)
    detail = f"{len(names)} tensors → {edit.dtype}"
    surgeon = CastTensors(tuple(steps.values()), keep=edit.keep_original)
    return Change(number, "cast", match.path, detail, rule, surgeon)


def _step(scene: Scene, name: str, dtype: str) -> tensor_rules.Cast:
    before = str(get_tensor(scene.model, name).dtype).removeprefix("torch.")
    return tensor_rules.Cast(name, name, dtype, before)
