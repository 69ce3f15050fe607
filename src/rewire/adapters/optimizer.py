"""`carry_optimizer`: the optimizer state that `Trainer` writes follows its parameters across an edit.

`optimizer.pt` knows parameters by number: by group, and within a group in the order of `named_parameters`.
`Trainer` makes two groups, with weight decay and without. An edit changes number and order, so the state is taken
apart by name, the moments go through the tensor rule as the parameters do, and the result is numbered anew.
"""

from __future__ import annotations

import fnmatch
import os
import pickle
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewire import hf_seam
from rewire.adapters.advance import advance
from rewire.adapters.models import Edited, Model, find
from rewire.adapters.report import Carried
from rewire.artefact import new_folder
from rewire.errors import CheckpointError, OutputError, RefusedError
from rewire.plan import Edit, Plan
from rewire.tensor_rules import Cast, CastBack, Rename, Rule, components, invert

STATE = "optimizer.pt"

_BY_ELEMENT = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "sum",
     "exp_inf", "ax", "prev", "step_size"}
)  # fmt: skip
"""States of torch's optimizers in which every element has to do with its own element of the parameter alone."""

_BY_MATRIX = {
    "scale_parameter": "Adafactor scales every step by the size of the whole parameter",
    "decay_rate": "Adafactor scales every step by the size of the whole parameter",
    "beta2_decay": "Adafactor scales every step by the size of the whole parameter",
    "ns_steps": "Muon makes the update of a whole matrix orthogonal",
    "trust_coefficient": "every step is scaled by the size of the whole parameter",
}
"""Settings of optimizers whose step depends on what is in one parameter together."""


def carry_optimizer(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    plan: Plan | Edit,
    model: Model | None = None,
    *,
    frozen: Sequence[str] = (),
    revert: bool = False,
    overwrite: bool = False,
    allow_code: bool = False,
) -> Carried:
    """Carries a checkpoint of `Trainer` across an edit, so that `resume_from_checkpoint` goes on with the edited model.

    Args:
        source: a checkpoint folder, or its `optimizer.pt`. It is read with `weights_only=True`: no code runs.
        destination: what to write, a folder or a file like `source`. A folder holds everything that `source` holds;
            its weights stay in the original layout, which an edited model takes.
        plan: the plan of the edit.
        model: the untouched model (its flags say what was trained), or where it is; by default `source`.
        frozen: globs of parameters that were not trained.
        revert: the state is one of the edited model, and goes to the untouched one.
        overwrite: whether a destination that exists may be replaced.
        allow_code: whether classes that the plan names by import path may be imported.

    Raises:
        RefusedError: the next step would not be that of the unedited run, and why.
        CheckpointError: the state cannot be read, or belongs to other parameters.
        OutputError: the destination cannot be written; it appears whole or not at all.
    """
    path, plan = Path(source), plan if isinstance(plan, Plan) else Plan([plan])
    state = _read(path)
    found = find(_model(path, model), {}, plan, lambda one: _misfit(one, state, frozen, revert), allow_code=allow_code)
    here, there = (found.after, found.before) if revert else (found.before, found.after)
    rule = invert(found.rule) if revert else found.rule
    job = _Job(state, _names(here, state, frozen), here, there, rule)
    _write(path, Path(destination), job.run(), overwrite)
    touched = {name for step in rule for name in step.inputs}
    before = tuple(name for group in job.groups for name in group)
    return Carried(
        "optimizer",
        str(path),
        str(destination),
        found.name,
        plan.hash,
        revert,
        before,
        tuple(name for group in job.new_groups for name in group),
        len([name for name in before if name not in touched]),
    )


def _read(path: Path) -> dict[str, Any]:
    file = path / STATE if path.is_dir() else path
    if path.is_dir() and (path / "adapter_config.json").is_file():
        raise RefusedError(
            f"{path} is of a run that trains an adapter. The parts of a split layer begin with one A, and each trains "
            "its own from then on, so that no state continues the run exactly. Carry the adapter (rewire adapters) and "
            "train it with a fresh optimizer"
        )
    if not file.is_file():
        raise CheckpointError(f"{path} has no {STATE}; states in shards (DeepSpeed, FSDP) have to be gathered first")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read without running code, or is damaged: {error}") from error
    if not isinstance(state, dict) or not {"state", "param_groups"} <= set(state):
        raise CheckpointError(f"{file} is no state of an optimizer: it lacks `state` or `param_groups`")
    return state


def _model(path: Path, model: Model | None) -> Model:
    if model is not None:
        return model
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; name the model (model=…, --model)")
    return folder


def _trained(model: nn.Module, frozen: Sequence[str]) -> list[str]:
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(fnmatch.fnmatchcase(name, glob) for glob in frozen)
    ]


def _names(model: nn.Module, state: Mapping[str, Any], frozen: Sequence[str]) -> list[list[str]]:
    """The names of the parameters by group, in the order of their numbers."""
    groups = state["param_groups"]
    if all("param_names" in group for group in groups):
        return [list(group["param_names"]) for group in groups]
    decayed = hf_seam.decayed_parameters(model)
    trained = _trained(model, frozen)
    return [[name for name in trained if name in decayed], [name for name in trained if name not in decayed]]


def _misfit(found: Edited, state: Mapping[str, Any], frozen: Sequence[str], revert: bool) -> str | None:
    """Why the state is not that of the trained parameters of a model; None if it is."""
    model = found.after if revert else found.before
    names = _names(model, state, frozen)
    sizes = [len(group["params"]) for group in state["param_groups"]]
    if [len(group) for group in names] != sizes:
        expected = " and ".join(str(len(group)) for group in names)
        return (
            f"the optimizer has groups of {' and '.join(map(str, sizes))} parameters, but Trainer makes groups of "
            f"{expected} for {found.name}. Is it the right model (model=…, --model)? Parameters that were not trained "
            "have to be named (frozen=…, --frozen)"
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, number in _numbered(names, state):
        for key, value in state["state"].get(number, {}).items():
            if key in _BY_ELEMENT and not _is_counter(value) and tuple(value.shape) != shapes.get(name):
                return f"{key} of parameter {number} has shape {list(value.shape)}, but {name} has {shapes.get(name)}"
    return None


def _numbered(names: Sequence[Sequence[str]], state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for group, found in zip(state["param_groups"], names, strict=True):
        yield from zip(found, group["params"], strict=True)


@dataclass(frozen=True)
class _Origin:
    """Where a parameter comes from: those that it is made of, and whether only their names changed."""

    sources: tuple[str, ...]
    renamed: bool


class _Job:
    """One state on its way to another set of parameters."""

    def __init__(
        self, state: Mapping[str, Any], groups: Sequence[Sequence[str]], here: nn.Module, there: nn.Module, rule: Rule
    ) -> None:
        self.state = state
        self.groups = groups
        self.there = there
        self.rule = rule
        self.by_name = {name: state["state"].get(number, {}) for name, number in _numbered(groups, state)}
        self.group_of = {name: number for number, group in enumerate(groups) for name in group}
        shapes = {name: parameter for name, parameter in here.named_parameters() if name in self.group_of}
        after = advance(rule, {name: parameter.detach() for name, parameter in shapes.items()}, "optimizer state")
        self.origins = self._origins(set(after))
        self.new_groups = self._new_groups()

    def _origins(self, after: set[str]) -> dict[str, _Origin]:
        parts = {target: part for part in components(self.rule) for target in part.targets}
        found: dict[str, _Origin] = {}
        for name in after:
            part = parts.get(name)
            if part is None:
                found[name] = _Origin((name,), True)
                continue
            sources = tuple(source for source in part.sources if source in self.group_of)
            found[name] = _Origin(sources, all(isinstance(step, Rename | Cast | CastBack) for step in part.steps))
        return found

    def _new_groups(self) -> list[list[str]]:
        names = [name for name, _ in self.there.named_parameters() if name in self.origins]
        lost = sorted(set(self.origins) - set(names))
        if lost:
            raise RefusedError(f"the edited model has no parameter {lost[0]} for what the optimizer holds of it")
        groups: list[list[str]] = [[] for _ in self.groups]
        for name in names:
            groups[self._group(name)].append(name)
        return groups

    def _group(self, name: str) -> int:
        numbers = {self.group_of[source] for source in self.origins[name].sources}
        if len(numbers) != 1:
            raise RefusedError(
                f"{name} is made of parameters that are trained with different settings: "
                f"{', '.join(self.origins[name].sources)}"
            )
        (number,) = numbers
        if "param_names" not in self.state["param_groups"][number]:
            is_decayed = name in hf_seam.decayed_parameters(self.there)
            if is_decayed != (number == 0):
                raise RefusedError(f"by its name, Trainer would change the weight decay of {name} after the edit")
        return number

    def run(self) -> dict[str, Any]:
        """The state of the parameters after the rule."""
        for name, origin in self.origins.items():
            if not origin.renamed:
                self._check_by_element(name, origin)
        keys = dict.fromkeys(key for entries in self.by_name.values() for key in entries)
        moved = {key: self._moved(key) for key in keys}
        names = [name for group in self.new_groups for name in group]
        state = {
            number: {key: moved[key][name] for key in keys if name in moved[key]} for number, name in enumerate(names)
        }
        groups, start = [], 0
        for group, found in zip(self.state["param_groups"], self.new_groups, strict=True):
            groups.append({**group, "params": list(range(start, start + len(found)))})
            groups[-1] |= {"param_names": list(found)} if "param_names" in group else {}
            start += len(found)
        return {**self.state, "state": {n: entries for n, entries in state.items() if entries}, "param_groups": groups}

    def _check_by_element(self, name: str, origin: _Origin) -> None:
        group = self.state["param_groups"][self.group_of[origin.sources[0]]]
        for setting, reason in _BY_MATRIX.items():
            if setting in group:
                raise RefusedError(f"the optimizer state cannot be carried to {name}: {reason}")
        for source in origin.sources:
            for key, value in self.by_name[source].items():
                if not _is_counter(value) and value is not None and key not in _BY_ELEMENT:
                    raise RefusedError(
                        f"the optimizer holds {key} of {source}; what becomes of it in {name} is not known"
                    )

    def _moved(self, key: str) -> dict[str, Any]:
        """The entry `key` by the names after; counters stay what they are."""
        values = {name: entries[key] for name, entries in self.by_name.items() if key in entries}
        tensors = {name: value for name, value in values.items() if not _is_counter(value) and value is not None}
        renamed = {name: o.sources[0] for name, o in self.origins.items() if o.renamed}
        found = {name: tensors[source] for name, source in renamed.items() if source in tensors}
        rest = {name: tensor for name, tensor in tensors.items() if name not in set(renamed.values())}
        found |= advance(self.rule, rest, f"optimizer state ({key})")
        counters = {name: value for name, value in values.items() if name not in tensors}
        return {name: _own(tensor) for name, tensor in found.items()} | dict(self._counted(key, counters))

    def _counted(self, key: str, counters: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, origin in self.origins.items():
            values = [counters[source] for source in origin.sources if source in counters]
            if not values:
                continue
            if any(value != values[0] for value in values):
                found = ", ".join(f"{float(one):g}" for one in values)
                raise RefusedError(f"{name} is made of parameters with different {key}: {found}")
            yield name, values[0].clone() if isinstance(values[0], Tensor) else values[0]


def _is_counter(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1 and value.ndim == 0)


def _own(tensor: object) -> Tensor:
    assert isinstance(tensor, Tensor)
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _write(source: Path, destination: Path, state: Mapping[str, Any], overwrite: bool) -> None:
    if destination.exists() and os.path.samefile(destination, source):
        raise OutputError(f"{destination} is the checkpoint itself; choose another place")
    if source.is_dir():
        with new_folder(destination, overwrite=overwrite, needed_bytes=_size(source)) as building:
            for path in source.iterdir():
                if path.is_dir():
                    shutil.copytree(path, building / path.name)
                elif path.name != STATE:
                    shutil.copy2(path, building / path.name)
            torch.save(state, building / STATE)
        return
    if destination.exists() and not overwrite:
        raise OutputError(f"{destination} exists; choose another name, or allow overwriting it (--overwrite)")
    destination.parent.mkdir(parents=True, exist_ok=True)
    building = destination.with_name(f".{destination.name}.rewire-{uuid.uuid4().hex[:8]}")
    try:
        torch.save(state, building)
        building.replace(destination)
    finally:
        building.unlink(missing_ok=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
