"""What every edit is given and what it answers with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn

from rewire.module_tree import get_tensor, split_path, submodule, under
from rewire.surgery import Change, Swap, Twins, aliased, renamed


@dataclass(frozen=True)
class Refusal:
    """A place that the target matched and where the edit would be wrong, with the reason."""

    path: str
    reason: str


Outcome = Change | Refusal


@dataclass(frozen=True)
class Match:
    """A module (or, where `module` is None, a parameter) that a target matched.

    `aliases` are further paths of the same module.
    """

    path: str
    module: nn.Module | None
    aliases: tuple[str, ...] = ()


@dataclass
class Scene:
    """What an edit may look at: the model as earlier edits leave it, every tensor on meta.

    Attributes:
        model: the skeleton.
        source: the model itself, for what the skeleton cannot tell (its class and configuration).
        allow_code: whether classes named by import path may be imported.
        ties: names of parameters that are tied to each other by the model's own declaration.
        given_adapters: adapters whose weights come from a file, so that their initialisation must change nothing.
        edited: paths changed by earlier edits of the plan, with the number and kind of the edit.
    """

    model: nn.Module
    source: nn.Module
    allow_code: bool = False
    given_adapters: frozenset[str] = frozenset()
    ties: Mapping[str, frozenset[str]] = field(default_factory=dict)
    edited: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._seen = self._count()
        # Edits share what was shared before, and nothing else; so most models need to be looked through once only.
        self._may_share = bool(self.ties) or max(self._seen.values(), default=0) > 1

    def _count(self) -> Counter[int]:
        """How many names every parameter has, by its identity."""
        # A module shared under several paths counts with all of them.
        modules = [module for _, module in self.model.named_modules(remove_duplicate=False)]
        return Counter(id(t) for module in modules for t in module._parameters.values() if t is not None)

    def _shared(self, names: Sequence[str]) -> set[int]:
        """Those parameters of `names` that have several names now."""
        wanted = {id(get_tensor(self.model, name)) for name in names} if self._may_share else set()
        if not wanted <= self._seen.keys():  # an earlier edit made some of them
            self._seen = self._count()
        return {key for key in wanted if self._seen[key] > 1}

    def tied_elsewhere(self, names: Sequence[str]) -> dict[str, str]:
        """Those of `names` whose parameter goes by a further name, which is not among `names`."""
        given = set(names)
        groups = self._ties_of(names)
        return {name: min(group - given) for group in groups for name in sorted(group & given) if group - given}

    def twins(self, match: Match, names: Sequence[str]) -> tuple[str, ...]:
        """The paths of other modules that hold the tensors `names` of `match`, all of them, in layers alike."""
        groups = self._ties_of(names)
        if match.module is None or len(groups) < len(names):
            return ()
        places = []
        for name in names:
            leaf = name.removeprefix(match.path)
            group = set().union(*(group for group in groups if name in group))
            places.append({other.removesuffix(leaf) for other in group - {name} if other.endswith(leaf)})
        others = set.intersection(*places) - {match.path, *match.aliases} if places else set()
        return tuple(sorted(other for other in others if all(self._alike(n, match.path, other) for n in names)))

    def _alike(self, name: str, path: str, other: str) -> bool:
        """Whether the layer that holds a tensor is of the same class below `other` as below `path`."""
        layers = (split_path(name)[0], split_path(renamed(name, path, other))[0])
        first, second = (type(submodule(self.model, layer)) for layer in layers)
        return first is second

    def _ties_of(self, names: Sequence[str]) -> list[set[str]]:
        """The names that parameters of `names` go by, where there are several."""
        given = set(names)
        groups = [{name, *self.ties[name]} for name in names if name in self.ties]
        shared = self._shared(names)
        if shared:  # rare, so that the whole model is looked through only then
            by_id: dict[int, set[str]] = {}
            for name, tensor in self.model.named_parameters(remove_duplicate=False):
                by_id.setdefault(id(tensor), set()).add(name)
            groups += [by_id[key] for key in shared]
        return [group for group in groups if given & group]


class Handler(Protocol):
    """Decides what one kind of edit does at the places its target matched."""

    def __call__(self, edit: Any, number: int, matches: Sequence[Match], scene: Scene) -> Iterator[Outcome]:
        """One outcome per place. Each change is carried out on the skeleton before the next is asked for."""


def swap_change(
    number: int,
    kind: str,
    match: Match,
    detail: str,
    swap: Swap,
    *,
    alias_of: Mapping[str, str] | None = None,
    twins: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Change:
    """A change by a swap; the other names of a shared module get the same rule in the record.

    `alias_of` maps further module paths to those in the swap's placements; `twins` are modules of their own that
    hold the same tensors. `settings` are those that the edit left open.
    """
    swap = replace(swap, aliases=alias_of or {}, twins=Twins(match.path, tuple(twins), match.aliases))
    if twins:
        detail = f"{detail}; and so in {', '.join(twins)}, which holds the same tensors"
    again = [aliased(swap.rule, match.path, alias) for alias in (*match.aliases, *twins)]
    return Change(
        number, kind, match.path, detail, (*swap.rule, *(s for rule in again for s in rule)), swap, settings or {}
    )


def twins_of(outcome: Outcome) -> tuple[str, ...]:
    """Where else a change by a swap does the same: places that need no change of their own."""
    surgeon = outcome.surgeon if isinstance(outcome, Change) else None
    return surgeon.twins.others if isinstance(surgeon, Swap) else ()


def tensor_names(path: str, module: nn.Module) -> tuple[str, ...]:
    """The full names of all parameters of `module`, which stands at `path`."""
    if not module._modules:  # most often; and walking the tree takes ten times as long
        return tuple(under(path, name) for name, parameter in module._parameters.items() if parameter is not None)
    return tuple(under(path, name) for name, _ in module.named_parameters(remove_duplicate=False))


def tie_reason(scene: Scene, match: Match, names: Sequence[str], twins: Sequence[str] = ()) -> str | None:
    """Why an edit of the tensors `names` (of `match` and its `twins`) would break a tie; None if it breaks none."""
    others = (*match.aliases, *twins)
    everywhere = [*names, *(renamed(name, match.path, other) for other in others for name in names)]
    for name, other in scene.tied_elsewhere(everywhere).items():
        return (
            f"{name} is tied to {other}, which this edit would leave as it is; untie them first "
            "(tie_word_embeddings=False in the configuration) or leave this module out of the target"
        )
    return None


def same_flags(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors are all trainable, or all not."""
    return len({tensor.requires_grad for tensor in tensors}) == 1
