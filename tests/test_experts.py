"""Experts taken apart and put together: every way they are stacked, and everybody who must see their layers."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

import rewire
from rewire import experts, zoo
from rewire.errors import RefusedError
from rewire.experts import StackedExperts
from rewire.families import Refusal
from rewire.modules import StackedPart, StackedWeight, UnstackedExperts, UnsupportedUse
from rewire.plan import Cast, Freeze, Lora, Plan, Split, Stack, Unstack
from rewire.tensor_rules import run
from tiny import ids, output, same, snapshot, strengthen, tiny, tree

STACKED = (
    "mixtral", "phimoe", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "openai_privacy_filter", "llama4_text",
    "aria_text", "jetmoe", "dbrx", "nemotron_h", "longcat_flash", "inkling_text", "muse_spark_text",
)  # fmt: skip
SEPARATE = ("switch_transformers", "nllb-moe")


def inputs(model_type: str) -> dict[str, Tensor]:
    return {"input_ids": ids()} | ({"decoder_input_ids": ids(seed=2)} if model_type in SEPARATE else {})


def unstacked(model: nn.Module) -> list[UnstackedExperts]:
    return [module for module in model.modules() if isinstance(module, UnstackedExperts)]


def difference(first: Tensor, second: Tensor) -> float:
    first, second = first.detach().double(), second.detach().double()
    return float((first - second).abs().max() / first.abs().max())


def gradients(model: PreTrainedModel, model_type: str) -> dict[str, Tensor]:
    """Those of a loss that every output feature has a part in."""
    model.zero_grad()
    first = model(**inputs(model_type))[0]
    (first * torch.linspace(-1, 1, first.shape[-1])).pow(2).mean().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


# ---------------------------------------------------------------- the same mathematics


@pytest.mark.parametrize("model_type", [*STACKED, *SEPARATE])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_outputs_gradients_and_the_way_back(model_type: str, implementation: str) -> None:
    model = tiny(model_type)
    if getattr(model.config, "_experts_implementation", None) == "grouped_mm":  # the class has several
        model.config._experts_implementation = implementation
    elif implementation == "grouped_mm":
        pytest.skip("its experts have no other implementation")
    before, tensors, modules = output(model, **inputs(model_type)), snapshot(model), tree(model)
    wanted = gradients(model, model_type)
    model.zero_grad()

    receipt = rewire.apply_(model, Stack("@experts") if model_type in SEPARATE else Unstack("@experts"))

    assert difference(before, output(model, **inputs(model_type))) <= 1e-5
    moved, now = run(receipt.rules, wanted, torch), gradients(model, model_type)
    assert moved.keys() == now.keys()
    for name, gradient in moved.items():
        assert (gradient - now[name]).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9, name
    model.zero_grad()
    rewire.revert_(model)
    assert same(snapshot(model), tensors)
    assert tree(model) == modules
    assert torch.equal(output(model, **inputs(model_type)), before)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "longcat_flash", "switch_transformers"])
def test_the_proof_passes(model_type: str) -> None:
    before = tiny(model_type)
    after = copy.deepcopy(before)
    rewire.apply_(after, Stack("@experts") if model_type in SEPARATE else Unstack("@experts"))
    proof = rewire.prove(before, after, seeds=(0,))
    assert proof.passed, proof.summary()


def test_exchanged_gate_and_up_are_caught() -> None:
    before = tiny("mixtral")
    after = copy.deepcopy(before)
    rewire.apply_(after, Unstack("@experts"))
    for module in unstacked(after):
        for expert in module.experts:
            expert._modules["gate_proj"], expert._modules["up_proj"] = (
                expert._modules["up_proj"],
                expert._modules["gate_proj"],
            )
    proof = rewire.prove(before, after, seeds=(0,))
    wrong = {check.name.partition(" ")[0] for check in proof.checks if check.passed is False}
    assert {"weights", "outputs", "gradients"} <= wrong


@pytest.mark.parametrize("model_type", ["llama4_text", "aria_text", "mixtral"])
def test_the_shapes_alone_would_not_tell_the_orientation(model_type: str) -> None:
    """2 · intermediate = hidden: every tensor fits the other way round too."""
    model = tiny(model_type, intermediate_size=16)
    first = next(p for name, p in model.named_parameters() if name.endswith("gate_up_proj"))
    assert first.shape[1] == first.shape[2]
    before = output(model, input_ids=ids())
    rewire.apply_(model, Unstack("@experts"))
    assert difference(before, output(model, input_ids=ids())) <= 1e-6


def test_alternating_columns_become_gate_and_up() -> None:
    model = tiny("gpt_oss")
    stacked = model.layers[0].mlp.experts
    weight, bias = stacked.gate_up_proj.detach().clone(), stacked.gate_up_proj_bias.detach().clone()
    rewire.apply_(model, Unstack("layers.*.mlp.experts"))
    expert = model.layers[0].mlp.experts.get_submodule("2")
    assert torch.equal(expert.gate_proj.weight, weight[2, :, ::2].T)
    assert torch.equal(expert.up_proj.weight, weight[2, :, 1::2].T)
    assert torch.equal(expert.up_proj.bias, bias[2, 1::2])


def test_slices_that_no_expert_reads_are_kept() -> None:
    model = tiny("longcat_flash")
    whole = model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    rewire.apply_(model, Unstack("@experts"))
    (module,) = unstacked(model)
    assert len(whole) == 6
    assert len(module.experts) == 4
    assert torch.equal(module.gate_up_proj_surplus, whole[4:])


def test_other_tensors_and_attributes_stay_where_they_were() -> None:
    model = tiny("muse_spark_text")
    norm = model.layers[0].mlp.experts.post_expert_norm
    rewire.apply_(model, Unstack("@experts"))
    module = unstacked(model)[0]
    assert module.post_expert_norm is norm
    assert module.num_experts == 4
    assert module.config is model.config
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "longcat_flash", "jetmoe", "nemotron_h"])
@pytest.mark.parametrize("views", [False, True])
def test_who_asks_for_a_stacked_tensor_gets_it(model_type: str, views: bool) -> None:
    model = tiny(model_type)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    receipt = rewire.apply_(model, Unstack("@experts", views=views))
    for decision in receipt.decisions:
        module = model.get_submodule(decision.path)
        assert isinstance(module, UnstackedExperts)
        for name in (name for weight in module.weights for name in weight.tensors):
            assert torch.equal(getattr(module, name), before[f"{decision.path}.{name}"])


class Marked(nn.Module):
    """Its owner initialises the stacked tensor, as that of Qwen3-Omni does."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 6, 4))


def test_a_tensor_put_together_is_marked_as_its_parts_are() -> None:
    """Transformers marks loaded tensors; one that was not marked would be initialised."""
    module = UnstackedExperts(Marked(), [StackedWeight("up", ("up",), (6,), 4)], 2)
    first, second = (expert.get_submodule("up").weight for expert in module.experts)
    first._is_hf_initialized = True
    assert not hasattr(module.up, "_is_hf_initialized")
    second._is_hf_initialized = True
    assert module.up._is_hf_initialized


def test_training_mode_and_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny("openai_privacy_filter").to(dtype)
        model.config._experts_implementation = "eager"
        before = output(model, input_ids=ids())
        rewire.apply_(model.train(), Unstack("@experts"))
        assert all(module.training for module in unstacked(model))
        after = output(model.eval(), input_ids=ids())
        assert after.dtype == dtype
        assert difference(before, after) <= 2 * torch.finfo(dtype).eps


def test_autocast() -> None:
    model = tiny("qwen3_moe")
    model.config._experts_implementation = "eager"
    with torch.autocast("cpu", torch.bfloat16):
        before = output(model, input_ids=ids())
        rewire.apply_(model, Unstack("@experts"))
        assert torch.equal(output(model, input_ids=ids()), before)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("model_type", ["qwen2_moe", "phimoe", "dbrx", "longcat_flash", "nllb-moe"])
@pytest.mark.parametrize("layout", ["original", "edited"])
def test_saved_tensors(model_type: str, layout: str, tmp_path: Path) -> None:
    """In the original layout bit for bit those of the untouched model, by the names that the Hub uses."""
    model = tiny(model_type)
    model.save_pretrained(tmp_path / "untouched")
    untouched = load_file(tmp_path / "untouched" / "model.safetensors")
    edit = Stack("@experts") if model_type in SEPARATE else Unstack("@experts")
    loaded = rewire.load(tmp_path / "untouched", edit)
    rewire.save(loaded, tmp_path / layout, layout)
    again = rewire.load(tmp_path / layout)
    assert same(snapshot(again), snapshot(loaded))
    again.save_pretrained(tmp_path / "once more")
    for folder in ("once more", layout) if layout == "original" else ("once more",):
        written = load_file(tmp_path / folder / "model.safetensors")
        assert written.keys() == untouched.keys()
        assert all(torch.equal(tensor, untouched[name]) for name, tensor in written.items())


_FRESH = """
import sys, torch, rewire
sys.path.insert(0, sys.argv[2])
from tiny import ids, output
model = rewire.load(sys.argv[1])
print(type(model.layers[0].mlp.experts).__name__, repr(output(model, input_ids=ids()).double().sum().item()))
"""


def test_a_fresh_process_loads_the_edited_layout(tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    rewire.apply_(model, Unstack("@experts"))
    rewire.save(model, tmp_path / "edited", "edited")
    command = [sys.executable, "-c", _FRESH, str(tmp_path / "edited"), str(Path(__file__).parent)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert found[0] == "UnstackedExperts"
    assert float(found[1]) == pytest.approx(output(model, input_ids=ids()).double().sum().item(), rel=1e-5)


def test_a_state_dict_of_the_untouched_model_fits() -> None:
    model, other = tiny("mixtral"), tiny("mixtral", seed=1)
    rewire.apply_(model, Unstack("@experts"))
    model.load_state_dict(other.state_dict())
    assert difference(output(other, input_ids=ids()), output(model, input_ids=ids())) <= 1e-6


# ---------------------------------------------------------------- who must see the layers


def test_adapters_act() -> None:
    model = tiny("qwen3_moe")  # a type whose `gate_proj` peft would take for a part of a stacked tensor
    before = output(model, input_ids=ids())
    rewire.apply_(model, Plan([Unstack("@experts"), Lora(("gate_proj", "up_proj", "down_proj"), r=2)]))
    assert difference(before, output(model, input_ids=ids())) <= 1e-6
    model(input_ids=ids())[0].pow(2).mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    reached = {f"{part}.lora_B.default.weight" for part in ("gate_proj", "up_proj", "down_proj")}
    assert {".".join(name.split(".")[-4:]) for name in trained} == reached
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(0.1)
    assert difference(before, output(model, input_ids=ids())) > 1e-3


def test_adapters_from_outside_act_as_on_plain_weights() -> None:
    """An adapter merged into the linear layers is the same as the adapter beside them."""
    model = tiny("gpt_oss")
    rewire.apply_(model, Unstack("@experts"))
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=r".*experts\.\d+\.(gate|down)_proj", r=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    beside = output(adapted, input_ids=ids())
    merged = output(adapted.merge_and_unload(), input_ids=ids())
    assert difference(beside, merged) <= 1e-5


def test_hooks_and_modules_in_the_place_of_layers_are_honoured() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = tiny("mixtral")
    rewire.apply_(model, Unstack("@experts"))
    expert = unstacked(model)[0].get_submodule("0")
    seen: list[int] = []
    expert.up_proj.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    before = output(model, input_ids=ids())
    assert seen
    double = Doubled(32, 48, bias=False)
    double.weight = expert.up_proj.weight
    expert.up_proj = double
    assert difference(before, output(model, input_ids=ids())) > 1e-3


def test_single_experts_can_be_frozen() -> None:
    model = tiny("mixtral")
    rewire.apply_(model, Plan([Unstack("@experts"), Freeze("layers.*.mlp.experts.[0-1]")]))
    flags = {n: p.requires_grad for n, p in model.layers[0].mlp.experts.named_parameters()}
    assert {name for name, flag in flags.items() if not flag} == {name for name in flags if name[0] in "01"}
    with pytest.raises(RefusedError, match="gate_proj is frozen in some experts and trained in others"):
        rewire.apply_(model, Stack("@experts"))
    rewire.revert_(model)
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_tensors_give_frozen_layers() -> None:
    model = tiny("gpt_oss")
    model.layers[0].mlp.experts.gate_up_proj.requires_grad_(False)
    rewire.apply_(model, Unstack("@experts"))
    expert = model.layers[0].mlp.experts.get_submodule("1")
    assert not expert.gate_proj.weight.requires_grad
    assert not expert.up_proj.weight.requires_grad
    assert expert.gate_proj.bias.requires_grad
    assert expert.down_proj.weight.requires_grad


def test_layers_of_an_expert_can_be_split_up_further() -> None:
    """Later edits find the layers: another type for one projection, a join that is split again."""
    model = tiny("mixtral")
    before = output(model, input_ids=ids())
    plan = Plan([Unstack("@experts"), Cast("layers.*.mlp.experts.*.down_proj", dtype="float64")])
    rewire.apply_(model, plan)
    assert model.layers[1].mlp.experts.get_submodule("3.down_proj").weight.dtype == torch.float64
    rewire.revert_(model)
    assert torch.equal(output(model, input_ids=ids()), before)


# ---------------------------------------------------------------- views


def whole_of(module: UnstackedExperts) -> dict[str, int]:
    assert module.views is not None
    return {name: whole.data_ptr() for name, whole in module.views.wholes.items()}


@pytest.fixture(params=["mixtral", "gpt_oss", "dbrx", "longcat_flash"])
def viewed(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, dict[str, nn.Parameter]]:
    """A model whose experts are views, and the stacked parameters that it had."""
    model = tiny(request.param)
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "w1", "v1", "w2")
    before = {name: p for name, p in model.named_parameters() if name.endswith(names) and "expert" in name}
    rewire.apply_(model, Unstack("@experts", views=True))
    return model, before


def test_views_take_no_memory(viewed: tuple[PreTrainedModel, dict[str, nn.Parameter]]) -> None:
    model, before = viewed
    storages = {p.untyped_storage().data_ptr() for p in before.values()}
    layers = [p for module in unstacked(model) for _, p in module.named_parameters() if p.ndim > 0]
    own = [p for p in layers if p.untyped_storage().data_ptr() not in storages]
    assert sum(p.nbytes for p in own if p.ndim > 1) == 0
    assert {p.untyped_storage().data_ptr() for p in layers} >= storages


def test_views_keep_the_fast_way_while_nobody_looks() -> None:
    calls: list[type] = []

    def spy(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(self))
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, *args, **kwargs)

    ALL_EXPERTS_FUNCTIONS.register("spy", spy)
    try:
        model = tiny("mixtral")
        model.config._experts_implementation = "spy"
        before = output(model, input_ids=ids())
        kind = calls.pop()
        calls.clear()
        rewire.apply_(model, Unstack("@experts", views=True))
        assert torch.equal(output(model, input_ids=ids()), before)
        assert calls == [kind, kind]
        calls.clear()
        with torch.enable_grad():
            model(ids())
        assert calls == []
    finally:
        ALL_EXPERTS_FUNCTIONS._global_mapping.pop("spy", None)


def _hook(model: PreTrainedModel) -> Callable[[], None]:
    layer = unstacked(model)[0].get_submodule("1.down_proj")
    return layer.register_forward_hook(lambda module, args, out: None).remove


def _adapter(model: PreTrainedModel) -> Callable[[], None]:
    expert = unstacked(model)[0].get_submodule("1")
    plain, expert.down_proj = expert.down_proj, nn.Sequential(expert.down_proj)
    expert.down_proj.weight = plain.weight
    return lambda: setattr(expert, "down_proj", plain)


def _weight(model: PreTrainedModel) -> Callable[[], None]:
    layer = unstacked(model)[0].get_submodule("1.down_proj")
    view, layer.weight = layer.weight, nn.Parameter(layer.weight.clone())
    return lambda: setattr(layer, "weight", view)


@pytest.mark.parametrize("change", [_hook, _adapter, _weight])
def test_views_give_way_to_whoever_looks(change: Callable[[PreTrainedModel], Callable[[], None]]) -> None:
    model = tiny("mixtral")
    rewire.apply_(model, Unstack("@experts", views=True))
    with torch.no_grad():
        assert [module.reads_whole for module in unstacked(model)] == [True, True]
        back = change(model)
        assert [module.reads_whole for module in unstacked(model)] == [False, True]
        back()
        assert [module.reads_whole for module in unstacked(model)] == [True, True]


def test_values_written_through_a_view_are_the_whole_tensors(
    viewed: tuple[PreTrainedModel, dict[str, nn.Parameter]],
) -> None:
    model, _ = viewed
    module = unstacked(model)[0]
    part = module.weights[0].parts[0]
    before = output(model, input_ids=ids())
    with torch.no_grad():
        for expert in module.experts:
            expert.get_submodule(part).weight.mul_(3)
        assert module.reads_whole
        fast = output(model, input_ids=ids())
    slow = model(input_ids=ids())[0].detach()
    assert difference(fast, slow) <= 1e-5
    assert difference(before, fast) > 1e-3


def test_views_survive_copies_moves_and_pickles(viewed: tuple[PreTrainedModel, dict[str, nn.Parameter]]) -> None:
    model, _ = viewed
    before = output(model, input_ids=ids())
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float()]
    for twin in twins:
        assert torch.equal(output(twin, input_ids=ids()), before)
        assert whole_of(unstacked(twin)[0]) != whole_of(unstacked(model)[0])
        with torch.no_grad():
            assert all(module.reads_whole for module in unstacked(twin))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert all(module.reads_whole for module in unstacked(half))


def test_the_stacked_tensors_themselves_come_back(viewed: tuple[PreTrainedModel, dict[str, nn.Parameter]]) -> None:
    model, before = viewed
    rewire.revert_(model)
    after = dict(model.named_parameters())
    assert before
    assert all(after[name] is parameter for name, parameter in before.items())


def test_gradients_of_views_come_back_too() -> None:
    model = tiny("gpt_oss")
    wanted = gradients(model, "gpt_oss")
    model.zero_grad()
    rewire.apply_(model, Unstack("@experts", views=True))
    gradients(model, "gpt_oss")
    rewire.revert_(model)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            assert parameter.grad is not None
            assert (parameter.grad - wanted[name]).abs().max() <= 1e-5 * wanted[name].abs().max()


def test_gradients_collected_before_move_into_the_views() -> None:
    model = tiny("mixtral")
    wanted = gradients(model, "mixtral")
    rewire.apply_(model, Unstack("@experts", views=True))
    layer = unstacked(model)[0].get_submodule("2.up_proj")
    assert torch.equal(layer.weight.grad, wanted["layers.0.mlp.experts.gate_up_proj"][2, 48:])


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_moe"])  # while loading, and after loading
def test_views_of_a_loaded_model(model_type: str, tmp_path: Path) -> None:
    tiny(model_type).save_pretrained(tmp_path)
    model = rewire.load(tmp_path, Unstack("@experts", views=True))
    plain = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert all(module.reads_whole for module in unstacked(model))
    assert difference(output(plain, input_ids=ids()), output(model, input_ids=ids())) <= 1e-6


def test_training_views() -> None:
    """An optimiser steps on views as on any parameter, and the stacked tensor follows."""
    model = tiny("mixtral")
    twin = copy.deepcopy(model)
    rewire.apply_(model, Unstack("@experts", views=True))
    rewire.apply_(twin, Unstack("@experts"))
    for one in (model, twin):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        one(ids())[0].pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert difference(output(twin, input_ids=ids()), output(model, input_ids=ids())) <= 1e-6


# ---------------------------------------------------------------- putting together


def test_taken_apart_and_put_together_in_one_plan() -> None:
    model = tiny("gpt_oss")
    tensors, modules = snapshot(model), tree(model)
    rewire.apply_(model, Plan([Unstack("@experts"), Stack("layers.*.mlp.experts")]))
    assert tree(model) == modules
    assert same(snapshot(model), tensors)


@pytest.mark.parametrize("model_type", SEPARATE)
def test_separate_experts_become_slices(model_type: str) -> None:
    model = tiny(model_type)
    (container,) = [m for path, m in model.encoder.named_modules() if path.endswith("experts")]
    names = [name for name, child in container.named_children() if name.startswith("expert_")]
    layer = next(name for name, m in container.get_submodule(names[0]).named_children() if isinstance(m, nn.Linear))
    weights = [container.get_submodule(f"{name}.{layer}").weight.detach().clone() for name in names]
    rewire.apply_(model, Stack("@experts"))
    (after,) = [m for path, m in model.encoder.named_modules() if path.endswith("experts")]
    assert type(after) is type(container)
    assert list(after) == list(container)
    assert torch.equal(after.get_parameter(layer), torch.stack(weights))
    part = after.get_submodule(f"{names[2]}.{layer}")
    assert isinstance(part, StackedPart)
    assert torch.equal(part.weight, weights[2])
    assert (part.out_features, part.in_features) == tuple(weights[2].shape)


def test_a_stacked_model_can_be_trained() -> None:
    model = tiny("switch_transformers")
    rewire.apply_(model, Stack("@experts"))
    model(**inputs("switch_transformers"))[0].pow(2).mean().backward()
    whole = next(m for m in model.modules() if type(m).__name__ == "SwitchTransformersExperts").wi
    assert whole.shape == (4, 48, 32)
    assert whole.grad is not None
    assert whole.grad.abs().sum() > 0


class Mlps(nn.Module):
    """Experts in a list, as remote code has them."""

    def __init__(self, *experts: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([expert(x) for expert in self.experts]).sum(0)


def mlp(width: int = 6, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width, bias=bias), nn.ReLU(), nn.Linear(width, 4))


def test_a_list_of_experts() -> None:
    model = Mlps(mlp(), mlp(), mlp())
    x = torch.randn(5, 4)
    before, modules = model(x), tree(model)
    rewire.apply_(model, Stack("experts"))
    assert torch.equal(model(x), before)
    names = {name for name, _ in model.named_parameters()}
    assert names == {f"experts.stacked_{part}" for part in ("0", "0_bias", "2", "2_bias")}
    rewire.revert_(model)
    assert tree(model) == modules


@pytest.mark.parametrize(
    ("experts_of", "reason"),
    [
        (lambda: Mlps(mlp(), mlp(width=8)), "1 and 0 differ in shapes or types"),
        (lambda: Mlps(mlp(), mlp().half()), "1 and 0 differ in shapes or types"),
        (lambda: Mlps(mlp(), mlp().requires_grad_(False)), "1 and 0 differ in parameters that are trained"),
        (lambda: Mlps(mlp(), nn.Linear(4, 4)), "1 and 0 differ in class"),
        (lambda: Mlps(*[mlp()] * 2), "nothing to stack"),
        (lambda: Mlps(nn.ReLU(), nn.ReLU()), "nothing to stack"),
        (lambda: Mlps(nn.LayerNorm(4), nn.LayerNorm(4)), "has no linear layers"),
    ],
)
def test_experts_that_cannot_be_stacked(experts_of: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        rewire.apply_(experts_of(), Stack("experts"))


# ---------------------------------------------------------------- what is found


def test_what_is_found_in_mixtral() -> None:
    model = tiny("mixtral")
    first, _ = experts.stacked_experts(model)
    assert isinstance(first, StackedExperts)
    assert (first.path, first.count) == ("layers.0.mlp.experts", 4)
    assert first.parts == {"gate_proj": 48, "up_proj": 48, "down_proj": 32}
    assert "declares slices [out, in], gate rows before up rows" in first.evidence[0]


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "bert", "vit", "whisper", "llama"])
def test_models_without_experts(model_type: str) -> None:
    if model_type == "recurrent_gemma":
        model: nn.Module = tiny("llama")
        model.rg_lru = type("RecurrentGemmaRglru", (Blocks,), {})()
    else:
        model = tiny(model_type)
    assert list(experts.stacked_experts(model)) == []
    assert list(experts.separate_experts(model)) == []
    with pytest.raises(rewire.RewireError, match="matches no module"):
        rewire.apply_(model, Unstack("@experts"))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 6))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MoshiFlexibleLinear", "one linear map per codebook"),
        ("CsmCodebooksHead", "one output head per codebook"),
        ("XLNetRelativeAttention", "the projections of an attention"),
        ("Anything", "holds no stacked experts"),
    ],
)
def test_other_tensors_of_three_dimensions_are_called_by_their_name(name: str, reason: str) -> None:
    model = nn.ModuleDict({"block": type(name, (Blocks,), {})()})
    with pytest.raises(RefusedError, match=reason):
        rewire.apply_(model, Unstack("block"))


def _mixtral(change: Callable[[nn.Module], object]) -> PreTrainedModel:
    model = tiny("mixtral")
    change(model.layers[0].mlp.experts)
    return model


def _retype(module: nn.Module) -> None:
    module.down_proj = nn.Parameter(module.down_proj.to(torch.float8_e4m3fn), requires_grad=False)


def _reshape(module: nn.Module) -> None:
    module.down_proj = nn.Parameter(torch.zeros(4, 48, 32))


def _add_slices(module: nn.Module) -> None:
    module.gate_up_proj = nn.Parameter(torch.zeros(5, 96, 32))


def _replace_forward(module: nn.Module) -> None:
    module.forward = lambda *args: args[0]  # type: ignore[method-assign]


def _parametrise(module: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(module, "down_proj", nn.Identity())


def _unstack(module: nn.Module) -> None:
    module.__class__ = type("ParamWrapper", (type(module),), {})
    module.base_layer = nn.Identity()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_retype, "already quantised"),
        (_reshape, "contradict what the class says"),
        (_add_slices, "does not hold slices of 4 experts"),
        (_replace_forward, "forward was replaced"),
        (_parametrise, "computed from other"),
        (_unstack, "already adapted"),
    ],
)
def test_experts_that_somebody_has_changed(change: Callable[[nn.Module], object], reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        rewire.apply_(_mixtral(change), Unstack("layers.*.mlp.experts"))


def test_tied_experts_are_refused() -> None:
    model = tiny("mixtral")
    model.layers[1].mlp.experts.down_proj = model.layers[0].mlp.experts.down_proj
    with pytest.raises(RefusedError, match="is tied to"):
        rewire.apply_(model, Unstack("layers.0.mlp.experts"))


def test_experts_taken_apart_twice() -> None:
    model = tiny("mixtral")
    rewire.apply_(model, Unstack("@experts"))
    with pytest.raises(RefusedError, match="already edited by Rewire"):
        rewire.apply_(model, Unstack("layers.*.mlp.experts"))
    with pytest.raises(RefusedError, match="already edited by Rewire"):
        rewire.apply_(model, Split("layers.*.mlp.experts", into=("a", "b")))


def test_adapted_layers_are_not_stacked() -> None:
    model = tiny("mixtral")
    rewire.apply_(model, Plan([Unstack("@experts"), Lora("layers.0.mlp.experts.1.up_proj", r=2)]))
    with pytest.raises(RefusedError, match=r"1\.up_proj: already adapted"):
        rewire.apply_(model, Stack("@experts"))


def test_modules_of_their_own_with_the_same_tensors_are_edited_together() -> None:
    """The decoder of Diffusion Gemma holds the encoder's experts."""
    model = zoo.tiny_model("diffusion_gemma")
    before, tensors = snapshot(model), tree(model)
    receipt = rewire.apply_(model, Unstack("@experts"))
    assert len(receipt.decisions) == 2
    first, second = (
        model.get_submodule(f"{path}.layers.1.experts.3.up_proj") for path in ("encoder.language_model", "decoder")
    )
    assert first is not second
    assert first.weight is second.weight
    rewire.revert_(model)
    assert same(snapshot(model), before)
    assert tree(model) == tensors
    with pytest.raises(RefusedError, match="cannot have the same views"):
        rewire.apply_(model, Unstack("@experts", views=True))


def test_a_shared_module_is_edited_once() -> None:
    model = tiny("mixtral")
    model.layers[1].mlp.experts = model.layers[0].mlp.experts
    before = output(model, input_ids=ids())
    for views in (False, True):
        receipt = rewire.apply_(model, Unstack("@experts", views=views))
        assert len(receipt.decisions) == 1
        assert model.layers[1].mlp.experts is model.layers[0].mlp.experts
        assert difference(before, output(model, input_ids=ids())) <= 1e-6
        rewire.revert_(model)
        assert model.layers[1].mlp.experts is model.layers[0].mlp.experts
        assert torch.equal(output(model, input_ids=ids()), before)


# ---------------------------------------------------------------- classes that nothing is known of


def test_a_listed_class_outside_every_auto_model() -> None:
    """Step 3.7's experts clamp by a limit of their own and declare nothing."""
    config = Step3p7TextConfig(hidden_size=32, moe_intermediate_size=24, num_local_experts=4)
    stacked = Step3p7Experts(config, swiglu_limit=0.5)
    strengthen(stacked)
    model = nn.ModuleDict({"experts": stacked})
    x, index, share = torch.randn(7, 32), torch.randint(4, (7, 2)), torch.rand(7, 2)
    before = stacked(x, index, share)
    rewire.apply_(model, Unstack("experts"))
    assert difference(before, model["experts"](x, index, share)) <= 1e-6


class Moe(nn.Module):
    """Experts as a user might write them. `swap`: up before gate."""

    def __init__(
        self, *, transposed: bool, alternating: bool, swap: bool, bias: bool, middle: int = 6, act: Any = F.silu
    ) -> None:
        super().__init__()
        self.num_experts, self.act, self.swap = 4, act, swap
        self.transposed, self.alternating = transposed, alternating
        first, second = (8, 2 * middle), (middle, 8)
        shapes = (first, second) if transposed else (first[::-1], second[::-1])
        self.w13 = nn.Parameter(torch.randn(4, *shapes[0]))
        self.w2 = nn.Parameter(torch.randn(4, *shapes[1]))
        self.w13_bias = nn.Parameter(torch.randn(4, 2 * middle)) if bias else None

    def forward(self, x: Tensor, index: Tensor, share: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, choice = torch.where(index == expert)
            w13, w2 = self.w13[expert], self.w2[expert]
            both = x[token] @ w13 if self.transposed else F.linear(x[token], w13)
            if self.w13_bias is not None:
                both = both + self.w13_bias[expert]
            gate, up = (both[..., ::2], both[..., 1::2]) if self.alternating else both.chunk(2, dim=-1)
            gate, up = (up, gate) if self.swap else (gate, up)
            out = self.act(gate) * up
            out = out @ w2 if self.transposed else F.linear(out, w2)
            result.index_add_(0, token, out * share[token, choice, None])
        return result


def _flags() -> Iterator[dict[str, bool]]:
    for number in range(16):
        names = ("transposed", "alternating", "swap", "bias")
        yield {name: bool(number >> place & 1) for place, name in enumerate(names)}


@pytest.mark.parametrize("flags", list(_flags()), ids=lambda flags: "-".join(name for name, on in flags.items() if on))
@pytest.mark.parametrize("middle", [6, 4, 8])  # 4: square whichever way it lies
def test_an_unknown_class_is_tried(flags: dict[str, bool], middle: int) -> None:
    moe = Moe(**flags, middle=middle)
    model = nn.ModuleDict({"experts": moe})
    with torch.no_grad():
        apart = {False: moe.w13.mT.clone() if flags["transposed"] else moe.w13.clone()}[False]
    rows = (
        slice(int(flags["swap"]), None, 2)
        if flags["alternating"]
        else slice(middle * flags["swap"], middle * (1 + flags["swap"]))
    )
    x, index, share = torch.randn(7, 8), torch.randint(4, (7, 2)), torch.rand(7, 2)
    before = moe(x, index, share)
    rewire.apply_(model, Unstack("experts"))
    assert torch.equal(model["experts"].get_submodule("3.gate_proj").weight, apart[3, rows])
    assert difference(before, model["experts"](x, index, share)) <= 1e-6
    rewire.revert_(model)
    assert torch.equal(moe(x, index, share), before)


def test_an_unknown_class_that_leaves_a_choice_is_refused() -> None:
    bilinear = Moe(transposed=False, alternating=False, swap=False, bias=False, act=lambda gate: gate)
    with pytest.raises(RefusedError, match="which rows of w13 are gate and which up"):
        rewire.apply_(nn.ModuleDict({"experts": bilinear}), Unstack("experts"))


def test_an_unknown_class_that_does_something_else_is_refused() -> None:
    class Odd(Moe):
        def forward(self, x: Tensor, index: Tensor, share: Tensor) -> Tensor:
            return x + self.w13.sum()

    odd = Odd(transposed=False, alternating=False, swap=False, bias=False)
    with pytest.raises(RefusedError, match="not use them in a way that is understood"):
        rewire.apply_(nn.ModuleDict({"experts": odd}), Unstack("experts"))
    (found,) = experts.stacked_experts(nn.ModuleDict({"experts": odd}))
    assert isinstance(found, Refusal)


def test_what_a_parent_class_declares_is_not_said_of_another_forward() -> None:
    model = tiny("mixtral")
    kind = type(model.layers[0].mlp.experts)

    class Mine(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, index: Tensor, share: Tensor) -> Tensor:
            up, gate = torch.einsum("th,eih->tei", x, self.gate_up_proj).chunk(2, -1)
            return torch.einsum("tei,ehi->th", up * gate, self.down_proj)

    model.layers[0].mlp.experts.__class__ = Mine
    with pytest.raises(RefusedError, match="is not known"):
        rewire.apply_(model, Unstack("layers.0.mlp.experts"))


# ---------------------------------------------------------------- uses that are not understood

UP = StackedWeight("up", ("up",), (6,), 4, bias="up_bias")
USES: dict[str, Callable[[Any, Tensor], Any]] = {
    "the wrong way round": lambda self, x: x @ self.up[0],
    "another operation": lambda self, x: torch.exp(self.up[0]),
    "on the left": lambda self, x: self.up[0] @ x.T,
    "the left of matmul": lambda self, x: torch.matmul(self.up[0], x.T),
    "elements": lambda self, x: self.up[0].sum(),
    "several at once": lambda self, x: self.up[0:2],
    "some of them": lambda self, x: self.up[torch.tensor([0, 1])],
    "none such": lambda self, x: self.up[5],
    "a bias that is forgotten": lambda self, x: F.linear(x, self.up[0]),
    "a bias that is forgotten for one": lambda self, x: F.linear(x, self.up[0]) + F.linear(x, self.up[1]),
    "a bias of another": lambda self, x: F.linear(x, self.up[0]) + self.up_bias[1],
    "a bias after something": lambda self, x: F.linear(x, self.up[0]).relu() + self.up_bias[0],
    "a bias twice": lambda self, x: F.linear(x, self.up[0]) + self.up_bias[0] + self.up_bias[0],
    "a bias of all": lambda self, x: F.linear(x, self.up[0]) + self.up_bias,
    "a bias halved": lambda self, x: F.linear(x, self.up[0]) + self.up_bias[0] / 2,
    "another bias": lambda self, x: F.linear(x, self.up[0], torch.zeros(6)),
    "a weight of its own": lambda self, x: F.linear(x, torch.zeros(6, 4), self.up_bias[0]),
    "another view": lambda self, x: self.up.view(12, 4),
    "an exchange with the experts": lambda self, x: self.up.transpose(0, 1),
    "a device": lambda self, x: self.up[0].to("cpu"),
}


class Used(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 6, 4))
        self.up_bias = nn.Parameter(torch.randn(2, 6))
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def apart(use: Callable[[Any, Tensor], Any]) -> tuple[Used, UnstackedExperts]:
    used = Used(use)
    module = UnstackedExperts(used, [UP], 2)
    for number, expert in enumerate(module.experts):
        expert.up.weight = nn.Parameter(used.up[number].detach().clone())
        expert.up.bias = nn.Parameter(used.up_bias[number].detach().clone())
    return used, module


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_a_use_that_is_not_understood_raises(use: Callable[[Any, Tensor], Any]) -> None:
    _, module = apart(use)
    with pytest.raises((UnsupportedUse, TypeError)):
        module(torch.randn(3, 4))


UNDERSTOOD: dict[str, Callable[[Any, Tensor], Any]] = {
    "linear with its bias": lambda self, x: F.linear(x, self.up[1], self.up_bias[1]),
    "keywords": lambda self, x: F.linear(x, weight=self.up[0], bias=self.up_bias[0]),
    "transposed product": lambda self, x: x @ self.up[1].T + self.up_bias[1],
    "transposed stack": lambda self, x: x @ self.up.transpose(1, 2)[0] + self.up_bias[0],
    "permuted": lambda self, x: torch.mm(x, self.up.permute(0, 2, 1)[0]).add(self.up_bias[0]),
    "bias on the left": lambda self, x: self.up_bias[0] + x.matmul(self.up[0].mT),
    "in place": lambda self, x: torch.matmul(x, self.up[0].t()).__iadd__(self.up_bias[0]),
    "types": lambda self, x: x.double() @ self.up[0].double().T + self.up_bias[0].double(),
    "shape": lambda self, x: x.new_ones(self.up.shape[0], len(self.up), self.up.size(2), *self.up[0].shape),
    "device and type": lambda self, x: torch.zeros(self.up.ndim, dtype=self.up.dtype, device=self.up.device),
}


@pytest.mark.parametrize("use", UNDERSTOOD.values(), ids=UNDERSTOOD.keys())
def test_uses_that_are_understood(use: Callable[[Any, Tensor], Any]) -> None:
    used, module = apart(use)
    x = torch.randn(3, 4)
    torch.testing.assert_close(module(x), used(x))


def test_all_experts_at_once() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.up.mT) + x @ self.up.transpose(-1, -2)

    dense = Dense()
    strengthen(dense)
    x = torch.randn(2, 3, 4)
    before = dense(x)
    model = nn.ModuleDict({"shared_experts": dense})
    module = UnstackedExperts(dense, [StackedWeight("up", ("up",), (6,), 4)], 2)
    for number, expert in enumerate(module.experts):
        expert.up.weight = nn.Parameter(dense.up[number].detach())
    torch.testing.assert_close(module(x), before)
    with pytest.raises(UnsupportedUse):
        module(torch.randn(3, 3, 4))
    assert isinstance(model, nn.Module)
