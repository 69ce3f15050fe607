"""`Rename`: a module gets another name; its parent's forward still finds it under the old one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from rewire import tensor_rules
from rewire.edits.base import Match, Outcome, Refusal, Scene
from rewire.module_tree import get_tensor, split_path, submodule, under
from rewire.plan import Rename
from rewire.surgery import Change, Placements, Swap, aliased


def decide(edit: Rename, number: int, matches: Sequence[Match], scene: Scene) -> Iterator[Outcome]:
    """One outcome per module matched."""
    for match in matches:
        yield _decide(edit, number, match, scene)


def _decide(edit: Rename, number: int, match: Match, scene: Scene) -> Outcome:
    parent_path, _ = split_path(match.path)
    if match.module is None or not match.path:
        return Refusal(match.path, "only modules below the model itself can be renamed")
    parent = submodule(scene.model, parent_path)
    if isinstance(parent, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return Refusal(match.path, f"its parent is a {type(parent).__name__}, which finds children by name")
    if hasattr(parent, edit.to):
        return Refusal(match.path, f"{under(parent_path, edit.to)} exists already")
    new_path = under(parent_path, edit.to)
    saved = [name for name in scene.model.state_dict() if name.startswith(f"{match.path}.")]
    rule = tuple(tensor_rules.Rename(name, new_path + name.removeprefix(match.path)) for name in saved)
    if any(get_tensor(scene.model, name).is_meta is False for name in saved):
        return Refusal(match.path, "holds tensors that are neither parameters nor buffers")
    # The module itself moves and takes its tensors along: the steps are for the record only.
    swap = Swap((), MoveModule(match.path, new_path), old_names={match.path: edit.to})
    again = [step for alias in _sibling_aliases(match, scene) for step in aliased(rule, match.path, alias)]
    return Change(number, "rename", match.path, f"→ {edit.to}", (*rule, *again), swap)


def _sibling_aliases(match: Match, scene: Scene) -> tuple[str, ...]:
    """Further names the module has because its parent is shared; these change with it."""
    parent = submodule(scene.model, split_path(match.path)[0])
    return tuple(a for a in match.aliases if submodule(scene.model, split_path(a)[0]) is parent)


@dataclass(frozen=True)
class MoveModule:
    """Moves the module at `old` to `new`."""

    old: str
    new: str

    def __call__(self, model: nn.Module) -> Placements:
        return {self.new: submodule(model, self.old), self.old: None}
