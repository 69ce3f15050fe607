"""The only contact with Transformers' loader, registries and internals.

Importing this module imports Transformers; nothing is registered by that. What a call registers it takes
back in `finally`.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers import PreTrainedModel as PreTrainedModel  # noqa: PLC0414 (offered to the rest of the package)
from transformers.core_model_loading import PrefixChange, WeightConverter, revert_weight_conversion
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rewire import tensor_rules
from rewire.errors import CheckpointError, RuleError
from rewire.tensor_rules import Rule, components, invert


class NoArguments(Exception):
    """The constructor arguments of a module cannot be found out."""


_constructing = threading.Lock()


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def constructor_arguments(model: nn.Module, paths: Sequence[str]) -> dict[str, Arguments]:
    """The arguments that the modules at `paths` were constructed with; paths where that is unknown are left out.

    The model is built once more on meta from its class and configuration, watching the classes of these modules.
    Raises `NoArguments` where it cannot be built.
    """
    if not isinstance(model, PreTrainedModel):
        raise NoArguments("the model has no configuration to build it again from; give a from_module class method")
    classes = {type(model.get_submodule(path)) for path in paths}
    with _constructing, torch.device("meta"), contextlib.ExitStack() as stack:
        calls = [stack.enter_context(_recording(watched)) for watched in classes]
        try:
            again = dict(type(model)(model.config).named_modules(remove_duplicate=False))
        except Exception as error:
            raise NoArguments(f"{type(model).__name__} cannot be built again: {error}") from error
    known = {key: arguments for one in calls for key, arguments in one.items()}
    return {path: known[id(again[path])] for path in paths if path in again and id(again[path]) in known}


@contextmanager
def _recording(watched: type[nn.Module]) -> Iterator[dict[int, Arguments]]:
    """Notes the constructor arguments of all `watched` instances made meanwhile; by identity of the instance."""
    calls: dict[int, Arguments] = {}
    own = "__init__" in watched.__dict__
    constructor = watched.__init__

    def record(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        calls[id(self)] = (args, kwargs)
        constructor(self, *args, **kwargs)

    watched.__init__ = record  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        if own:
            watched.__init__ = constructor  # type: ignore[method-assign]
        else:
            del watched.__init__


def declared_ties(model: nn.Module) -> dict[str, frozenset[str]]:
    """Which parameters the model says it ties: name to the other names of the same parameter.

    Needed besides identity because a model on meta, before loading, has not tied anything yet.
    """
    groups: dict[str, set[str]] = {}
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        group = groups.get(name, {name}) | groups.get(source, {source})
        groups |= dict.fromkeys(group, group)
    return {name: frozenset(group - {name}) for name, group in groups.items()}


def declare_ties(model: nn.Module) -> None:
    """Has the model's own record of ties go by the names that its parameters have now.

    Some models tie whole modules (Zamba's attention, Diffusion Gemma's decoder), which may have been edited.
    """
    for module in model.modules():
        known: dict[str, str] | None = module.__dict__.get("all_tied_weights_keys")
        if isinstance(module, PreTrainedModel) and known:
            parameters = dict(module.named_parameters(remove_duplicate=False))
            kept = {name: source for name, source in known.items() if {name, source} <= set(parameters)}
            if len(kept) < len(known):
                with _without_idle_ties(module):
                    new = module.get_expanded_tied_weights_keys(all_submodels=True)
                module.all_tied_weights_keys = {**kept, **_true_ties(new, parameters)}


@contextmanager
def _without_idle_ties(model: PreTrainedModel) -> Iterator[None]:
    """Meanwhile no model in `model` declares ties between patterns that fit no name: Transformers refuses these."""
    hidden: list[tuple[PreTrainedModel, dict[str, str] | None]] = []
    for module in model.modules():
        ties: dict[str, str] | None = getattr(module, "_tied_weights_keys", None)
        if isinstance(module, PreTrainedModel) and ties:
            names = "\n".join(module.state_dict(keep_vars=True))
            fitting = {k: v for k, v in ties.items() if all(re.search(f"^{p}", names, re.MULTILINE) for p in (k, v))}
            hidden.append((module, vars(module).get("_tied_weights_keys")))
            module._tied_weights_keys = fitting
    try:
        yield
    finally:
        for module, own in hidden:
            if own is None:  # its class has them
                del module._tied_weights_keys
            else:
                module._tied_weights_keys = own


def _true_ties(ties: Mapping[str, str], parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Those of `ties` whose names lead to one parameter (or to two that have no values yet)."""
    found = {}
    for name, source in ties.items():
        first, second = parameters.get(name), parameters.get(source)
        if first is not None and second is not None and (first is second or first.is_meta):
            found[name] = source
    return found


# --- A tensor rule in the shape of Transformers' weight conversions ---------------------------------------


class RuleConverter(WeightConverter):
    """A whole tensor rule as one weight conversion: the loader runs it, `save_pretrained` its inverse.

    Keys are looked up in a table instead of being searched for by pattern, so that a thousand rules cost no
    more than one, and no pattern can hit a tensor that is not meant.
    """

    __slots__ = ("given", "made", "prefix", "problems", "rule", "table", "then", "was_default")

    def __init__(self, rule: Rule, prefix: str, *, was_default: bool = False, then: Sequence[Any] = ()) -> None:
        self.rule = rule
        self.prefix = prefix
        self.was_default = was_default
        self.then = tuple(then)
        self.problems: list[str] = []
        self.given: dict[str, tuple[Tensor, int]] = {}
        parts = components(rule)
        self.table = {name: part for part in parts for name in part.sources}
        self.made = {part.targets[0]: part for part in parts}
        self.source_patterns = list(self.table)
        self.target_patterns = [part.targets[0] for part in self.table.values()]
        self._original_source_patterns = list(self.source_patterns)
        self._original_target_patterns = list(self.target_patterns)
        self.operations = []
        self.force_cpu = False
        self._reset()

    def _reset(self) -> None:
        self.scope_prefix = self.base_model_prefix = None
        self.distributed_operation = self.quantization_operation = None
        self.collected_tensors = defaultdict(list)
        self.layer_targets = defaultdict(set)
        self._was_used = False

    def __deepcopy__(self, memo: dict[int, Any]) -> RuleConverter:
        # The loader copies a converter for every tensor it makes; the tables never change, so they are shared.
        copy = RuleConverter.__new__(RuleConverter)
        for slot in (slot for cls in type(self).__mro__ for slot in getattr(cls, "__slots__", ())):
            if hasattr(self, slot):
                object.__setattr__(copy, slot, getattr(self, slot))
        copy._reset()
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        return _rule_converter, (self.rule, self.prefix, self.was_default, self.then)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The first name that the tensor `source_key` goes to, and the name it has in the table."""
        for name in self._spellings(source_key):
            if name in self.table:
                self._was_used = True
                return self.table[name].targets[0], name
        return source_key, None

    def _spellings(self, key: str) -> tuple[str, ...]:
        """A checkpoint of a base model leaves the prefix out; one of a larger model has it."""
        prefix = f"{self.prefix}."
        return (key, key.removeprefix(prefix) if key.startswith(prefix) else prefix + key)

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, Tensor]:
        """Runs the part of the rule that makes `layer_name` on the tensors collected for it.

        While loading, what does not fit is noted in `problems`; the tensors it would have made stay missing.
        """
        tensors = {name: found[0] for name, found in self.materialize_tensors().items()}
        try:
            results = tensor_rules.run(self.made[layer_name].steps, tensors, torch)
        except RuleError as error:
            if loading_info is None:
                raise
            self.problems.append(str(error))
            return {}
        made = {name: tensor.contiguous() for name, tensor in tensor_rules.visible(results).items()}
        self.given |= {name: (tensor, tensor._version) for name, tensor in made.items()}
        return _converted_back(model, made, self.then) if self.then else made

    def overwritten(self) -> list[str]:
        """Tensors that were given to the model and have had other values written into them since."""
        return [name for name, (tensor, version) in self.given.items() if tensor._version != version]

    def reverse_transform(self) -> RuleConverter:
        """The conversion back, after which the tensors go through what `then` reverses to."""
        return RuleConverter(invert(self.rule), self.prefix, then=self.then)


def _rule_converter(rule: Rule, prefix: str, was_default: bool, then: Sequence[Any]) -> RuleConverter:
    return RuleConverter(rule, prefix, was_default=was_default, then=then)


def _converted_back(model: Any, tensors: dict[str, Tensor], conversions: Sequence[Any]) -> dict[str, Tensor]:
    """`tensors` of the untouched model as the reverse of Transformers' own `conversions` makes them.

    `save_pretrained` gives every tensor to one converter alone, so those that a plan takes would miss theirs.
    """
    ours = model.__dict__.get("_weight_conversions")
    model._weight_conversions = list(conversions)
    try:
        with _untouched_parameters(model, tensors):
            return revert_weight_conversion(model, tensors)  # type: ignore[no-any-return]
    finally:
        model._weight_conversions = ours


@contextmanager
def _untouched_parameters(model: Any, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Has `model` answer with `tensors` when a conversion asks for the shape of a parameter that it has no more."""
    own = model.get_parameter
    model.__dict__["get_parameter"] = lambda name: tensors[name] if name in tensors else own(name)
    try:
        yield
    finally:
        del model.__dict__["get_parameter"]


def revert_on_save(model: Any, rule: Rule) -> None:
    """Has `model.save_pretrained` (and so `Trainer`) write the tensors by their names before `rule`.

    An empty rule puts things back as they were.
    """
    if not isinstance(model, PreTrainedModel):
        return
    known = model.__dict__.get("_weight_conversions")
    ours = next((entry for entry in known or () if isinstance(entry, RuleConverter)), None)
    if ours is not None and ours.was_default:
        known = None
    others = None if known is None else [entry for entry in known if entry is not ours]
    model.__dict__.pop("_weight_conversions", None)
    if others is not None:
        model.__dict__["_weight_conversions"] = others
    if components(rule):
        was_default = others is None
        others = _default_conversions(model) if others is None else others
        then = [entry for entry in others if isinstance(entry, WeightConverter)]  # renamings come last, by themselves
        converter = RuleConverter(rule, model.base_model_prefix, was_default=was_default, then=then)
        model.__dict__["_weight_conversions"] = [*others, converter]


def _default_conversions(model: PreTrainedModel) -> list[Any]:
    """What `save_pretrained` uses for a model that was not loaded."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    found = get_model_conversion_mapping(model, add_legacy=False)
    return [entry for entry in found if not isinstance(entry, PrefixChange)]


# --- Loading through the quantiser's door -----------------------------------------------------------------


class DoorOccupied(Exception):
    """The loader's own weight conversions make tensors that the plan takes; load first, edit afterwards."""


@dataclass
class _DoorConfig(QuantizationConfigMixin):
    quant_method: Any  # a name of our own, not one of the library's methods


OnMeta = Callable[[nn.Module], Rule]
"""Changes a model on meta; returns how the tensors of the checkpoint become those of the changed model."""


@contextmanager
def _door(on_meta: OnMeta, problems: list[str], as_is: bool) -> Iterator[_DoorConfig]:
    """A quantisation method of one call's own that has the loader run `on_meta` before it loads weights.

    What does not fit while the weights come in is added to `problems`. `as_is`: the tensors have the names of the
    changed model, so none of the loader's own conversions, which go by names, may touch them.
    """
    method = f"rewire-{uuid.uuid4().hex}"

    class Door(HfQuantizer):
        """Not a quantiser: the place in the loader where modules may be replaced and conversions added."""

        is_trainable = True
        rule: Rule = ()

        def __init__(self, config: Any, **kwargs: Any) -> None:
            # Tensors of an "unquantised" checkpoint would be read one after the other, without threads.
            super().__init__(config, **{**kwargs, "pre_quantized": True})
            self.converter: RuleConverter | None = None

        def is_serializable(self) -> bool:
            return True

        def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
            return dtype

        def preprocess_model(self, model: Any, dtype: Any = None, **_: Any) -> None:
            # In place of what is done for quantisers: marking the model, and looking for scales to shard.
            self.rule = on_meta(model)
            declare_ties(model)

        def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
            if as_is:
                return []
            if not components(self.rule):
                return weight_conversions
            _refuse_conflicts(weight_conversions, self.rule)
            self.converter = RuleConverter(self.rule, model.base_model_prefix)
            self.converter.problems = problems
            return [*weight_conversions, self.converter]

        def postprocess_model(self, model: Any, **_: Any) -> Any:
            # Otherwise Trainer and peft would take the model for a quantised one.
            self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
            model.__dict__.pop("is_quantized", None)
            if as_is:
                # None were used, but a checkpoint of the untouched model is still made by the usual ones.
                model.__dict__.pop("_weight_conversions", None)
            if self.converter:
                written = self.converter.overwritten()
                problems.extend(f"{name} was given new values after it was loaded" for name in written)
            return model

    AUTO_QUANTIZER_MAPPING[method] = Door
    AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _DoorConfig
    try:
        yield _DoorConfig(method)
    finally:
        AUTO_QUANTIZER_MAPPING.pop(method, None)
        AUTO_QUANTIZATION_CONFIG_MAPPING.pop(method, None)


def _refuse_conflicts(conversions: Sequence[Any], rule: Rule) -> None:
    """The loader runs one converter per tensor: theirs and ours must not want the same one."""
    for conversion in conversions:
        if isinstance(conversion, WeightConverter):
            reverse = conversion.reverse_transform()
            for part in components(rule):
                for name in part.sources:
                    if reverse.rename_source_key(name)[1] is not None:
                        raise DoorOccupied(name)


@dataclass(frozen=True)
class LoadReport:
    """What the loader found: names of tensors that were missing, not wanted, or of the wrong shape or kind."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    errors: tuple[str, ...]


def from_pretrained(
    source: str | os.PathLike[str],
    model_class: Any,
    on_meta: OnMeta | None,
    *,
    as_is: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, LoadReport]:
    """Transformers' `from_pretrained`, safetensors only, with `on_meta` run on the model before its weights come.

    `as_is`: the checkpoint has the names of the model that `on_meta` leaves.

    Raises `CheckpointError` for pickle checkpoints and for quantised ones that are to be edited, and
    `DoorOccupied`.
    """
    loader = model_class or saved_class(source, **kwargs)
    kwargs.setdefault("use_safetensors", True)
    problems: list[str] = []
    with contextlib.ExitStack() as stack:
        if on_meta is not None:
            if kwargs.get("quantization_config") is not None:
                raise CheckpointError("cannot edit and quantise in one load: load with the plan, save, then quantise")
            kwargs["quantization_config"] = stack.enter_context(_door(on_meta, problems, as_is))
        try:
            model, info = loader.from_pretrained(source, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(f"{source} has a damaged or cut off safetensors file: {error}") from error
    mismatched = tuple(sorted(str(entry[0]) for entry in info.get("mismatched_keys", ())))
    errors = tuple(map(str, [*problems, *info.get("error_msgs", ())]))
    report = LoadReport(tuple(sorted(info["missing_keys"])), tuple(sorted(info["unexpected_keys"])), mismatched, errors)
    return model, report


def _config_dict(source: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
    """`config.json` as it is: making a configuration object of it takes as long as loading a small model."""
    try:
        return PreTrainedConfig.get_config_dict(source, **_for_config(kwargs))[0]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} is not a model folder, nor a known model on the Hub: {error}") from error


def _for_config(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in _CONFIG_KWARGS if name in kwargs}


_CONFIG_KWARGS = ("cache_dir", "revision", "token", "subfolder", "local_files_only", "trust_remote_code")


def read_config(source: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The configuration of a checkpoint. Raises `CheckpointError` where there is none."""
    try:
        return AutoConfig.from_pretrained(source, **_for_config(kwargs))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} is not a model folder, nor a known model on the Hub: {error}") from error


def saved_class(source: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The class that a checkpoint was saved from, as its configuration says; else `AutoModel`."""
    config = kwargs["config"].to_dict() if "config" in kwargs else _config_dict(source, **kwargs)
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{source} holds quantised weights; apply the plan to the original, then quantise it")
    names = config.get("architectures") or ()
    return next((getattr(transformers, name) for name in names if hasattr(transformers, name)), AutoModel)


def build(config: Any, *, architecture: str | None = None, meta: bool = False) -> PreTrainedModel:
    """A model with random weights (or none yet, on meta) from a configuration.

    It is of the class that `AutoModel` takes for the configuration, or of the one that `architecture` names.
    """
    with torch.device("meta") if meta else contextlib.nullcontext():
        if architecture is not None:
            return getattr(transformers, architecture)._from_config(config)  # type: ignore[no-any-return]
        return AutoModel.from_config(config)  # type: ignore[no-any-return]


def is_model_class(name: str) -> bool:
    """Whether Transformers has a model class of this name."""
    return isinstance(getattr(transformers, name, None), type)


def task_architecture(config: Any, task: str | None) -> str | None:
    """The model class for a task, as peft calls it (`SEQ_CLS`), and a configuration; None if there is none."""
    from transformers.models.auto import modeling_auto

    names = {
        "CAUSAL_LM": "CAUSAL_LM",
        "SEQ_2_SEQ_LM": "SEQ_TO_SEQ_CAUSAL_LM",
        "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
        "TOKEN_CLS": "TOKEN_CLASSIFICATION",
        "QUESTION_ANS": "QUESTION_ANSWERING",
    }
    mapping = getattr(modeling_auto, f"MODEL_FOR_{names.get(task or '')}_MAPPING_NAMES", {})
    found: str | None = mapping.get(config.model_type)
    return found


def model_config(model_type: str, values: Mapping[str, Any]) -> Any:
    """The default configuration of a model type, with `values` set. Raises `CheckpointError` for unknown types."""
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"no configuration for model type {model_type!r}: {error}") from error


# --- Saving -----------------------------------------------------------------------------------------------


def write_pretrained(model: Any, folder: Path, tensors: dict[str, Tensor], **kwargs: Any) -> None:
    """What `save_pretrained` writes, with `tensors` in place of the model's own, and without adapters.

    `tensors` go by the names of the untouched model's modules; conversions that Transformers itself made while
    loading are taken back, Rewire's are not. With `save_original_format=False` names are written as they are.
    """
    conversions = model.__dict__.get("_weight_conversions")
    hidden = {name: model.__dict__.pop(name) for name in _HIDDEN if name in model.__dict__}
    if conversions is not None:
        model._weight_conversions = [entry for entry in conversions if not isinstance(entry, RuleConverter)]
    try:
        with _untouched_parameters(model, tensors):
            model.save_pretrained(folder, state_dict=tensors, **kwargs)
    finally:
        model.__dict__.update(hidden)
        if conversions is not None:
            model._weight_conversions = conversions


_HIDDEN = ("_hf_peft_config_loaded", "peft_config")


_naming = threading.Lock()


@contextmanager
def peft_as_named() -> Iterator[None]:
    """Has peft take names of modules for what they are.

    For types whose experts Transformers stacks since version 5, peft takes `gate_proj` for a part of the stacked
    tensor, wherever it stands. Rewire names modules that exist: of experts taken apart, or of a dense layer.
    """
    from peft.utils import transformers_weight_conversion as conversion

    with _naming:
        names = "convert_peft_config_for_transformers", "convert_peft_adapter_state_dict_for_transformers"
        theirs = {name: getattr(conversion, name) for name in names}
        setattr(conversion, names[0], lambda *args, **kwargs: None)
        setattr(conversion, names[1], lambda *args, adapter_state_dict, **kwargs: adapter_state_dict)
        try:
            yield
        finally:
            for name, function in theirs.items():
                setattr(conversion, name, function)


def save_adapter(model: PreTrainedModel, folder: Path, name: str) -> None:
    """Writes the adapter called `name` as peft does."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = model.peft_config[name]
    tensors = get_peft_model_state_dict(model, adapter_name=name)
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    named = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(model: PreTrainedModel, folder: Path, name: str) -> None:
    """Fills the adapter called `name`, which the model has, from a folder. Raises `CheckpointError`."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    named = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    with peft_as_named():
        result: Any = set_peft_model_state_dict(model, named, adapter_name=name)
    missing = [key for key in result.missing_keys if f".{name}." in key or key.endswith(f".{name}")]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{folder} does not fit the adapter {name!r}: missing {missing}, unexpected {result.unexpected_keys}"
        )


def attach_adapter(model: Any, folder: Path, name: str, *, trainable: bool = False) -> None:
    """Puts the adapter in `folder` into a model under `name`. Raises `CheckpointError` where it does not fit."""
    from peft import PeftConfig, inject_adapter_in_model

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not trainable
    try:
        with peft_as_named():
            inject_adapter_in_model(config, model, name)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} does not fit the model: {error}") from error
    if hasattr(model, "add_adapter"):
        model.__dict__["_hf_peft_config_loaded"] = True
    load_adapter(model, folder, name)


def names_of_stacked_experts(model: nn.Module) -> frozenset[str]:
    """The names that peft takes for parts of stacked experts in a model of this type, whatever they are."""
    from peft.utils import transformers_weight_conversion as conversion

    model_type = getattr(getattr(model, "config", None), "model_type", "")
    patterns: dict[str, str] = vars(conversion)["_MODEL_TO_CONVERSION_PATTERN"]
    return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(patterns.get(model_type, ""), ()))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises `CheckpointError` for a damaged one."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or cut off: {error}") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors, each a copy of its own."""
    from safetensors.torch import save_file

    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files of a model folder, adapters left out."""
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def decayed_parameters(model: nn.Module) -> frozenset[str]:
    """The parameters to which `Trainer` applies weight decay; the others are in a group of their own."""
    from transformers import Trainer

    ask: Any = Trainer.get_decay_parameter_names  # asks nothing of the trainer itself
    return frozenset(ask(None, model))


# --- For the command line ---------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers and the Hub without progress bars and chatter; what was set before is set again."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    had_bars = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if had_bars:
            enable_progress_bars()


def model_types() -> tuple[str, ...]:
    """Every model type that Transformers knows."""
    return tuple(sorted(transformers.CONFIG_MAPPING))


def auto_model_types() -> tuple[str, ...]:
    """Every model type of which `AutoModel` makes a model."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return tuple(sorted(MODEL_MAPPING_NAMES))


def build_saved(source: str | os.PathLike[str]) -> PreTrainedModel:
    """The model of a checkpoint, of the class that was saved, without weights (on meta)."""
    config = read_config(source)
    loader = saved_class(source, config=config)
    with torch.device("meta"):
        model = loader.from_config(config) if loader is AutoModel else loader._from_config(config)
    return model  # type: ignore[no-any-return]


def tokenizer_of(source: str | os.PathLike[str]) -> Any:
    """The tokenizer of a model folder or of a model on the Hub. Raises `CheckpointError` where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{source} has no tokenizer that can be loaded: {error}") from error


def side_folder(source: str | os.PathLike[str]) -> Path:
    """The folder with the tokenizer and other side files of a model; for one on the Hub, of a local copy."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source), ignore_patterns=_WEIGHT_FILES))


_WEIGHT_FILES = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf"]


# --- Generating text --------------------------------------------------------------------------------------


def takes_static_cache(model: Any) -> bool:
    """Whether the model can keep its keys and values in tensors of fixed size, which `torch.compile` needs."""
    return bool(getattr(model, "_can_compile_fullgraph", False))


def static_cache(model: Any, length: int) -> Any:
    """An empty cache for texts of up to `length` tokens."""
    from transformers import StaticCache

    return StaticCache(model.config, max_cache_len=length)


def generate_greedily(model: Any, ids: Tensor, tokens: int, cache: str | None = None) -> Tensor:
    """`ids` `[batch, length]` and exactly `tokens` more, always the likeliest; `cache` is one of `generate`'s kinds."""
    how: dict[str, Any] = {"do_sample": False, "num_beams": 1, "pad_token_id": 0, "disable_compile": True}
    how |= {"max_new_tokens": tokens, "min_new_tokens": tokens, "cache_implementation": cache}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **how)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class CacheLayer:
    """What Transformers keeps of one layer between tokens.

    Attributes:
        kind: `attention` (keys and values), `indexed` (one more key to choose positions by), `none`, or `other` (states
            of linear attention and the like).
        window: how many positions are seen; None for all.
        name: its class.
    """

    kind: str
    window: int | None
    name: str


def cache_layers(config: Any, length: int | None = None) -> tuple[CacheLayer, ...]:
    """The layers of an empty cache for a model of this configuration; static, with `length` positions, where given."""
    from transformers import DynamicCache, StaticCache

    cache: Any = DynamicCache(config=config) if length is None else StaticCache(config, max_cache_len=length)
    return tuple(_cache_layer(layer) for layer in cache.layers)


def _cache_layer(layer: Any) -> CacheLayer:
    from transformers import cache_utils as kinds

    window = None
    if isinstance(layer, kinds.DynamicSlidingWindowLayer):
        window = int(layer.sliding_window)
    elif isinstance(layer, kinds.StaticSlidingWindowLayer):
        window = int(layer.max_cache_len)
    plain = (kinds.DynamicLayer, kinds.DynamicSlidingWindowLayer, kinds.StaticLayer, kinds.StaticSlidingWindowLayer)
    names: dict[type, str] = {**dict.fromkeys(plain, "attention"), kinds.DummyLayer: "none"}
    names |= dict.fromkeys((kinds.DynamicIndexedLayer, kinds.StaticIndexedLayer), "indexed")
    return CacheLayer(names.get(type(layer), "other"), window, type(layer).__name__)
