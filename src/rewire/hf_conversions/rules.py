"""Which tensor of a checkpoint goes where, as the loader's own transforms say, and the rules that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from rewire.errors import CheckpointError, RuleError
from rewire.hf_conversions.operations import Trace, Values, first_of
from rewire.hf_conversions.order import Part, in_order
from rewire.tensor_rules import Rename, Rule, Shape, run_shapes


def reading_rule(model: PreTrainedModel, shapes: Mapping[str, Shape]) -> Rule:
    """The steps from the tensors of a checkpoint to those of `model`, as `from_pretrained` would take them.

    Args:
        model: the untouched model, also on meta.
        shapes: names and shapes of the tensors in the checkpoint. Those that the loader would ignore pass through.

    Raises:
        CheckpointError: a conversion cannot be told in steps, a tensor would get a shape that the model has not,
            or a tensor that is ignored is called as one of the model.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    jobs = _jobs_of_reading(model, shapes, wanted)
    rule = in_order([job.traced(model, shapes) for job in jobs])
    _check(model, rule, shapes, wanted)
    return rule


def writing_rule(model: PreTrainedModel, shapes: Mapping[str, Shape]) -> Rule:
    """The steps from the tensors of `model` to those that `save_pretrained` writes for a model that was not loaded.

    Args:
        model: the untouched model, also on meta.
        shapes: names and shapes of its tensors that are written.

    Raises `CheckpointError` for a conversion that cannot be told in steps.
    """
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    back = [entry.reverse_transform() for entry in reversed(conversions) if not isinstance(entry, PrefixChange)]
    renamings = [entry for entry in back if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in back if isinstance(entry, WeightConverter)]

    def renamed(name: str) -> str:
        return core_model_loading.apply_renamings(name, renamings)

    jobs: dict[str, _Job] = {}
    for name in _sorted(shapes):
        first, pattern = core_model_loading.apply_converters(name, converters)
        if pattern is None:
            jobs.setdefault(renamed(name), _Job(renamed(name))).add(name, name)
        else:
            job = _Job(first, _converter_of(pattern, converters), renamed)
            jobs.setdefault(first, job).add(pattern, name)
    rule = in_order([job.traced(model, shapes) for job in jobs.values()])
    _run(model, rule, shapes)
    return rule


def stored_shapes(model: PreTrainedModel) -> dict[str, Shape]:
    """Names and shapes of the tensors of `model` that a checkpoint holds: one name for every tied tensor."""
    tensors = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        tensors.pop(name, None)
    left = remove_tied_weights_from_state_dict(tensors, model)
    return {name: tuple(tensor.shape) for name, tensor in left.items()}


@dataclass
class _Job:
    """What is done with the tensors that go to `name` first of all.

    Attributes:
        name: the tensor made, the first of several.
        converter: what makes it; None: nothing is done but renaming.
        renamed: what the names made are called in the end.
        tensors: the names collected, by the pattern that they fit.
    """

    name: str
    converter: WeightConverter | None = None
    renamed: Callable[[str], str] = str
    tensors: dict[str, list[str]] = field(default_factory=dict)

    def add(self, pattern: str, name: str) -> None:
        self.tensors.setdefault(pattern, []).append(name)

    def traced(self, model: PreTrainedModel, shapes: Mapping[str, Shape]) -> Part:
        """The steps of the job."""
        if self.converter is None:
            first = next(iter(self.tensors.values()))[0]  # the loader takes the first of two that claim one name
            return Part([Rename(first, self.name)] if first != self.name else [])
        trace = Trace(
            self.name, model, self.converter, {n: shapes[n] for found in self.tensors.values() for n in found}
        )
        made: Values = dict(self.tensors)
        try:
            for operation in self.converter.operations:
                made = trace.run(operation, made)
            names = {self.renamed(name): first_of(value) for name, value in self._spelled(made).items()}
            return trace.finished(names)
        except (RuleError, AttributeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{type(model).__name__}: {self.name} cannot be made: {error}") from error

    def _spelled(self, made: Values) -> Values:
        """The patterns completed to names, as the loader does it."""
        full = self.name.replace("*.", "0.")
        pattern = next((pattern for pattern in made if pattern in full), None)
        if pattern is None:
            return made
        before, _, after = full.partition(pattern)
        return {f"{before}{key}{after}": value for key, value in made.items()}


def _jobs_of_reading(
    model: PreTrainedModel, shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]
) -> Iterable[_Job]:
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    there: dict[str, Any] = dict(wanted)
    prefix = model.base_model_prefix
    jobs: dict[str, _Job] = {}
    for name in _sorted(shapes):
        goal, pattern = core_model_loading.rename_source_key(name, renamings, converters, prefix, there)
        if goal not in wanted and name in wanted:
            goal, pattern = core_model_loading.rename_source_key(name, [], [], prefix, there)
        if goal in wanted and pattern is None:
            jobs.setdefault(goal, _Job(goal)).add(name, name)
        elif goal in wanted and pattern is not None:
            jobs.setdefault(goal, _Job(goal, _converter_of(pattern, converters))).add(pattern, name)
    return jobs.values()


def _sorted(names: Iterable[str]) -> list[str]:
    return sorted(names, key=core_model_loading.dot_natural_key)


def _converter_of(pattern: str, converters: Sequence[WeightConverter]) -> WeightConverter:
    """The converter with this source pattern; of several the last, as the loader has it."""
    found = next(converter for converter in reversed(converters) if pattern in converter.source_patterns)
    if type(found) is not WeightConverter:
        raise CheckpointError(
            f"Transformers reads this checkpoint with a {type(found).__name__}, which is not known here"
        )
    return found


def _run(model: PreTrainedModel, rule: Rule, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    try:
        return run_shapes(rule, shapes)
    except RuleError as error:
        raise CheckpointError(
            f"the conversions of {type(model).__name__} do not fit this checkpoint: {error}"
        ) from error


def _check(model: PreTrainedModel, rule: Rule, shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    after = _run(model, rule, shapes)
    wrong = [
        f"{name} {list(after[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if after.get(name, shape) != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(
            f"the tensors of this checkpoint do not fit {type(model).__name__} as its configuration describes it: "
            f"{'; '.join(wrong[:8])}{more}"
        )
