"""`Replace`: a module class of the user's own takes the place of every match."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rewire import hf_seam, tensor_rules
from rewire.edit_rules import expand_tensor_rules
from rewire.edits.base import Match, Outcome, Refusal, Scene, swap_change, tie_reason
from rewire.errors import ConsentError, ResolveError, RuleError
from rewire.module_tree import skeleton, submodule, under
from rewire.plan import Replace
from rewire.surgery import Placements, Swap


def decide(edit: Replace, number: int, matches: Sequence[Match], scene: Scene) -> Iterator[Outcome]:
    """One outcome per module matched."""
    new_class = _class(edit, scene.allow_code)
    try:
        arguments = _arguments(new_class, [match.path for match in matches if match.module], scene)
    except hf_seam.NoArguments as error:
        yield from (Refusal(match.path, f"{new_class.__name__} cannot be built: {error}") for match in matches)
        return
    for match in matches:
        yield _decide(edit, new_class, number, match, scene, arguments)


def _class(edit: Replace, allow_code: bool) -> type[nn.Module]:
    """The class itself. Raises `ConsentError`: importing a module runs its code."""
    if isinstance(edit.with_, type):
        found: Any = edit.with_
    elif not allow_code:
        raise ConsentError(
            f"the plan replaces modules by {edit.with_!r}, which means running that code; pass allow_code=True "
            "(command line: --allow-code) if you trust it, or give the class itself in Python"
        )
    else:
        found = _imported(edit.with_)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConsentError(f"{edit.with_!r} is not a subclass of torch.nn.Module")
    return found


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ResolveError(f"{path!r} cannot be imported: {error}; is its folder on PYTHONPATH?") from error
    return found


def _decide(
    edit: Replace,
    new_class: type[nn.Module],
    number: int,
    match: Match,
    scene: Scene,
    arguments: Mapping[str, hf_seam.Arguments],
) -> Outcome:
    old = match.module
    if old is None or not match.path:
        return Refusal(match.path, "the target of a replacement is a module below the model itself")
    if match.path not in arguments:
        return Refusal(
            match.path,
            f"it is unknown what {type(old).__name__} was constructed with; give {new_class.__name__} a class method "
            "from_module(old)",
        )
    build = BuildReplacement(match.path, new_class, *arguments[match.path])
    try:
        (new,) = build(scene.model).values()
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        return Refusal(match.path, f"{new_class.__name__} cannot be built: {error}")
    assert new is not None
    before, after = dict(_shapes(old)), dict(_shapes(new))
    try:
        local = expand_tensor_rules(edit.tensors, before)  # type: ignore[arg-type]
        result = tensor_rules.run_shapes(local, before)
    except RuleError as error:
        return Refusal(match.path, f"the tensor rule does not fit: {error}")
    reason = _fit_reason(new, result, after) or tie_reason(
        scene, match, [under(match.path, name) for step in local for name in step.inputs]
    )
    if reason:
        return Refusal(match.path, reason)
    rule = tuple(tensor_rules.with_names(step, lambda name: under(match.path, name)) for step in local)
    detail = f"{type(old).__name__} → {new_class.__name__}"
    aliases = dict.fromkeys(match.aliases, match.path)
    return swap_change(number, "replace", match, detail, Swap(rule, build), alias_of=aliases)


def _arguments(new_class: type[nn.Module], paths: Sequence[str], scene: Scene) -> Mapping[str, hf_seam.Arguments]:
    """What the old modules were constructed with; nothing where the new class makes itself from them."""
    if hasattr(new_class, "from_module"):
        return dict.fromkeys(paths, ((), {}))
    return hf_seam.constructor_arguments(scene.source, paths)


def _shapes(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield name, tuple(tensor.shape)


def _fit_reason(new: nn.Module, given: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> str | None:
    """Why what the rule gives is not what the new module needs."""
    unfilled = [name for name in wanted if name not in given]
    if unfilled:
        return f"these tensors of {type(new).__name__} would stay random: {', '.join(unfilled)}; add tensor rules"
    left = [name for name in given if name not in wanted]
    if left:
        return f"these tensors would be lost: {', '.join(left)}; add rules for them (`drop` if that is meant)"
    for name, shape in wanted.items():
        if given[name] != shape:
            return f"{name} would get shape {list(given[name])}, {type(new).__name__} has {list(shape)}"
    return None


@dataclass(frozen=True)
class BuildReplacement:
    """Makes the replacement of the module at `path`, on meta, alike on every model it is asked for."""

    path: str
    new_class: type[nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, model: nn.Module) -> Placements:
        old = submodule(model, self.path)
        with torch.device("meta"):
            if hasattr(self.new_class, "from_module"):
                new = self.new_class.from_module(skeleton(old))
            else:
                new = self.new_class(*self.args, **self.kwargs)
        return {self.path: _on_meta(_like(new, old)).train(old.training)}


def _like(new: nn.Module, old: nn.Module) -> nn.Module:
    """`new` with the types and flags of the tensors it shares with `old`, and its floating type otherwise."""
    named = dict(old.named_parameters())
    some = next((p for p in named.values() if p.is_floating_point()), None)
    for name, parameter in new.named_parameters():
        like = named.get(name, some)
        if like is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(like.dtype)
            parameter.requires_grad_(like.requires_grad)
    return new


def _on_meta(module: nn.Module) -> nn.Module:
    """`module` without the values its constructor may have made; buffers that no state dict holds stay."""
    for name, parameter in module.named_parameters():
        if not parameter.is_meta:
            parent, _, leaf = name.rpartition(".")
            empty = torch.empty_like(parameter, device="meta")
            owner = module.get_submodule(parent)
            owner._parameters[leaf] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return module
