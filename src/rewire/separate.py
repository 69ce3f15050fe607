"""Queries, keys and values, or gate and up, that are layers of their own: what a join may put together.

Found by names and shapes alone; whether the layers are really given the same tensor is for the join to see (it
stays exact if they are not). Where the names promise projections and nothing can be joined, there is a reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from rewire.family_table import SEPARATE
from rewire.linears import LinearFacts, Refusal, linear_facts
from rewire.roles import GATE_UP, KV, QKV, pattern_of


@dataclass(frozen=True)
class SeparateProjections:
    """Layers below the module at `path` that read inputs of the same width: candidates for a join."""

    path: str
    kind: str  # "attention" or "mlp"
    roles: tuple[str, ...]
    parts: tuple[str, ...]
    evidence: tuple[str, ...] = ()


# Gate first. The names of Llama, LFM, MT5, CPM-Ant, xLSTM, timm and a few more.
_GATE_UP_PAIRS = (
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("w_0", "w_1"),
    ("proj_up_gate", "proj_up"),
    ("fc1_g", "fc1_x"),
    ("gate", "up"),
    ("fc_gate", "fc_up"),
    ("linear_gate", "linear_up"),
)


def separate_projections(model: nn.Module) -> tuple[SeparateProjections, ...]:
    """Every place where queries, keys and values, or gate and up, are layers of their own.

    Where one of queries, keys and values has an input of another width (a cross-attention), the other two
    are given. A layer that stands alone in a wrapper is named with it (`q_proj.linear`). Layers that are adapted,
    quantised or otherwise not plain are left out.

    >>> attention = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj")})
    >>> separate_projections(nn.ModuleDict({"attn": attention}))[0].parts
    ('q_proj', 'k_proj', 'v_proj')
    """
    found: dict[tuple[int, ...], SeparateProjections] = {}
    for path, parent in model.named_modules():
        for kind, roles, parts in _found(parent):
            weights = tuple(id(parent.get_submodule(part)._parameters["weight"]) for part in parts)
            # Modules of their own may hold the same tensors (Zamba's attention): counted once, edited together.
            found.setdefault(weights, SeparateProjections(path, kind, roles, parts, (_width(parent, parts),)))
    return tuple(found.values())


def separate_refusals(model: nn.Module) -> tuple[Refusal, ...]:
    """The places that sound like separate projections of which nothing can be joined, with the reason."""
    refusals = ((path, _refusal(parent)) for path, parent in model.named_modules())
    return tuple(Refusal(path, reason) for path, reason in refusals if reason is not None)


# ---------------------------------------------------------------- what is there

_Found = tuple[str, tuple[str, ...], tuple[str, ...]]
"""Kind, roles, parts."""


def _found(parent: nn.Module) -> Iterator[_Found]:
    if len(parent._modules) < 2:
        return
    yield from _attention(parent)
    yield from _mlp(parent)
    yield from _known(parent)


def _attention(parent: nn.Module) -> Iterator[_Found]:
    """Children named alike but for the role: `q_proj`, `k_proj`, `v_proj`; `Wq`, `Wk`, `Wv`; ..."""
    for names in _alike(parent._modules):
        layers = {role: _layer(parent, names[role]) for role in QKV if role in names}
        found = {role: layer for role, layer in layers.items() if isinstance(layer, _Layer)}
        widths = [layer.facts.in_features for layer in found.values()]
        shared = [role for role, layer in found.items() if widths.count(layer.facts.in_features) > 1]
        # Queries and keys alone are a pointer, not an attention; keys and values may have queries that are learned.
        is_attention = len(names) == len(QKV) or tuple(shared) == KV or _keys_are_values(parent, names)
        if len(shared) > 1 and is_attention:
            yield "attention", tuple(shared), tuple(found[role].path for role in shared)


def _keys_are_values(parent: nn.Module, names: dict[str, str]) -> bool:
    """Whether the layer of the values is left out, so that the keys stand in (Gemma 4): it is there, as `None`."""
    absent = [name for name, value in (*vars(parent).items(), *parent._modules.items()) if value is None]
    pattern = pattern_of(names[min(names)])[0]
    return any(pattern_of(name) == (pattern, "v") for name in absent)


def _alike(names: Mapping[str, nn.Module | Tensor | None]) -> Iterator[dict[str, str]]:
    """Role to name, for all names that differ in nothing else."""
    alike: dict[str, dict[str, str]] = {}
    for name, value in names.items():
        pattern, role = pattern_of(name)
        if role in QKV and value is not None:
            alike.setdefault(pattern, {})[role] = name
    yield from alike.values()


def _mlp(parent: nn.Module) -> Iterator[_Found]:
    for pair in _GATE_UP_PAIRS:
        layers = _layers(parent, pair)
        if len({(layer.facts.in_features, layer.facts.out_features) for layer in layers}) == 1:
            yield "mlp", GATE_UP, tuple(layer.path for layer in layers)


def _known(parent: nn.Module) -> Iterator[_Found]:
    """Layers whose names do not say what they are, in classes that are known."""
    for roles, parts in SEPARATE.get(type(parent).__name__, ()):
        if len({layer.facts.in_features for layer in _layers(parent, parts)}) == 1:
            yield "attention", roles, parts


# ---------------------------------------------------------------- one layer


@dataclass(frozen=True)
class _Layer:
    """A layer that can be joined; `path` leads to it from the parent."""

    path: str
    facts: LinearFacts


def _layer(parent: nn.Module, name: str) -> _Layer | str:
    """The child `name`, or the only layer within it; else why there is none to be joined."""
    child = parent._modules.get(name)
    if child is None:
        return "there is none"
    facts = linear_facts(child)
    if isinstance(facts, LinearFacts):
        return _Layer(name, facts) if facts.form != "multihead" else "a whole attention"
    if len(child._modules) != 1 or child._parameters or hasattr(child, "base_layer"):
        return facts
    (inner,) = child._modules
    below = _layer(child, inner)
    return _Layer(f"{name}.{below.path}", below.facts) if isinstance(below, _Layer) else facts


def _layers(parent: nn.Module, names: tuple[str, ...]) -> list[_Layer]:
    """The layers at all these children, none if one cannot be joined."""
    if not all(name in parent._modules for name in names):
        return []
    layers = [_layer(parent, name) for name in names]
    found = [layer for layer in layers if isinstance(layer, _Layer)]
    return found if len(found) == len(names) else []


def _width(parent: nn.Module, parts: tuple[str, ...]) -> str:
    facts = [linear_facts(parent.get_submodule(part)) for part in parts]
    plain = [one for one in facts if isinstance(one, LinearFacts)]
    rows = " + ".join(str(one.out_features) for one in plain)
    return f"{type(parent).__name__}: {', '.join(parts)} all read {plain[0].in_features} features; {rows} rows"


# ---------------------------------------------------------------- what is not


def _refusal(parent: nn.Module) -> str | None:
    """Why nothing can be joined here, if the names promise something."""
    if not parent._modules and not parent._parameters:
        return None
    bare = [names for names in _alike(parent._parameters) if len(names) == len(QKV)]
    matrices = [names for names in bare if all(_is_matrix(parent._parameters[name]) for name in names.values())]
    if matrices:
        names = ", ".join(matrices[0][role] for role in QKV)
        return f"{names} are bare parameters of {type(parent).__name__}, not layers: its forward would have to change"
    promised = [[names[role] for role in QKV] for names in _alike(parent._modules) if len(names) == len(QKV)]
    promised += [list(pair) for pair in _GATE_UP_PAIRS if all(name in parent._modules for name in pair)]
    heavy = [names for names in promised if all(_holds_matrix(parent._modules[name]) for name in names)]
    return _why_not(parent, heavy[0]) if heavy and not any(_found(parent)) else None


def _why_not(parent: nn.Module, names: list[str]) -> str | None:
    layers = {name: _layer(parent, name) for name in names}
    reasons = {name: layer for name, layer in layers.items() if isinstance(layer, str)}
    if reasons and len(set(reasons.values())) == 1:
        return f"{', '.join(reasons)}: {next(iter(reasons.values()))}"
    if reasons:
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    shapes = {name: layer.facts for name, layer in layers.items() if isinstance(layer, _Layer)}
    sizes = ", ".join(f"{name} {facts.in_features} → {facts.out_features}" for name, facts in shapes.items())
    return f"{sizes}: no two of them read inputs of the same width"


def _is_matrix(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.ndim > 1


def _holds_matrix(module: nn.Module | None) -> bool:
    return module is not None and any(_is_matrix(tensor) for tensor in module.parameters())
