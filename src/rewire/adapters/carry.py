"""`carry_adapter`: an adapter trained before an edit fits the model after it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rewire import hf_seam
from rewire.adapters import folder
from rewire.adapters.advance import Held, advance
from rewire.adapters.folder import Adapter
from rewire.adapters.folding import Folded, fold, settle, unfold, with_origins
from rewire.adapters.layout import Contents, home, places, read, settled, write
from rewire.adapters.lowrank import LowRank
from rewire.adapters.models import Edited, Model, find
from rewire.adapters.report import Carried
from rewire.adapters.scaling import Scaling
from rewire.adapters.settings import Settings, Wanted, check_kind, module_names, parameter_names, rewritten, says
from rewire.errors import CheckpointError, RefusedError
from rewire.module_tree import submodule
from rewire.plan import Edit, Plan
from rewire.tensor_rules import Rule, invert


def carry_adapter(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    plan: Plan | Edit | None = None,
    *,
    model: Model | None = None,
    revert: bool = False,
    overwrite: bool = False,
    allow_code: bool = False,
) -> Carried:
    """Carries a LoRA adapter of peft across an edit: what it adds to the untouched model it adds to the edited one.

    Rows of B follow the rows of the weights. The parts of a split layer share A; a joined layer has the ranks of its
    parts side by side, or one A if they share it. Ranks, alphas and targets in `adapter_config.json` follow. Numbers
    are moved; the report names the tensors where one had to be rounded.

    Args:
        source: the adapter's folder, with safetensors.
        destination: the folder to write, new or empty.
        plan: the plan of the edit; with `revert` by default the one that `source` was carried across.
        model: the untouched model, or where it is; by default the one that `adapter_config.json` names. Only its
            configuration is read.
        revert: the adapter is one for the edited model, and goes to the untouched one.
        overwrite: whether a destination that is not empty may be replaced.
        allow_code: whether classes that the plan names by import path may be imported.

    Raises:
        RefusedError: there is no adapter that does exactly the same, and why.
        CheckpointError: the adapter cannot be read, or belongs to another model.
        OutputError: the destination cannot be written; it appears whole or not at all.
    """
    adapter = folder.read(Path(source))
    check_kind(adapter.config)
    plan = _plan(plan, adapter, revert)
    found = find(_model(model, adapter), adapter.config, plan, _fitting(adapter, revert), allow_code=allow_code)
    job = _Job(adapter, found, revert)
    result = job.run()
    record = plan.to_dict(), plan.hash, job.moved(result)
    folder.write(
        Path(destination), adapter, result.config, result.tensors, record, reverted=revert, overwrite=overwrite
    )
    return job.report(result, str(destination), plan)


def _plan(plan: Plan | Edit | None, adapter: Adapter, revert: bool) -> Plan:
    if plan is not None:
        return plan if isinstance(plan, Plan) else Plan([plan])
    if revert and adapter.record is not None:
        return Plan.from_dict(adapter.record.plan)
    raise CheckpointError(f"{adapter.folder} was not carried across a plan; name the plan")


def _model(model: Model | None, adapter: Adapter) -> Model:
    if model is not None:
        return model
    named = adapter.config.get("base_model_name_or_path")
    if not named:
        raise CheckpointError(f"{adapter.folder} does not say what its base model is; name it (model=…, --model)")
    return str(named)


def _fitting(adapter: Adapter, revert: bool) -> Any:
    wanted = places(adapter.tensors)

    def problem(found: Edited) -> str | None:
        side = found.after if revert else found.before
        missing = sorted(path for path in wanted if not _has(side, path))
        if not missing:
            return None
        state = "as edited by the plan " if revert else ""
        return (
            f"the adapter is for modules that {found.name} {state}does not have: {', '.join(missing[:3])}"
            + (f", … ({len(missing)})" if len(missing) > 3 else "")
            + ". Is it the right model (model=…, --model)? An adapter of an older version of Transformers has to be "
            "loaded with peft and saved again"
        )

    return problem


def _has(model: nn.Module, path: str) -> bool:
    try:
        submodule(model, path)
    except (KeyError, AttributeError):
        return False
    return True


@dataclass(frozen=True)
class _Result:
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    blocks: dict[str, Folded]
    contents: Contents


class _Job:
    """One adapter on its way from one side of an edit to the other."""

    def __init__(self, adapter: Adapter, found: Edited, revert: bool) -> None:
        self.adapter = adapter
        self.revert = revert
        self.name = found.name
        self.here, self.there = (found.after, found.before) if revert else (found.before, found.after)
        self.rule: Rule = invert(found.rule) if revert else found.rule
        self.settings = Settings(adapter.config)
        self.record = adapter.record if revert else None
        self.before = read(adapter.tensors, self.here, self.settings)
        self.saved = self.settings.saved(self.here)
        self.touched = {name for step in self.rule for name in (*step.inputs, *step.outputs)}

    def run(self) -> _Result:
        self._check_others()
        changes = self._changes()
        saved = {name: one for name, one in self.before.wholes.items() if name in self.saved}
        alone = {name: one for name, one in self.before.wholes.items() if name not in self.saved}
        saved_after = advance(self.rule, saved)
        wholes = {**saved_after, **advance(self.rule, alone)}
        blocks = {name: fold(change) for name, change in changes.items()}
        held: dict[str, Held] = {**wholes, **{name: one.change for name, one in blocks.items()}}
        bases = {name: one for name, one in advance(self.rule, self.before.bases).items() if isinstance(one, Tensor)}
        contents = replace(self.before, held=held, homes=self._homes(changes), bases=bases)
        names_saved = frozenset(saved_after) | (self.saved - set(saved) - self.touched)
        config = self._config(contents, names_saved)
        return _Result(config, write(contents, self.there), blocks, contents)

    def _changes(self) -> dict[str, LowRank]:
        """The changes of low rank to the tensors of the other side, with terms not yet folded."""
        changes = self.before.changes
        if self.record is None:
            changes = with_origins(changes)
        else:
            changes = {
                name: unfold(change, self.record.blocks[name]) if name in self.record.blocks else change
                for name, change in changes.items()
            }
        moved = {name: one for name, one in advance(self.rule, changes).items() if isinstance(one, LowRank)}
        if self.record is not None:
            moved = {name: one for name, change in moved.items() if (one := settle(name, change)) is not None}
        parameters = self._own_parameters()
        return {
            name: settled(change, home(self.there, name, as_parameter=name in parameters))
            for name, change in moved.items()
        }

    def _own_parameters(self) -> set[str]:
        """The tensors of the other side that are to be adapted themselves, although their module could be."""
        config = self.adapter.config if self.record is None else self.record.config
        return Settings(config).parameters(parameter_names(self.there))

    def _homes(self, changes: Iterable[str]) -> dict[str, Any]:
        parameters = self._own_parameters()
        return {name: home(self.there, name, as_parameter=name in parameters) for name in changes}

    def _check_others(self) -> None:
        """Tensors that are no model's (of trainable tokens, say) stay as they are, if their place does."""
        for name in self.before.others:
            for touched in self.touched:
                path = touched.rpartition(".")[0]
                if path and f".{path}." in f".{name}.":
                    raise RefusedError(
                        f"the adapter holds {name}, and the plan changes {touched}; what becomes of it is not known"
                    )

    def _config(self, contents: Contents, saved: frozenset[str]) -> dict[str, Any]:
        homes, changes = contents.homes.values(), contents.changes
        modules = frozenset(of.path for of in homes if of.kind != "parameter")
        scalings: dict[str, Scaling] = {of.key: changes[of.name].terms[0].scaling for of in homes}
        wanted = Wanted(
            modules,
            frozenset(of.name for of in homes if of.kind == "parameter"),
            scalings,
            frozenset(of.path for of in homes if of.kind == "flipped"),
            saved,
        )
        if self.record is not None and says(self.record.config, wanted, self.there):
            return dict(self.record.config)
        config = rewritten(self.adapter.config, wanted, self.there)
        _check(config, wanted, self.there)
        return config

    def moved(self, result: _Result) -> dict[str, Folded]:
        """The adapters of tensors that the rule made."""
        return {name: one for name, one in result.blocks.items() if name in self.touched}

    def report(self, result: _Result, destination: str, plan: Plan) -> Carried:
        before, after = self.before.held, result.contents.held
        rounded = sorted(name for name, one in result.blocks.items() if one.rounded)
        return Carried(
            "adapter",
            str(self.adapter.folder),
            destination,
            self.name,
            plan.hash,
            self.revert,
            tuple(sorted(before)),
            tuple(sorted(after)),
            len([name for name in before if name not in self.touched]),
            tuple(rounded),
            tuple(self._notes(result)),
        )

    def _notes(self, result: _Result) -> Iterable[str]:
        if self.adapter.config.get("lora_dropout") and self.touched & {*self.before.changes}:
            yield "trained further, the parts of an edited layer draw their dropout (lora_dropout) each for itself"
        leaves = {of.path.rpartition(".")[2] for of in result.contents.homes.values() if of.kind != "parameter"}
        taken = sorted(leaves & hf_seam.names_of_stacked_experts(self.there))
        if taken:
            yield (
                f"peft takes {', '.join(taken)} for parts of the stacked experts that this model type has unedited: "
                "load the adapter with rewire.load_adapter"
            )


def _check(config: Mapping[str, Any], wanted: Wanted, model: nn.Module) -> None:
    """Whether the new configuration says what it has to; a mistake here would be an adapter silently not loaded."""
    settings = Settings(config)
    reached = settings.modules(module_names(model)), settings.parameters(parameter_names(model))
    if reached != (set(wanted.modules), set(wanted.parameters)):
        extra = sorted({*reached[0], *reached[1]} ^ {*wanted.modules, *wanted.parameters})
        raise RefusedError(
            f"no target_modules reach exactly the adapted modules; too many or too few: {', '.join(extra[:3])}"
        )
    for key, scaling in wanted.scalings.items():
        if (settings.rank(key), settings.alpha(key)) != (scaling.rank, scaling.alpha):
            raise RefusedError(f"no patterns give {key} the rank {scaling.rank} and alpha {scaling.alpha}")
