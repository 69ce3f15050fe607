"""`Lora`: low-rank adapters through peft, on names that exist after the earlier edits."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewire import hf_seam, tensor_rules
from rewire.edits.base import Match, Outcome, Refusal, Scene
from rewire.errors import RevertError
from rewire.module_tree import get_tensor, place, skeleton, under
from rewire.plan import Lora
from rewire.surgery import Change, Placements, Undo, View


def decide(edit: Lora, number: int, matches: Sequence[Match], scene: Scene) -> Iterator[Outcome]:
    """One outcome: an adapter is one thing, however many modules it reaches; or the refusals."""
    refusals = [Refusal(m.path, reason) for m in matches if (reason := _reason(m, edit.adapter))]
    if refusals:
        yield from refusals
        return
    paths = tuple(match.path for match in matches)
    options = edit.peft_options()
    if all(type(match.module).__name__ == "Conv1D" for match in matches):
        options.setdefault("fan_in_fan_out", True)
    if edit.adapter in scene.given_adapters:
        options["init_lora_weights"] = True
    surgeon = AddAdapter(edit.adapter, paths, options)
    trial = skeleton(scene.model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft says it again when it matters
            surgeon(trial)
    except (ValueError, TypeError, RuntimeError, AttributeError, ImportError) as error:
        yield Refusal(", ".join(sorted({_leaf(path) for path in paths})), f"peft refuses: {error}")
        return
    leaves = ", ".join(sorted({_leaf(path) for path in paths}))
    rank = f"rank {surgeon.config(trial).r}"
    yield Change(number, "lora", leaves, f"{rank} on {len(paths)} modules", _renames(scene.model, trial), surgeon)


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _reason(match: Match, adapter: str) -> str | None:
    if match.module is None:
        return "is a parameter; the target of an adapter is a module"
    if hasattr(match.module, "base_layer"):
        adapters = ", ".join(getattr(match.module, "lora_A", {})) or "another method"
        return f"is already adapted ({adapters}); remove that adapter or merge it first"
    name = type(match.module).__name__
    if name == "SplitProjection":
        return f"has been split; target its parts ({', '.join(match.module.parts)})"  # type: ignore[arg-type]
    if name == "JoinedPart":
        return f"has been joined; target the joined projection ({match.module.joined!r}), or adapt before joining"
    return None


def _renames(before: nn.Module, after: nn.Module) -> tuple[tensor_rules.Rename, ...]:
    """Where the tensors of the adapted modules went. Skeletons of one model list their tensors alike."""
    now = {_plain(name): name for name in after.state_dict(keep_vars=True) if not _is_new(name)}
    pairs = {name: now[_plain(name)] for name in before.state_dict() if not _is_new(name)}
    return tuple(tensor_rules.Rename(name, new) for name, new in pairs.items() if new != name)


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _is_new(name: str) -> bool:
    return bool(re.search(r"\.(lora_\w+|modules_to_save)\.", name))


@dataclass(frozen=True)
class AddAdapter:
    """The surgeon that has peft put an adapter into the model, in place.

    Attributes:
        adapter: its name.
        paths: the modules it reaches.
        options: those of `peft.LoraConfig`, `target_modules` left out.
    """

    adapter: str
    paths: tuple[str, ...]
    options: Mapping[str, Any]

    def __call__(self, model: nn.Module) -> Undo:
        from peft import inject_adapter_in_model

        before = dict(model.named_modules(remove_duplicate=False))
        flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
        marks = {mark: model.__dict__[mark] for mark in _MARKS if mark in model.__dict__}
        on_meta = all(parameter.is_meta for parameter in model.parameters())
        previous = list(getattr(model, "peft_config", {}))
        aside = {} if on_meta or not self._rewrites_weights else _weights(before, self.paths)
        with torch.random.fork_rng(enabled=on_meta), warnings.catch_warnings(), hf_seam.peft_as_named():
            # Several adapters are meant, and all of them are made active below.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(self.config(model), model, self.adapter, low_cpu_mem_usage=on_meta)
        if hasattr(model, "add_adapter"):
            model.__dict__["_hf_peft_config_loaded"] = True
        if previous:
            # peft makes the newest adapter the only active one.
            model.set_adapter([*previous, self.adapter])  # type: ignore[operator]
        after = dict(model.named_modules(remove_duplicate=False))
        originals = {path: module for path, module in before.items() if after.get(path) is not module}
        wrapped = {path: after[path] for path in originals if _outermost(path, originals)}
        for path, module in wrapped.items():
            module.train(originals[path].training)  # peft leaves dropout on, whatever the model's mode
        return RemoveAdapter({path: originals[path] for path in wrapped}, wrapped, flags, marks, aside)

    @property
    def _rewrites_weights(self) -> bool:
        """Whether the initialisation moves a part of the weight into the adapter (PiSSA and the like)."""
        init = self.options.get("init_lora_weights", True)
        return isinstance(init, str) and init not in {"gaussian", "orthogonal"}

    def config(self, model: nn.Module) -> Any:
        """The `peft.LoraConfig`. Raises what peft raises for options that do not fit."""
        from peft import LoraConfig

        return LoraConfig(target_modules=self._target_modules(model), **self.options)

    def _target_modules(self, model: nn.Module) -> list[str] | str:
        """Leaf names where these reach exactly the wanted modules, else one pattern for the full paths."""
        leaves = sorted({_leaf(path) for path in self.paths})
        # peft looks at each module once, under its first name.
        reached = {name for name, _ in model.named_modules() if _leaf(name) in leaves}
        if reached <= set(self.paths):
            return leaves
        return "|".join(re.escape(path) for path in self.paths)


def _weights(modules: Mapping[str, nn.Module], paths: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the weights that an initialisation is about to change, by name."""
    found = ((path, modules[path]._parameters.get("weight")) for path in paths)
    return {under(path, "weight"): weight.detach().clone() for path, weight in found if weight is not None}


_MARKS = ("peft_config", "_hf_peft_config_loaded")


def _outermost(path: str, paths: Mapping[str, nn.Module]) -> bool:
    parts = path.split(".")
    return not any(".".join(parts[:stop]) in paths for stop in range(1, len(parts)))


@dataclass(frozen=True)
class RemoveAdapter:
    """Takes an adapter off: the original modules, flags and marks come back."""

    originals: Placements
    wrapped: Placements
    flags: Mapping[str, bool]
    marks: Mapping[str, Any]
    aside: Mapping[str, Tensor]

    def check(self, view: View) -> None:
        """The adapter is still where it was put."""
        for path, module in self.wrapped.items():
            if view.module(path) is not module:
                raise RevertError(
                    f"cannot take the adapter off {path}: it was replaced since (merged, or unloaded?); "
                    "add the adapter again, or load the model again"
                )

    def __call__(self, model: nn.Module) -> None:
        for path, module in self.originals.items():
            place(model, path, module)
        for path, weight in self.aside.items():
            get_tensor(model, path).data = weight
        for mark in _MARKS:
            model.__dict__.pop(mark, None)
        model.__dict__.update(self.marks)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(self.flags[name])
