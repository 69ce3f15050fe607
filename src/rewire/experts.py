"""Where a model keeps its experts: stacked in three-dimensional tensors, or one module each.

What lies in a stacked tensor is read off what its class declares to Transformers (orientation, order of gate and
up, biases) or off the table `KNOWN`; for a class that does neither, a small copy is tried (see `expert_trial`).
Shapes are checked against that, never taken as evidence for it: where `2 · intermediate = hidden` they fit both ways.
Nothing here touches a value, so models on `meta` are fine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from rewire import expert_trial
from rewire.families import Refusal
from rewire.linears import altered, linear_facts, quantiser
from rewire.modules import StackedWeight, UnstackedExperts

GATE_UP = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class StackedExperts:
    """The stacked experts of the module at `path`.

    Attributes:
        path: the module that is called with the tokens.
        count: how many experts there are.
        weights: what each of the stacked tensors holds.
        evidence: how this is known, for people.
    """

    path: str
    count: int
    weights: tuple[StackedWeight, ...]
    evidence: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, int]:
        """The linear layers of one expert, with their rows."""
        return {part: size for w in self.weights for part, size in zip(w.parts, w.sizes, strict=True)}


@dataclass(frozen=True)
class SeparateExperts:
    """Experts that are modules of their own, alike in class and shapes, in the container at `path`.

    Attributes:
        path: the container.
        experts: names of the experts in it.
        tensors: for each tensor of the linear layers, by its name in an expert, a free name in the container.
        sizes: rows of each linear layer, by its name in an expert.
        evidence: how this is known, for people.
    """

    path: str
    experts: tuple[str, ...]
    tensors: Mapping[str, str]
    sizes: Mapping[str, int]
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True)
class Known:
    """What the stacked tensors of a class hold: tensor name to the linear layers in it.

    Attributes:
        tensors: names in the experts module (dotted for a child's) to names of linear layers.
        transposed: tensors with slices `[in, out]`.
        alternating: whether the rows of the parts alternate; else one part follows the other.
        surplus: tensors that may have more slices than there are experts.
        folded: whether slices lie below each other in matrices.
    """

    tensors: Mapping[str, tuple[str, ...]]
    transposed: frozenset[str] = frozenset()
    alternating: bool = False
    surplus: frozenset[str] = frozenset()
    folded: bool = False


_STANDARD = {"gate_up_proj": GATE_UP, "down_proj": ("down_proj",)}

#: Classes of Transformers that declare nothing, read by hand (forward and parameters).
KNOWN: Mapping[str, Known] = {
    "DbrxExperts": Known(
        {"mlp.w1": ("gate_proj",), "mlp.v1": ("up_proj",), "mlp.w2": ("down_proj",)}, frozenset({"mlp.w2"}), folded=True
    ),
    "InklingSharedExperts": Known({name: (name,) for name in (*GATE_UP, "down_proj")}),
    "JetMoeParallelExperts": Known({"weight": ("proj",)}),
    "Llama4TextExperts": Known(_STANDARD, frozenset(_STANDARD)),
    "LongcatFlashExperts": Known(_STANDARD, surplus=frozenset({"gate_up_proj"})),
    "Step3p7Experts": Known(_STANDARD),
}

#: Classes with three-dimensional weights that are no experts, and what they are.
NOT_EXPERTS: Mapping[str, str] = {
    "MoshiFlexibleLinear": "one linear map per codebook, picked by position",
    "KyutaiSpeechToTextFlexibleLinear": "one linear map per codebook, picked by position",
    "CsmCodebooksHead": "one output head per codebook, picked by position",
    "XLNetRelativeAttention": "the projections of an attention, with a dimension for the heads",
    "Gemma4VisionPatchEmbedder": "tables of positions, one for rows and one for columns",
    "Kimi_K25VisionPositionEmbeddings": "a table of positions",
    "RecurrentGemmaRglru": "the gates of a recurrence, one block per head",
    "ZambaMambaMixer": "the projections of a state-space mixer, one per Mamba head",
}


def stacked_experts(model: nn.Module) -> Iterator[StackedExperts | Refusal]:
    """Every module with stacked experts; a refusal for one that seems to have some but is not understood.

    >>> list(stacked_experts(nn.Sequential(nn.Linear(2, 3), nn.Conv1d(2, 3, 4))))
    []
    """
    numbers, tried = expert_numbers(model), Trials()
    seen: set[tuple[int, ...]] = set()
    for path, module in model.named_modules():
        # Modules of their own may hold the same tensors (tied encoder and decoder): counted once, edited together.
        tensors = tuple(map(id, module.parameters())) if _is_candidate(path, module, numbers) else ()
        if tensors and tensors not in seen:
            seen.add(tensors)
            yield stacked_at(model, path, tried)


class Trials(dict[tuple[Any, ...], "tuple[int, tuple[StackedWeight, ...]] | str"]):
    """What trials have found, so that layers alike are tried once."""

    def of(self, module: nn.Module) -> tuple[int, tuple[StackedWeight, ...]] | str:
        """What a trial of `module` finds."""
        plain = {name: value for name, value in vars(module).items() if type(value) in (bool, int, float, str)}
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
        key = (type(module), shapes, *sorted(plain.items()))
        if key not in self:
            self[key] = expert_trial.find(module)
        return self[key]


def stacked_at(model: nn.Module, path: str, tried: Trials | None = None) -> StackedExperts | Refusal:
    """The stacked experts of the module at `path`, or why there are none that can be taken apart."""
    module = model.get_submodule(path)
    name = type(module).__name__
    other = next((NOT_EXPERTS[base.__name__] for base in type(module).__mro__ if base.__name__ in NOT_EXPERTS), None)
    if other is not None:
        return Refusal(path, f"{name} holds no experts, but {other}")
    reason = _altered(module)
    if reason is not None:
        return Refusal(path, reason)
    if isinstance(module, UnstackedExperts):
        return Refusal(path, "already edited by Rewire: its experts are separate")
    known, evidence = _declared(module) or _listed(module) or (None, "")
    if known is None:
        return _tried(model, path, module, Trials() if tried is None else tried)
    found = _weights(module, known)
    if isinstance(found, str):
        return Refusal(path, f"{name}: {found}")
    count, weights = found
    return StackedExperts(path, count, weights, (evidence, _in_words(count, weights)))


def expert_numbers(model: nn.Module) -> frozenset[int]:
    """Numbers of experts that the configuration, or one inside it, states."""
    found: set[int] = set()
    todo, seen = [getattr(model, "config", None)], set()
    while todo:
        config = todo.pop()
        if id(config) in seen or not hasattr(config, "__dict__"):
            continue
        seen.add(id(config))
        found |= {v for key, v in vars(config).items() if "expert" in key and type(v) is int}
        todo += [value for value in vars(config).values() if hasattr(value, "model_type")]
    return frozenset(found)


def _is_candidate(path: str, module: nn.Module, numbers: frozenset[int]) -> bool:
    """Whether to look closer: expert by class, or tensors in three dimensions that agree with a number of experts."""
    if isinstance(module, UnstackedExperts):
        return False
    names = {base.__name__ for base in type(module).__mro__}
    if names & set(KNOWN):
        return any(parameter is not None for parameter in module.parameters())
    if names & set(NOT_EXPERTS):
        return False
    counts = {p.shape[0] for p in module._parameters.values() if p is not None and p.ndim == 3 and min(p.shape) > 1}
    if len(counts) != 1:
        return bool(counts) and _declared(module) is not None
    said = re.search("expert|moe", f"{type(module).__name__} {path.rpartition('.')[2]}", re.IGNORECASE)
    return bool(counts & numbers) or said is not None


def _altered(module: nn.Module) -> str | None:
    """What somebody else (or Rewire) has already done to the module."""
    reason = altered(module)
    if reason is not None:
        return reason
    if "parametrizations" in module._modules:
        return "its tensors are computed from others (parametrizations); remove the parametrisation first"
    for name, parameter in module.named_parameters():
        if type(parameter).__name__ == "DTensor":
            return f"{name} is spread over several devices (DTensor); edit before it is"
        if not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
            return f"already quantised ({name} is {parameter.dtype}); edit first, quantise afterwards"
    return next((f"already quantised ({q})" for child in module.children() if (q := quantiser(child))), None)


def _declared(module: nn.Module) -> tuple[Known, str] | None:
    """What the class has told Transformers of its tensors, if its forward is the one that this was said of."""
    forward: Any = type(module).forward
    told = {name: vars(module).get(name) for name in ("is_transposed", "is_concatenated", "has_gate", "has_bias")}
    if getattr(forward, "__globals__", {}).get("__name__") != "transformers.integrations.moe":
        return None
    if any(type(value) is not bool for value in told.values()):
        return None
    first = {"gate_up_proj": GATE_UP} if told["has_gate"] else {"up_proj": ("up_proj",)}
    tensors = {**first, "down_proj": ("down_proj",)}
    transposed = frozenset(tensors) if told["is_transposed"] else frozenset[str]()
    known = Known(tensors, transposed, alternating=not told["is_concatenated"])
    lies = "[in, out]" if told["is_transposed"] else "[out, in]"
    if not told["has_gate"]:
        return known, f"{type(module).__name__} declares slices {lies}, without a gate"
    order = "gate rows before up rows" if told["is_concatenated"] else "gate and up rows alternating"
    return known, f"{type(module).__name__} declares slices {lies}, {order}"


def _listed(module: nn.Module) -> tuple[Known, str] | None:
    """The entry of the table for the class that the module's forward is of."""
    home = next(base for base in type(module).__mro__ if "forward" in vars(base))
    if home.__name__ not in KNOWN or not home.__module__.startswith("transformers.models."):
        return None
    return KNOWN[home.__name__], f"{home.__name__} is known"


def _weights(module: nn.Module, known: Known) -> tuple[int, tuple[StackedWeight, ...]] | str:
    """Number of experts and what each tensor holds, or how the shapes contradict what is known."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    missing = [name for name in known.tensors if name not in shapes]
    if missing:
        return f"there is no tensor {', '.join(missing)}"
    if known.folded:
        count = next((v for k, v in vars(module).items() if "num_experts" in k and isinstance(v, int)), 0)
    else:
        count = min(shapes[name][0] for name in known.tensors)
    found: list[StackedWeight] = []
    for name in known.tensors:
        weight = _weight(name, shapes, known, count)
        if isinstance(weight, str):
            return weight
        found.append(weight)
    return _contradiction(found) or (count, tuple(found))


def _weight(name: str, shapes: Mapping[str, tuple[int, ...]], known: Known, count: int) -> StackedWeight | str:
    """What the tensor called `name` holds."""
    parts, shape, transposed = known.tensors[name], shapes[name], name in known.transposed
    matrix = _slice(shape, known.folded, count)
    if matrix is None or (shape[0] > count and not known.folded and name not in known.surplus):
        return f"{name} has shape {list(shape)}, which does not hold slices of {count} experts"
    out, width = matrix[::-1] if transposed else matrix
    if out % len(parts):
        return f"{name}, of shape {list(shape)}, does not divide into {' and '.join(parts)}"
    bias = f"{name}_bias"
    if bias in shapes and shapes[bias] != (count, out):
        return f"{bias} has shape {list(shapes[bias])}, expected {[count, out]}"
    size = out // len(parts)
    return StackedWeight(
        name,
        parts,
        (size,) * len(parts),
        width,
        groups=size if known.alternating and len(parts) > 1 else 1,
        transposed=transposed,
        bias=bias if bias in shapes else None,
        surplus=0 if known.folded else shape[0] - count,
        folded=known.folded,
    )


def _slice(shape: tuple[int, ...], folded: bool, count: int) -> tuple[int, int] | None:
    """The shape of one slice of a tensor; None if there are none in it."""
    if folded:
        return (shape[0] // count, shape[1]) if len(shape) == 2 and count and not shape[0] % count else None
    return (shape[1], shape[2]) if len(shape) == 3 else None


def _contradiction(weights: list[StackedWeight]) -> str | None:
    """How the sizes of the parts of one expert contradict each other, if they do."""
    sizes = {part: (w.in_features, size) for w in weights for part, size in zip(w.parts, w.sizes, strict=True)}
    if "down_proj" not in sizes or "up_proj" not in sizes:
        return None
    (width, middle), down = sizes["up_proj"], sizes["down_proj"]
    if down == (middle, width) and sizes.get("gate_proj", (width, middle)) == (width, middle):
        return None
    return f"the shapes contradict what the class says of them: {sizes}"


def _tried(model: nn.Module, path: str, module: nn.Module, tried: Trials) -> StackedExperts | Refusal:
    """The experts of a class that nothing is known of."""
    if not _is_candidate(path, module, expert_numbers(model)):
        return Refusal(path, f"{type(module).__name__} holds no stacked experts")
    found = tried.of(module)
    if isinstance(found, str):
        return Refusal(path, f"what {type(module).__name__} keeps in its tensors is not known, and {found}")
    count, weights = found
    return StackedExperts(
        path, count, weights, ("a small copy gives the same with its experts apart", _in_words(count, weights))
    )


def _in_words(count: int, weights: tuple[StackedWeight, ...]) -> str:
    surplus = sum(weight.surplus for weight in weights)
    unread = f", and {surplus} slices that no expert reads" if surplus else ""
    return f"{count} experts in {', '.join(weight.name for weight in weights)}{unread}"


def separate_experts(model: nn.Module) -> Iterator[SeparateExperts | Refusal]:
    """Every container of experts that are modules of their own; a refusal where they are not alike.

    >>> experts = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(2, 3)}) for _ in range(2))
    >>> (found,) = separate_experts(nn.ModuleDict({"experts": experts}))
    >>> found.experts, dict(found.tensors)
    (('0', '1'), {'fc.weight': 'fc', 'fc.bias': 'fc_bias'})
    """
    seen: set[tuple[int, ...]] = set()
    for path, module in model.named_modules():
        tensors = tuple(map(id, module.parameters())) if _holds_experts(path, module) else ()
        if not tensors or tensors in seen:
            continue
        seen.add(tensors)
        if isinstance(module, UnstackedExperts):
            experts = tuple(map(str, range(module.count)))
            parts = {part: size for w in module.weights for part, size in zip(w.parts, w.sizes, strict=True)}
            was = f"they were stacked in {module.origin.kind.__name__}"
            yield SeparateExperts(path, experts, {}, parts, (was,))
        else:
            yield separate_at(model, path)


def _holds_experts(path: str, module: nn.Module) -> bool:
    if isinstance(module, UnstackedExperts):
        return True
    return isinstance(module, nn.ModuleList | nn.ModuleDict) and _called_experts(path, module)


def _called_experts(path: str, module: nn.Module) -> bool:
    return "expert" in f"{type(module).__name__} {path.rpartition('.')[2]}".lower() and len(module._modules) > 1


def separate_at(model: nn.Module, path: str) -> SeparateExperts | Refusal:
    """The separate experts in the container at `path`, or why they cannot be stacked."""
    container = model.get_submodule(path)
    if not isinstance(container, nn.ModuleList | nn.ModuleDict):
        return Refusal(path, f"{type(container).__name__} is no list or dict of experts, nor edited by `unstack`")
    layers = {
        name: {below: m for below, m in child.named_modules() if not isinstance(linear_facts(m), str)}
        for name, child in container.named_children()
        if next(child.parameters(), None) is not None
    }
    if len(layers) < 2:
        return Refusal(path, f"has {len(layers)} experts with weights; there is nothing to stack")
    reason = _unlike(container, layers)
    if reason is not None:
        return Refusal(path, reason)
    first = next(iter(layers.values()))
    tensors = {
        f"{below}.{leaf}": _free_name(container, below) + ("_bias" if leaf == "bias" else "")
        for below, layer in first.items()
        for leaf, _ in layer.named_parameters()
    }
    sizes = {below: int(layer.out_features) for below, layer in first.items()}
    kind = type(container.get_submodule(next(iter(layers)))).__name__
    return SeparateExperts(path, tuple(layers), tensors, sizes, (f"{len(layers)} modules {kind}, alike in all shapes",))


def _free_name(container: nn.Module, below: str) -> str:
    name = below.replace(".", "_")
    return f"stacked_{name}" if hasattr(container, name) else name


def _unlike(container: nn.Module, layers: Mapping[str, Mapping[str, nn.Module]]) -> str | None:
    """How the experts differ, or what in them cannot be stacked."""
    first, *others = layers
    for name in others:
        for what, of in (("class", _kind), ("shapes or types", _shapes), ("parameters that are trained", _flags)):
            if of(container.get_submodule(name)) != of(container.get_submodule(first)):
                return f"{name} and {first} differ in {what}"
    if not layers[first]:
        return f"{_kind(container.get_submodule(first)).__name__} has no linear layers"
    for below, layer in layers[first].items():
        if type(layer) is not nn.Linear:
            return f"{first}.{below} is a {type(layer).__name__}, not a plain linear layer"
    used = [id(p) for modules in layers.values() for layer in modules.values() for p in layer.parameters()]
    return "two experts share a weight" if len(set(used)) < len(used) else None


def _kind(expert: nn.Module) -> type[nn.Module]:
    return type(expert)


def _shapes(expert: nn.Module) -> list[Any]:
    return [(name, type(m)) for name, m in expert.named_modules()] + [
        (name, tuple(p.shape), p.dtype, p.device) for name, p in expert.named_parameters()
    ]


def _flags(expert: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in expert.parameters()]
