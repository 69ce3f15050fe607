"""Which stacks of encoder layers a model has, and whether they may run on packed tokens.

Found by structure: a list of layers of one class, each with attention in it and nothing else that mixes positions. What
structure cannot tell is tried out on a small copy of the model (see `encoder_trial`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from rewire import linears
from rewire.encoder_table import ATTENTIONS, REFUSED, STACKS
from rewire.linears import Refusal
from rewire.module_tree import split_path, submodule, under
from rewire.modules.packed import AttentionFacts, LayerForward, StackFacts, looks_up
from rewire.modules.packed.attend import argument_names


@dataclass(frozen=True)
class EncoderStack:
    """A stack of encoder layers.

    Attributes:
        path: of the list that holds the layers (or of the list of groups of them).
        owner: path of the module that calls the layers.
        layers: paths of the layers, in order.
        attentions: paths of the attention modules within a layer.
        kind: class name of the layers.
    """

    path: str
    owner: str
    layers: tuple[str, ...]
    attentions: tuple[str, ...]
    kind: str


def encoder_stacks(model: nn.Module) -> tuple[EncoderStack | Refusal, ...]:
    """Every list of like layers with attention in `model`, in order; a `Refusal` for those that cannot be packed.

    Lists within the layers of a stack are not looked at.

    >>> encoder_stacks(nn.Sequential(nn.Linear(2, 2)))
    ()
    """
    found: list[EncoderStack | Refusal] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{one.path}.") for one in found if isinstance(one, EncoderStack))
        if isinstance(module, nn.ModuleList) and not inside and _is_stack(module):
            found.append(_stack(model, path, module))
    return tuple(found)


def encoder_stack(model: nn.Module, path: str) -> EncoderStack | Refusal:
    """The stack at `path`, which is its list of layers or the module that calls them."""
    stacks = encoder_stacks(model)
    for one in stacks:
        if one.path == path:
            return one
    owned = [one for one in stacks if path == (one.owner if isinstance(one, EncoderStack) else split_path(one.path)[0])]
    if len(owned) == 1:
        return owned[0]
    if owned:
        return Refusal(path, f"calls several stacks of layers; target one: {', '.join(one.path for one in owned)}")
    near = ", ".join(one.path for one in stacks) or "none"
    return Refusal(path, f"is no stack of encoder layers, nor a module that calls one; those of this model: {near}")


def _is_stack(layers: nn.ModuleList) -> bool:
    """Whether this is a list of layers alike, with attention in them."""
    children = list(layers)
    if not children or len({type(layer) for layer in children}) > 1 or isinstance(children[0], nn.ModuleList):
        return False
    if any(isinstance(module, nn.ModuleList) and _is_stack(module) for module in children[0].modules()):
        return False  # of stages, or of groups of layers
    return bool(_attention_paths(children[0]))


def _attention_paths(layer: nn.Module) -> list[str]:
    """The innermost modules that compute attention."""
    return [path for path, module in layer.named_modules() if path and _computes_attention(module)]


def _computes_attention(module: nn.Module) -> bool:
    if looks_up(type(module).forward) or attention_facts(module) is not None:
        return True
    named = "ttention" in type(module).__name__
    return named and not any("ttention" in type(child).__name__ for child in module.children())


def attention_facts(module: nn.Module) -> AttentionFacts | None:
    """What is known of an attention module with code of its own."""
    kind = type(module)
    model = kind.__module__.rpartition(".modeling_")[2]
    return ATTENTIONS.get(kind.__name__) or ATTENTIONS.get(f"{model}.{kind.__name__}")


def stack_facts(owner: nn.Module) -> StackFacts:
    """What is particular about the stack that `owner` calls."""
    return STACKS.get(type(owner).__name__, StackFacts())


def _stack(model: nn.Module, path: str, layers: nn.ModuleList) -> EncoderStack | Refusal:
    first = layers[0]
    in_place = stack_facts(submodule(model, split_path(path)[0])).in_place
    attentions = [] if in_place else _attention_paths(first)
    reason = None if in_place else _reason(first, attentions)
    if reason is None:
        reason = next((text for layer in layers if (text := _altered(layer, attentions))), None)
    if reason is not None:
        return Refusal(path, f"{type(first).__name__}: {reason}")
    owner, groups = _caller(model, path)
    paths = tuple(under(group, number) for group in groups for number in submodule(model, group)._modules)
    return EncoderStack(_outer(path, owner), owner, paths, tuple(attentions), type(first).__name__)


def _outer(path: str, owner: str) -> str:
    """The list right below the module that calls the layers."""
    return under(owner, path.removeprefix(f"{owner}.").split(".")[0])


def _caller(model: nn.Module, path: str) -> tuple[str, list[str]]:
    """The module that calls the layers of a list, and the lists that it calls: groups within a list count as one."""
    parent, leaf = split_path(path)
    above, _ = split_path(parent)
    if (
        parent
        and isinstance(submodule(model, above), nn.ModuleList)
        and list(submodule(model, parent)._modules) == [leaf]
    ):
        groups = [under(under(above, name), leaf) for name in submodule(model, above)._modules]
        return split_path(above)[0], groups
    return parent, [path]


def _reason(layer: nn.Module, attentions: Sequence[str]) -> str | None:
    """Why layers of this make cannot be packed, by what they consist of."""
    known = REFUSED.get(type(layer).__name__)
    if known is not None:
        return f"{known}; packed attention adds to the scores only what depends on positions alone"
    for path, module in layer.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) and max(module.kernel_size) > 1:
            size = "×".join(map(str, module.kernel_size))
            return f"{path} is a convolution over {size} positions, which would reach into the next row; needed is 1"
        if isinstance(module, nn.modules.batchnorm._NormBase):
            return f"{path} is a {type(module).__name__}, which mixes rows; needed is a norm of each position"
        if _is_cross(path):
            return f"{path} attends to another sequence; only self-attention is packed"
    if "cu_seqlens" in argument_names(type(layer).forward):
        return "runs on packed tokens by itself (its forward takes cu_seqlens), so there is no padding to leave out"
    for path in attentions:
        attention = layer.get_submodule(path)
        if not looks_up(type(attention).forward) and attention_facts(attention) is None:
            return (
                f"{path} ({type(attention).__name__}) has attention code of its own, which is not known; needed is an "
                "attention that looks up Transformers' registry, or a record in rewire.encoder_table.ATTENTIONS"
            )
        for name in ("is_decoder", "is_causal"):
            if getattr(attention, name, False) is True:
                return f"{path} belongs to a decoder ({name} is True, needed is False)"
    return None


def _is_cross(path: str) -> bool:
    leaf = path.rpartition(".")[2].lower()
    return "cross" in leaf or leaf in ("encoder_attn", "encdecattention", "multihead_attn")


def _altered(layer: nn.Module, attentions: Sequence[str]) -> str | None:
    """What somebody has done to a layer that packing cannot go along with."""
    for path, module in layer.named_modules():
        if isinstance(module.__dict__.get("forward"), LayerForward):
            return "is packed already"
        if "forward" in module.__dict__:
            return f"the forward of {path or 'the layer'} was replaced on the instance; undo that first"
        quantised = linears.quantiser(module)
        if quantised is not None:
            return f"{path} is quantised ({quantised}), needed is a plain weight; pack first, or leave it as it is"
        if getattr(module, "pruned_heads", None):
            return f"{path} has pruned heads {sorted(module.pruned_heads)}, needed are none"
    missing = [path for path in attentions if path not in {name for name, _ in layer.named_modules()}]
    return f"has no {', '.join(missing)}, which the first layer has" if missing else None


def packable(model: nn.Module) -> Iterator[EncoderStack]:
    """The stacks that structure says nothing against."""
    return (one for one in encoder_stacks(model) if isinstance(one, EncoderStack))
