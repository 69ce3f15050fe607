"""`adapter_config.json`: which modules it reaches, with which ranks, and one that reaches others.

How peft reads its configuration (0.21, `tuners_utils.check_target_module_exists`, `other.get_pattern_key`,
`BaseTuner._inject_parameters`) is restated here as facts about the file, so that a configuration can be checked
against a model on meta without an adapter being made.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from rewire.adapters.scaling import Scaling
from rewire.errors import CheckpointError, RefusedError
from rewire.module_tree import under

Data = Mapping[str, Any]
"""The contents of `adapter_config.json`."""


def check_kind(data: Data) -> None:
    """Raises `RefusedError` for adapters that are none of LoRA, or whose arithmetic is another."""
    kind = data.get("peft_type")
    if kind != "LORA":
        raise RefusedError(
            f"the adapter is of type {kind}; only LORA adapters are sums that an edit can be carried across"
        )
    for name, reason in _REFUSED.items():
        if data.get(name):
            raise RefusedError(f"the adapter uses {name}: {reason}")
    start = str(data.get("init_lora_weights", True)).lower()
    if start.startswith(_REWRITING):
        raise RefusedError(
            f"the adapter was initialised with {start}, which changes the weights of the base model whenever it is "
            "loaded. Save it as a plain LoRA adapter first: peft's "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )


_REFUSED = {
    "layer_replication": "the base model would have other layers",
    "use_qalora": "its groups of inputs are averaged before A",
    "use_bdlora": "its factors are block-diagonal by position",
    "arrow_config": "a router mixes several adapters",
    "kasa_config": "it cuts singular values off the base model's weights",
    "monteclora_config": "it samples its weights",
    "velora_config": "its gradients depend on groups of inputs",
    "megatron_config": "its layers are Megatron's",
}

_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Settings:
    """A configuration, asked."""

    data: Data

    @property
    def root(self) -> bool:
        """Whether scalings are `alpha / sqrt(rank)`."""
        return bool(self.data.get("use_rslora"))

    def rank(self, key: str) -> int:
        """The rank of the adapter for a module or parameter."""
        return int(_of_pattern(self.data.get("rank_pattern"), key, self.data.get("r", 8)))

    def alpha(self, key: str) -> float:
        """Its alpha."""
        found: float = _of_pattern(self.data.get("alpha_pattern"), key, self.data.get("lora_alpha", 8))
        return found

    def scaling(self, key: str, rank: int) -> Scaling:
        """That of the adapter for `key`, of which the file says that it has this rank."""
        said = self.rank(key)
        if said != rank:
            raise CheckpointError(f"the adapter of {key} has rank {rank}, its adapter_config.json says {said}")
        return Scaling(self.alpha(key), rank, self.root)

    def modules(self, names: Iterable[str]) -> set[str]:
        """The modules among `names` that get an adapter."""
        return {name for name in names if self._reaches(name)}

    def _reaches(self, name: str) -> bool:
        targets = self.data.get("target_modules")
        if not name or not targets or self._is_excluded(name):
            return False
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return name in targets or (_ends_with_any(name, targets) and self._is_in_layer(name))

    def _is_excluded(self, name: str) -> bool:
        excluded = self.data.get("exclude_modules")
        if isinstance(excluded, str) and excluded and re.fullmatch(excluded, name):
            return True
        if excluded and not isinstance(excluded, str) and _ends_with_any(name, excluded):
            return True
        return any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in self.data.get("modules_to_save") or ())

    def _is_in_layer(self, name: str) -> bool:
        wanted = self.data.get("layers_to_transform")
        if wanted is None or wanted == []:
            return True
        lists = self.data.get("layers_pattern") or ()
        patterns = [lists] if isinstance(lists, str) else lists
        regexes = [rf"(?:^|.*?\.){one}\.(\d+)\." for one in patterns] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for one in regexes if (match := re.match(one, name))), None)
        return found is not None and int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)

    def parameters(self, names: Iterable[str]) -> set[str]:
        """The tensors among `names` that get an adapter of their own, not their module."""
        targets = self.data.get("target_parameters") or ()
        return {name for name in names if _ends_with_any(name, targets)}

    def saved(self, model: nn.Module) -> set[str]:
        """The tensors of `model` that are trained as a whole (`modules_to_save`)."""
        return {name for names in self.saved_modules(model).values() for name in names}

    def saved_modules(self, model: nn.Module) -> dict[str, list[str]]:
        """The modules of `model` that are trained as a whole, with their tensors."""
        ends = tuple(self.data.get("modules_to_save") or ())
        if not ends:
            return {}
        found = {path: module for path, module in model.named_modules(remove_duplicate=False) if path.endswith(ends)}
        return {path: [under(path, name) for name in module.state_dict()] for path, module in found.items()}


Value = TypeVar("Value")


def _of_pattern(patterns: Mapping[str, Value] | None, key: str, default: Value) -> Value:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return default


def _ends_with_any(name: str, suffixes: Collection[str]) -> bool:
    return name in suffixes or any(name.endswith(f".{suffix}") for suffix in suffixes)


def module_names(model: nn.Module) -> list[str]:
    """The names by which peft knows the modules of `model`: each once."""
    return [name for name, _ in model.named_modules() if name]


def parameter_names(model: nn.Module) -> list[str]:
    """The names by which peft knows the parameters of `model`."""
    return [under(path, leaf) for path, module in model.named_modules() for leaf in module._parameters]


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Wanted:
    """What a configuration has to say.

    Attributes:
        modules: that get an adapter.
        parameters: that get one of their own.
        scalings: for each of these.
        flipped: those of `modules` whose weight is `[in, out]`.
        saved: the tensors trained as a whole with their modules.
    """

    modules: frozenset[str]
    parameters: frozenset[str]
    scalings: Mapping[str, Scaling]
    flipped: frozenset[str]
    saved: frozenset[str]


def rewritten(data: Data, wanted: Wanted, model: nn.Module) -> dict[str, Any]:
    """`data`, changed as little as needed to say `wanted` of `model`. Raises `RefusedError` where it cannot."""
    new = dict(data)
    settings = Settings(data)
    if not _saves(settings, wanted, model):
        new["modules_to_save"] = _saving(wanted, model)
    names, parameters = module_names(model), parameter_names(model)
    if Settings(new).modules(names) != wanted.modules or settings.parameters(parameters) != wanted.parameters:
        new |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        new["target_modules"] = _suffixes(wanted.modules, names) or _any_of(wanted.modules)
        if wanted.parameters or data.get("target_parameters"):
            new["target_parameters"] = _suffixes(wanted.parameters, parameters) or sorted(wanted.parameters) or None
    new |= _numbers(data, wanted)
    flipped = bool(wanted.flipped) and len(wanted.flipped) == len(wanted.modules)
    if wanted.modules and flipped != bool(data.get("fan_in_fan_out")):
        new["fan_in_fan_out"] = flipped
    if new != data and isinstance(data.get("init_lora_weights"), str) and data["init_lora_weights"] != "gaussian":
        new["init_lora_weights"] = True  # its conditions (an even rank, say) no longer matter
    _check_parameters(new, wanted)
    return new


def says(data: Data, wanted: Wanted, model: nn.Module) -> bool:
    """Whether `data` says `wanted` of `model` as it is."""
    return rewritten(data, wanted, model) == dict(data)


def _suffixes(wanted: Collection[str], names: Sequence[str]) -> list[str]:
    """The shortest ends of names that reach exactly the `wanted` ones; none where some are ends of other names."""
    most = max((name.count(".") + 1 for name in wanted), default=0)
    for parts in range(1, most + 1):
        ends = {_end(name, parts) for name in wanted}
        if {name for name in names if _is_end_of(ends, name)} == set(wanted):
            return sorted(ends)
    return []


def _is_end_of(ends: Collection[str], name: str) -> bool:
    return any(_end(name, parts) in ends for parts in range(1, name.count(".") + 2))


def _any_of(names: Collection[str]) -> str | list[str]:
    """One expression for full names."""
    return "|".join(map(re.escape, sorted(names))) or []


def _end(name: str, parts: int) -> str:
    return ".".join(name.split(".")[-parts:])


def _numbers(data: Data, wanted: Wanted) -> dict[str, Any]:
    """Ranks and alphas."""
    ranks = {key: scaling.rank for key, scaling in wanted.scalings.items()}
    alphas = {key: scaling.alpha for key, scaling in wanted.scalings.items()}
    return {
        **_values(data, "r", "rank_pattern", ranks),
        **_values(data, "lora_alpha", "alpha_pattern", alphas),
    }


def _values(data: Data, default: str, patterns: str, wanted: Mapping[str, Value]) -> dict[str, Any]:
    """One default and patterns for the keys that have another value."""
    old = data.get(patterns) or {}
    used = all(any(re.match(rf"(.*\.)?({one})$", key) for key in wanted) for one in old)
    if not wanted or (used and all(_of_pattern(old, key, data[default]) == value for key, value in wanted.items())):
        return {}
    counts = Counter(wanted.values())
    usual = data[default] if data.get(default) in counts else counts.most_common(1)[0][0]
    return {default: usual, patterns: _patterns(wanted, usual)}


def _patterns(wanted: Mapping[str, Value], usual: Value) -> dict[str, Value]:
    most = max(key.count(".") + 1 for key in wanted)
    for parts in range(1, most + 1):
        values: dict[str, set[Value]] = {}
        for key, value in wanted.items():
            values.setdefault(_end(key, parts), set()).add(value)
        if all(len(found) == 1 for found in values.values()):
            found = {re.escape(end): value for end, (value,) in values.items() if value != usual}
            if all(_of_pattern(found, key, usual) == value for key, value in wanted.items()):
                return found
    return {f"^{re.escape(key)}": value for key, value in wanted.items() if value != usual}


def _saves(settings: Settings, wanted: Wanted, model: nn.Module) -> bool:
    """Whether exactly the wanted tensors are trained as a whole; a stand-in without tensors must not be wrapped."""
    return settings.saved(model) == wanted.saved and all(settings.saved_modules(model).values())


def _saving(wanted: Wanted, model: nn.Module) -> list[str] | None:
    """Modules that hold exactly the tensors trained as a whole."""
    if not wanted.saved:
        return None
    paths = sorted({name.rpartition(".")[0] for name in wanted.saved})
    settings = Settings({"modules_to_save": paths})
    if not _saves(settings, wanted, model):
        extra = sorted(settings.saved(model) ^ wanted.saved)
        raise RefusedError(
            "modules_to_save trains whole modules, and after the edit the trained tensors are not the whole of any: "
            f"{', '.join(extra[:3])} would be trained too"
        )
    return paths


def _check_parameters(data: Data, wanted: Wanted) -> None:
    if not wanted.parameters:
        return
    name = sorted(wanted.parameters)[0]
    for option in ("lora_dropout", "lora_bias", "use_dora", "fan_in_fan_out"):
        if data.get(option):
            advice = "; set it to 0 in adapter_config.json if the adapter is not trained any more"
            raise RefusedError(
                f"the adapter would change the parameter {name} itself, where peft has no {option}"
                + (advice if option == "lora_dropout" else "")
            )
