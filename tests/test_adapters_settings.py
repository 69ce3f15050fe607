"""`adapter_config.json` is read as peft reads it, and a rewritten one reaches what it should."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from rewire.adapters.scaling import Scaling
from rewire.adapters.settings import Settings, Wanted, check_kind, module_names, rewritten, says
from rewire.errors import CheckpointError, RefusedError

NAMES = [
    f"{root}{layers}.{number}.{child}"
    for root in ("", "model.", "model.vision.")
    for layers in ("layers", "h")
    for number in (0, 1, 11)
    for child in ("attn.q", "attn.qkv.q", "mlp.experts.1.up", "attn")
]
PARTS = ["q", "attn.q", "up", "qkv.q", "layers.1.attn.q", "model.layers.0.attn.q", "experts.1.up", "attn"]

configs = st.fixed_dictionaries(
    {
        "target_modules": st.lists(st.sampled_from(PARTS), min_size=1, unique=True)
        | st.sampled_from([r".*\.q", r"model\..*attn\.q", r"(?:.*\.)?(?:q|up)"]),
        "exclude_modules": st.none() | st.lists(st.sampled_from(PARTS), max_size=2) | st.just(r".*\.11\..*"),
        "modules_to_save": st.none() | st.just(["qkv"]),
    },
    optional={
        "layers_to_transform": st.none() | st.integers(0, 1) | st.lists(st.sampled_from([0, 1, 11])),
        "layers_pattern": st.none() | st.sampled_from(["h", "layers", ["h", "layers"]]),
    },
)


@given(configs)
def test_modules_are_matched_as_peft_matches_them(data: dict[str, Any]) -> None:
    if isinstance(data["target_modules"], str) or data.get("layers_to_transform") is None:
        data = {key: value for key, value in data.items() if not key.startswith("layers")}
    config = LoraConfig(**data)
    reached = {name for name in NAMES if _reached(config, name)}
    assert Settings(data).modules(NAMES) == reached


def _reached(config: LoraConfig, name: str) -> bool:
    found = check_target_module_exists(config, name)
    return bool(found) and type(found).__name__ != "_ExcludedModule"


@given(st.dictionaries(st.sampled_from([*PARTS, r"layers\.\d+\.attn\.q", "^model.layers.0.attn.q"]), st.integers(1, 9)))
def test_ranks_are_found_as_peft_finds_them(patterns: dict[str, int]) -> None:
    settings = Settings({"r": 100, "rank_pattern": patterns})
    for name in NAMES:
        assert settings.rank(name) == patterns.get(get_pattern_key(patterns.keys(), name), 100)


def tree(*paths: str) -> nn.Module:
    root = nn.Module()
    for path in paths:
        current = root
        for leaf in path.split("."):
            if leaf not in current._modules:
                current.add_module(leaf, nn.Module())
            current = current.get_submodule(leaf)
        current.weight = nn.Parameter(current.__dict__.get("weight", nn.Linear(1, 1).weight.data))
    return root


MODEL = tree(*NAMES)


@given(st.sets(st.sampled_from(NAMES), min_size=1), st.data())
def test_a_rewritten_configuration_says_what_is_wanted(modules: set[str], data: st.DataObject) -> None:
    ranks = {name: data.draw(st.sampled_from([2, 4])) for name in sorted(modules)}
    alphas = {name: data.draw(st.sampled_from([2, 8])) for name in sorted(modules)}
    wanted = Wanted(
        frozenset(modules),
        frozenset(),
        {name: Scaling(alphas[name], ranks[name]) for name in modules},
        frozenset(),
        frozenset(),
    )
    old = {"r": 4, "lora_alpha": 8, "target_modules": ["q"], "exclude_modules": None, "fan_in_fan_out": False}
    new = rewritten(old, wanted, MODEL)
    settings = Settings(new)
    assert settings.modules(module_names(MODEL)) == modules
    assert {name: settings.rank(name) for name in modules} == ranks
    assert {name: settings.alpha(name) for name in modules} == alphas
    config = LoraConfig(target_modules=new["target_modules"])
    assert {name for name in module_names(MODEL) if _reached(config, name)} == modules
    assert says(new, wanted, MODEL)


def test_names_are_as_short_as_they_may_be() -> None:
    model = tree("a.0.q", "a.1.q", "b.0.q", "a.0.v")
    wanted = Wanted(frozenset({"a.0.q", "a.1.q", "b.0.q"}), frozenset(), {}, frozenset(), frozenset())
    assert rewritten({"target_modules": ["x"]}, wanted, model)["target_modules"] == ["q"]
    some = Wanted(frozenset({"a.0.q", "b.0.q"}), frozenset(), {}, frozenset(), frozenset())
    assert rewritten({"target_modules": ["x"]}, some, model)["target_modules"] == ["0.q"]


def test_modules_that_are_saved_whole_have_to_stay_whole() -> None:
    model = tree("a.q", "a.v", "b.q")
    wanted = Wanted(frozenset(), frozenset(), {}, frozenset(), frozenset({"a.q.weight"}))
    assert rewritten({"modules_to_save": ["x"]}, wanted, model)["modules_to_save"] == ["a.q"]
    part = tree("deep.a.q", "a.q")
    with pytest.raises(RefusedError, match=r"deep\.a\.q"):
        rewritten({"modules_to_save": ["x"]}, wanted, part)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"peft_type": "IA3"}, "of type IA3"),
        ({"peft_type": "LOHA"}, "of type LOHA"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"peft_type": "LORA", "init_lora_weights": "olora"}, "changes the weights of the base model"),
        ({"peft_type": "LORA", "layer_replication": [[0, 2]]}, "layer_replication"),
        ({"peft_type": "LORA", "use_qalora": True}, "use_qalora"),
    ],
)
def test_other_kinds_are_refused_by_name(data: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        check_kind(data)


def test_a_rank_that_the_configuration_does_not_say() -> None:
    with pytest.raises(CheckpointError, match=r"has rank 3, its adapter_config.json says 4"):
        Settings({"r": 4, "lora_alpha": 8}).scaling("a.q", 3)


@pytest.mark.parametrize("option", ["lora_dropout", "use_dora", "lora_bias"])
def test_parameters_take_no_options_that_peft_lacks(option: str) -> None:
    model = tree("moe")
    wanted = Wanted(frozenset(), frozenset({"moe.weight"}), {"moe.weight": Scaling(8, 4)}, frozenset(), frozenset())
    with pytest.raises(RefusedError, match=f"moe.weight itself, where peft has no {option}"):
        rewritten({"r": 4, "lora_alpha": 8, "target_modules": [], option: 0.1}, wanted, model)
