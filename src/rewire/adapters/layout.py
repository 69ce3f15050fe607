"""The tensors of an adapter's file, as peft names and shapes them, and the changes to a model that they are.

For a module at `path`, peft 0.21 writes (all below `base_model.model.`):

| module | tensors |
|---|---|
| linear, convolution | `path.lora_A.weight` `[rank, in, …]`, `path.lora_B.weight` `[out, rank, …]`, `….bias` |
| embedding | `path.lora_embedding_A` `[rank, tokens]`, `path.lora_embedding_B` `[width, rank]` |
| parameter | as a linear one; of stacked experts `[experts * rank, in]` and `[out, rank * experts]` |
| DoRA | `path.lora_magnitude_vector` `[out]` (of convolutions `[1, out, 1, …]`) |

Several parameters of one module are wrapped one in the other: the first is innermost, and each wrapper adds
`.base_layer` to the names of what is inside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from rewire.adapters.advance import Held
from rewire.adapters.lowrank import LowRank, Shift, Term
from rewire.adapters.settings import Settings, parameter_names
from rewire.errors import CheckpointError, RefusedError
from rewire.module_tree import split_path, submodule, under

PREFIX = "base_model.model."
BASE = ".base_layer"

_OWN = re.compile(
    r"(?P<place>.+)\.(?:(?P<factor>lora_A|lora_B)\.(?P<leaf>weight|bias)"
    r"|(?P<alone>lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?)"
)


@dataclass(frozen=True)
class Home:
    """A tensor of a model as peft sees it.

    Attributes:
        name: of the tensor.
        kind: `linear`, `flipped` (weight `[in, out]`), `embedding`, `convolution` or `parameter`.
        shape: of the tensor.
        batch: how many of its dimensions count experts.
        outputs: the dimension that counts outputs.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    batch: int = 0
    outputs: int = 0

    @property
    def path(self) -> str:
        """The module that has the tensor."""
        return split_path(self.name)[0]

    @property
    def key(self) -> str:
        """What peft holds the patterns of ranks and alphas against."""
        return self.name if self.kind == "parameter" else self.path


def home(model: nn.Module, name: str, *, as_parameter: bool = False) -> Home:
    """How peft treats the tensor called `name`. Raises `RefusedError` for one that it has no adapter for."""
    path, leaf = split_path(name)
    try:
        module = submodule(model, path)
    except (KeyError, AttributeError):
        module = nn.Module()
    tensor = module._parameters.get(leaf)
    if tensor is None:
        raise RefusedError(f"the adapter changes {name}, which is no parameter of {type(model).__name__} as edited")
    shape = tuple(tensor.shape)
    kind, outputs = _kind(module, leaf, shape)
    if kind and not as_parameter:
        return Home(name, kind, shape, 0, outputs)
    if isinstance(module, nn.MultiheadAttention):
        raise RefusedError(f"{path} is an nn.MultiheadAttention, all of whose projections peft adapts at once")
    if len(shape) == 2:
        return Home(name, "parameter", shape)
    if len(shape) == 3:
        return Home(name, "parameter", shape, 1, 2 if getattr(module, "is_transposed", False) else 1)
    raise RefusedError(f"{name} has shape {list(shape)}; peft adapts matrices and stacks of them")


def _kind(module: nn.Module, leaf: str, shape: tuple[int, ...]) -> tuple[str, int]:
    if leaf != "weight":
        return "", 0
    if isinstance(module, nn.Linear):
        return "linear", 0
    if isinstance(module, nn.Embedding):
        return "embedding", 1
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups > 1:
            raise RefusedError(f"the adapter changes a convolution in {module.groups} groups, which is of no low rank")
        return "convolution", 0
    is_conv1d = (
        type(module).__name__ == "Conv1D" and len(shape) == 2
    )  # Transformers' own, which is imported nowhere here
    return ("flipped", 1) if is_conv1d else ("", 0)


@dataclass(frozen=True)
class Contents:
    """What an adapter holds.

    Attributes:
        held: by the names of the model's tensors.
        homes: of the tensors changed by low rank.
        bases: copies of the model's own tensors under an adapter (of embeddings), by the names of these.
        others: tensors that belong to no tensor of the model, by their names in the file.
    """

    held: dict[str, Held]
    homes: dict[str, Home] = field(default_factory=dict)
    bases: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def changes(self) -> dict[str, LowRank]:
        """The tensors changed by low rank."""
        return {name: one for name, one in self.held.items() if isinstance(one, LowRank)}

    @property
    def wholes(self) -> dict[str, Tensor]:
        """The tensors trained as a whole."""
        return {name: one for name, one in self.held.items() if isinstance(one, Tensor)}


def places(names: Iterable[str]) -> frozenset[str]:
    """The paths of the modules that the tensors of an adapter's file belong to.

    >>> sorted(places(["base_model.model.h.0.attn.lora_A.weight", "base_model.model.moe.base_layer.lora_B.weight"]))
    ['h.0.attn', 'moe']
    """
    found = (_own(name) for name in names)
    return frozenset(own[0].replace(BASE, "") for own in found if own is not None)


def _own(name: str) -> tuple[str, str] | None:
    """Place (with its wrappers) and kind of a tensor that peft made; None for a tensor of the model itself."""
    match = _OWN.fullmatch(name.removeprefix(PREFIX))
    if match is None:
        return None
    return match["place"], match["alone"] or f"{match['factor']}.{match['leaf']}"


# ---------------------------------------------------------------- reading


def read(tensors: Mapping[str, Tensor], model: nn.Module, settings: Settings) -> Contents:
    """The contents of an adapter's file, which was made for `model`. Raises `CheckpointError` and `RefusedError`."""
    made: dict[str, dict[str, Tensor]] = {}
    contents = Contents({})
    known = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        own, plain = _own(name), name.removeprefix(PREFIX).replace(BASE, "")
        if own is not None:
            made.setdefault(own[0], {})[own[1]] = tensor
        elif plain in known:
            contents.held[plain] = tensor
        else:
            contents.others[name] = tensor
    targeted = settings.parameters(parameter_names(model))
    for place, factors in made.items():
        found = _home_of(place, model, targeted)
        contents.homes[found.name] = found
        copied = contents.held.pop(found.name, None)
        if isinstance(copied, Tensor):
            contents.bases[found.name] = copied
        contents.held[found.name] = _change(found, factors, settings)
    return contents


def _home_of(place: str, model: nn.Module, targeted: set[str]) -> Home:
    path = place.replace(BASE, "")
    try:
        module = submodule(model, path)
    except (KeyError, AttributeError):
        raise CheckpointError(
            f"the adapter is for a module {path}, which {type(model).__name__} does not have; was it trained on "
            "another class, or with an older version of Transformers? Load it with peft and save it again"
        ) from None
    wrapped = [under(path, leaf) for leaf in module._parameters if under(path, leaf) in targeted]
    if not wrapped and place == path:
        return home(model, under(path, "weight"))
    outside = 0
    while place.endswith(BASE):
        place, outside = place.removesuffix(BASE), outside + 1
    if outside >= len(wrapped):
        raise CheckpointError(f"the adapter wraps more parameters of {path} than its target_parameters name")
    return home(model, wrapped[len(wrapped) - 1 - outside], as_parameter=True)


def _change(of: Home, factors: Mapping[str, Tensor], settings: Settings) -> LowRank:
    embedding = of.kind == "embedding"
    a_name, b_name = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    if a_name not in factors or b_name not in factors:
        raise CheckpointError(f"the adapter of {of.key} lacks {b_name if a_name in factors else a_name}")
    a, b = factors[a_name], factors[b_name]
    experts = of.shape[0] if of.batch else 1
    scaling = settings.scaling(of.key, a.shape[0] // experts)
    rows, columns = _factors(of, a, b, scaling.rank)
    if (*rows.shape[:-1], *columns.shape[of.batch + 1 :]) != of.shape:
        raise CheckpointError(
            f"the adapter of {of.key} does not fit its shape {list(of.shape)}: A {list(a.shape)}, B {list(b.shape)}"
        )
    magnitude, bias = factors.get("lora_magnitude_vector"), factors.get("lora_B.bias")
    if magnitude is not None:
        magnitude = magnitude.reshape(-1)
    shift = None if bias is None else Shift(bias, scaling)
    return LowRank(of.shape, (Term(rows, columns, scaling),), of.batch, of.outputs, magnitude, shift)


def _factors(of: Home, a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B as rows and columns of the tensor."""
    if of.batch:
        experts = of.shape[0]
        a = a.reshape(experts, rank, -1)
        b = b.reshape(-1, rank, experts).permute(2, 0, 1)
    elif of.kind == "convolution":
        b = b.reshape(b.shape[0], rank)
    return (b, a) if of.outputs == of.batch else (a.swapaxes(-2, -1), b.swapaxes(-2, -1))


# ---------------------------------------------------------------- writing


def write(contents: Contents, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a file that peft reads into `model`; every change has one term."""
    wrappers = _wrappers(contents.homes, model)
    tensors = dict(contents.others)
    for name, change in contents.changes.items():
        of = contents.homes[name]
        tensors |= {f"{PREFIX}{_place(of, wrappers)}.{leaf}": t for leaf, t in _own_tensors(of, change).items()}
    adapted = {of.path for of in contents.homes.values() if of.kind != "parameter"}
    for name, tensor in (*contents.wholes.items(), *contents.bases.items()):
        path, leaf = split_path(name)
        inside = BASE if path in adapted else ""
        tensors[PREFIX + under(f"{_inside(path, wrappers)}{inside}", leaf)] = tensor
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _wrappers(homes: Mapping[str, Home], model: nn.Module) -> dict[str, list[str]]:
    """The parameters with adapters of their own by module, innermost first."""
    found: dict[str, list[str]] = {}
    for path in {of.path for of in homes.values() if of.kind == "parameter"}:
        names = [under(path, leaf) for leaf in submodule(model, path)._parameters]
        found[path] = [name for name in names if name in homes]
    return found


def _place(of: Home, wrappers: Mapping[str, list[str]]) -> str:
    place = _inside(of.path, wrappers)
    if of.kind == "parameter":
        inner = wrappers[of.path]
        place += BASE * (len(inner) - 1 - inner.index(of.name))
    return place


def _inside(path: str, wrappers: Mapping[str, list[str]]) -> str:
    """`path` with the wrappers of the modules around it."""
    parts = path.split(".")
    names = [".".join(parts[: stop + 1]) for stop in range(len(parts))]
    around = (BASE * len(wrappers.get(name, ())) if name != path else "" for name in names)
    return "".join(f".{part}{base}" for part, base in zip(parts, around, strict=True)).removeprefix(".")


def _own_tensors(of: Home, change: LowRank) -> dict[str, Tensor]:
    (term,) = change.terms
    a, b = (term.columns, term.rows) if change.side == "rows" else (term.rows, term.columns)
    if change.side != "rows":
        a, b = a.swapaxes(-2, -1), b.swapaxes(-2, -1)
    if of.batch:
        a, b = a.reshape(-1, a.shape[-1]), b.permute(1, 2, 0).reshape(b.shape[1], -1)
    ones = (1,) * (len(of.shape) - 2) if of.kind == "convolution" else ()
    if of.kind == "convolution":
        b = b.reshape(*b.shape, *ones)
    if of.kind == "embedding":
        made = {"lora_embedding_A": a, "lora_embedding_B": b}
    else:
        made = {"lora_A.weight": a, "lora_B.weight": b}
    if change.shift is not None:
        made["lora_B.bias"] = change.shift.values
    if change.magnitude is not None:
        made["lora_magnitude_vector"] = change.magnitude.reshape(1, -1, *ones) if ones else change.magnitude
    return made


def settled(change: LowRank, of: Home) -> LowRank:
    """`change` with the outputs where its new home has them. Raises `RefusedError` where it does not fit."""
    if of.shape != change.shape or of.batch != change.batch:
        raise RefusedError(
            f"the adapter changes {of.name} in the shape {list(change.shape)}, but the model has {list(of.shape)}"
        )
    if of.outputs != change.outputs and (change.magnitude is not None or change.shift is not None):
        raise RefusedError(f"{of.name} counts its outputs along another dimension than the adapter's bias or magnitude")
    return replace(change, outputs=of.outputs)
