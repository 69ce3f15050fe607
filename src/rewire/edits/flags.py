"""`Freeze` and `Unfreeze`: which parameters are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rewire.edits.base import Match, Outcome, Refusal, Scene, tensor_names
from rewire.module_tree import get_tensor
from rewire.plan import Freeze, Unfreeze
from rewire.surgery import Change, SetFlags


def decide(edit: Freeze | Unfreeze, number: int, matches: Sequence[Match], scene: Scene) -> Iterator[Outcome]:
    """One outcome per module or parameter matched.

    A module within a matched one is not counted again. Modules without parameters (an activation that `**`
    caught) are passed over, unless nothing else was matched.
    """
    trainable = isinstance(edit, Unfreeze)
    found = {match: _names(match) for match in matches}
    seen: set[str] = set()
    for match, names in found.items():
        if any(found.values()) and seen.issuperset(names):
            continue
        seen.update(names)
        yield _decide(edit.kind, number, match, names, scene, trainable)


def _names(match: Match) -> tuple[str, ...]:
    return (match.path,) if match.module is None else tensor_names(match.path, match.module)


def _decide(kind: str, number: int, match: Match, names: Sequence[str], scene: Scene, trainable: bool) -> Outcome:
    if not names:
        return Refusal(match.path, "has no parameters of its own (is it one part of a joined projection?)")
    tensors = [get_tensor(scene.model, name) for name in names]
    if trainable and not all(tensor.is_floating_point() for tensor in tensors):
        return Refusal(match.path, "holds integer (quantised) parameters, which cannot be trained")
    count = sum(tensor.numel() for tensor in tensors)
    detail = f"{count:,} parameters {'trainable' if trainable else 'frozen'}"
    return Change(number, kind, match.path, detail, (), SetFlags(dict.fromkeys(names, trainable)))
