"""A proof passes right edits and catches wrong ones. All edits here are made by hand."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import rewire
from rewire.plan import Pack
from rewire.proof import Proof, prove
from rewire.tensor_rules import JoinRows, Rename, Shape, SplitRows, Step, invert, run, visible
from test_proof_models import TEXT, build, sam_config

Q, K, V = "q", "k", "v"


class SplitProjection(nn.Module):
    """A fused projection as parts, giving what the fused one gave. `order` plants a mistake."""

    def __init__(self, fused: nn.Linear, sizes: dict[str, int], groups: int = 1, order: tuple[str, ...] = ()) -> None:
        super().__init__()
        for name, size in sizes.items():
            self.add_module(name, nn.Linear(fused.in_features, size, bias=fused.bias is not None))
        self.order = order or tuple(sizes)
        self.groups = groups

    def forward(self, hidden: Tensor) -> Tensor:
        parts = [self.get_submodule(name)(hidden) for name in self.order]
        grouped = [part.unflatten(-1, (self.groups, -1)) for part in parts]
        return torch.cat(grouped, dim=-1).flatten(-2)


def split_rules(
    path: str, sizes: dict[str, int], groups: int = 1, leaves: tuple[str, ...] = ("weight", "bias")
) -> list[Step]:
    parts = tuple(sizes)
    return [
        SplitRows(f"{path}.{leaf}", tuple(f"{path}.{part}.{leaf}" for part in parts), tuple(sizes.values()), groups)
        for leaf in leaves
    ]


Maker = Callable[[nn.Linear], nn.Module]


def split_everywhere(
    before: nn.Module, leaf: str, sizes: dict[str, int], make: Maker, groups: int = 1
) -> tuple[nn.Module, list[Step]]:
    """A copy of `before` with every module called `leaf` replaced, and filled as the rules say."""
    after = copy.deepcopy(before)
    rules: list[Step] = []
    for path, module in list(after.named_modules()):
        if path.rpartition(".")[2] == leaf and isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(after.get_submodule(parent), name, make(module))
            leaves = ("weight", "bias") if module.bias is not None else ("weight",)
            rules += split_rules(path, sizes, groups, leaves)
    fill(before, after, rules)
    return after, rules


def fill(before: nn.Module, after: nn.Module, rules: list[Step]) -> None:
    """Gives `after` the values that the rules make of those of `before`."""
    state = dict(before.named_parameters(remove_duplicate=False))
    mapped = visible(run(rules, state, torch))
    with torch.no_grad():
        for name, parameter in after.named_parameters(remove_duplicate=False):
            parameter.copy_(mapped[name])


SAM_SIZES = {Q: 32, K: 32, V: 32}


def tiny_sam(scale: float = 0.3) -> nn.Module:
    """SAM with weights that matter (its own initialisation gives embeddings of 1e-19)."""
    config = sam_config()
    config.vision_config.initializer_range = 0.3
    model = build(lambda: tf.SamModel(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=scale)
    return model


def lively(name: str, **options: Any) -> nn.Module:
    """A tiny model with weights that matter."""
    model = build(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.3 if parameter.ndim > 1 else 0.2))
    return model


def failed(proof: Proof) -> set[str]:
    """The subjects of the checks that failed."""
    return {check.name.partition(" · ")[0] for check in proof.failures}


# ---------------------------------------------------------------- right edits


def test_an_untouched_copy_passes() -> None:
    before = build("bert")
    proof = prove(before, copy.deepcopy(before))
    assert proof.passed, proof.summary()
    assert proof.max_difference == 0
    assert proof.first_divergence is None


def test_sam_with_split_qkv_passes() -> None:
    before = tiny_sam()
    after, rules = split_everywhere(before, "qkv", SAM_SIZES, lambda fused: SplitProjection(fused, SAM_SIZES))
    proof = prove(before, after, rules=rules)
    assert proof.passed, proof.summary()
    assert {"weights", "round trip", "sensitivity"} <= {check.name for check in proof.checks}


NEOX_SIZES = {Q: 32, K: 32, V: 32}


def neox_split(groups: int) -> tuple[nn.Module, nn.Module, list[Step]]:
    before = lively("gpt-neox")
    make = functools.partial(SplitProjection, sizes=NEOX_SIZES, groups=groups)
    after, rules = split_everywhere(before, "query_key_value", NEOX_SIZES, make, groups)
    return before, after, rules


def test_neox_with_heads_read_as_they_lie_passes() -> None:
    before, after, rules = neox_split(groups=4)
    proof = prove(before, after, rules=rules)
    assert proof.passed, proof.summary()


class JoinedPart(nn.Module):
    """One part of a joined projection; holds no tensors of its own."""

    def __init__(self, joined: nn.Linear, start: int, stop: int) -> None:
        super().__init__()
        self.joined = (joined,)
        self.rows = slice(start, stop)

    def forward(self, hidden: Tensor) -> Tensor:
        joined = self.joined[0]
        bias = None if joined.bias is None else joined.bias[self.rows]
        return nn.functional.linear(hidden, joined.weight[self.rows], bias)


def join(after: nn.Module, path: str, parts: tuple[str, ...], name: str) -> list[Step]:
    """Joins linears below `path` by hand; gives the rules. The joined one is filled by the caller."""
    parent = after.get_submodule(path)
    modules = [parent.get_submodule(part) for part in parts]
    sizes = tuple(int(module.out_features) for module in modules)  # type: ignore[arg-type]
    has_bias = modules[0].bias is not None
    joined = nn.Linear(int(modules[0].in_features), sum(sizes), bias=has_bias)  # type: ignore[arg-type]
    setattr(parent, name, joined)
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        setattr(parent, part, JoinedPart(joined, start, start + size))
        start += size
    leaves = ("weight", "bias") if has_bias else ("weight",)
    return [
        JoinRows(f"{path}.{name}.{leaf}", tuple(f"{path}.{part}.{leaf}" for part in parts), sizes) for leaf in leaves
    ]


def test_bert_with_joined_qkv_passes() -> None:
    before = lively("bert")
    after = copy.deepcopy(before)
    rules = [
        step
        for layer in range(2)
        for step in join(after, f"encoder.layer.{layer}.attention.self", ("query", "key", "value"), "qkv")
    ]
    fill(before, after, rules)
    proof = prove(before, after, rules=rules)
    assert proof.passed, proof.summary()


class Renamed(nn.Module):
    """What stood under `dense`, under another name."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.projection = dense

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.projection(hidden)
        return result


def test_renamed_tensors_pass() -> None:
    before = lively("bert")
    after = copy.deepcopy(before)
    pooler = after.get_submodule("pooler")
    pooler.dense = Renamed(pooler.get_submodule("dense"))
    rules = [Rename(f"pooler.dense.{leaf}", f"pooler.dense.projection.{leaf}") for leaf in ("weight", "bias")]
    proof = prove(before, after, rules=rules)
    assert proof.passed, proof.summary()
    assert "2 kinds of tensors" in next(check.detail for check in proof.checks if check.name == "sensitivity")


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_at_initialisation_passes(use_dora: bool) -> None:
    peft = pytest.importorskip("peft")
    before = lively("bert")
    config = peft.LoraConfig(target_modules=["query", "value"], use_dora=use_dora)
    after = peft.get_peft_model(copy.deepcopy(before), config)
    proof = prove(before, after, promise="additive")
    assert proof.passed, proof.summary()
    assert "additional" in next(check.detail for check in proof.checks if check.name == "weights")


def test_lora_that_acts_does_not_pass() -> None:
    peft = pytest.importorskip("peft")
    before = lively("bert")
    config = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    proof = prove(before, peft.get_peft_model(copy.deepcopy(before), config), promise="additive")
    assert "outputs" in failed(proof)


def test_tied_weights_are_no_obstacle() -> None:
    before = lively("gpt2")
    assert before.get_output_embeddings().weight is before.get_input_embeddings().weight  # type: ignore[operator]
    assert prove(before, copy.deepcopy(before)).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_pass_right_edits(dtype: torch.dtype) -> None:
    before = tiny_sam().to(dtype)
    after, rules = split_everywhere(before, "qkv", SAM_SIZES, lambda fused: SplitProjection(fused, SAM_SIZES).to(dtype))
    proof = prove(before, after, rules=rules)
    assert proof.passed, proof.summary()


# ---------------------------------------------------------------- wrong edits


def test_exchanged_q_and_k_are_caught() -> None:
    before = tiny_sam()
    make = functools.partial(SplitProjection, sizes=SAM_SIZES, order=(K, Q, V))
    after, rules = split_everywhere(before, "qkv", SAM_SIZES, make)
    proof = prove(before, after, rules=rules)
    assert "outputs" in failed(proof)
    assert not {"weights", "round trip"} & failed(proof)
    assert proof.first_divergence is not None
    assert proof.first_divergence.path == "vision_encoder.layers.0.attn.qkv"
    assert proof.first_divergence.kind == "Linear"
    assert proof.first_divergence.kind_after == "SplitProjection"


def test_heads_read_as_blocks_are_caught() -> None:
    """The layout mistake that passes every check of keys, shapes and bytes."""
    before, wrong, rules = neox_split(groups=1)
    for module in wrong.modules():
        if isinstance(module, SplitProjection):
            module.groups = 4  # as the attention expects it, whatever the rules did
    proof = prove(before, wrong, rules=rules)
    assert not {"weights", "round trip"} & failed(proof)
    assert "outputs" in failed(proof)


def test_neox_whose_parts_are_taken_for_q_k_v_is_caught() -> None:
    """A split that is consistent in itself, and an attention that uses its parts as q, k and v."""
    before, after, rules = neox_split(groups=1)
    for module in after.modules():
        if isinstance(module, SplitProjection):
            module.forward = per_head(module)  # type: ignore[method-assign]
    proof = prove(before, after, rules=rules)
    assert failed(proof) >= {"outputs", "gradients"}
    assert "round trip" not in failed(proof)


def per_head(module: SplitProjection) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        parts = [module.get_submodule(name)(hidden).unflatten(-1, (4, -1)) for name in (Q, K, V)]
        return torch.cat(parts, dim=-1).flatten(-2)

    return forward


class Forgetful(SplitProjection):
    """Has a bias for v and does not use it."""

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = (self.get_submodule(name) for name in (Q, K, V))
        return torch.cat([q(hidden), k(hidden), hidden @ v.weight.T], dim=-1)  # type: ignore[operator]


@pytest.mark.parametrize("bias", [0.3, 0.0], ids=["biases that matter", "biases of zero"])
def test_a_forgotten_bias_is_caught(bias: float) -> None:
    before = tiny_sam(scale=bias)
    after, rules = split_everywhere(before, "qkv", SAM_SIZES, lambda fused: Forgetful(fused, SAM_SIZES))
    proof = prove(before, after, rules=rules)
    assert not proof.passed
    assert "outputs" in {name.removeprefix("strong weights: ") for name in failed(proof)} or "gradients" in failed(
        proof
    )


def test_a_forgotten_bias_of_zero_is_caught_without_gradients() -> None:
    before = tiny_sam(scale=0.0)
    after, rules = split_everywhere(before, "qkv", SAM_SIZES, lambda fused: Forgetful(fused, SAM_SIZES))
    proof = prove(before, after, rules=rules, gradients=False)
    assert "strong weights: outputs" in failed(proof)
    assert "outputs" not in failed(proof)


def test_a_forgotten_layer_is_caught() -> None:
    before = tiny_sam()
    after, rules = split_everywhere(before, "qkv", SAM_SIZES, lambda fused: SplitProjection(fused, SAM_SIZES))
    torch.manual_seed(3)
    for part in after.get_submodule("vision_encoder.layers.1.attn.qkv").children():
        part.reset_parameters()  # type: ignore[operator]
    proof = prove(before, after, rules=rules)
    assert {"weights", "round trip", "outputs"} <= failed(proof)
    assert proof.first_divergence is not None
    assert proof.first_divergence.path == "vision_encoder.layers.1.attn.qkv"


def test_random_weights_are_caught_and_counted() -> None:
    before = tiny_sam()
    after, rules = split_everywhere(before, "qkv", SAM_SIZES, lambda fused: SplitProjection(fused, SAM_SIZES))
    torch.manual_seed(3)
    for module in after.modules():
        if isinstance(module, SplitProjection):
            for part in module.children():
                part.reset_parameters()  # type: ignore[operator]
    proof = prove(before, after, rules=rules)
    weights = next(check for check in proof.checks if check.name == "weights")
    assert not weights.passed
    assert "12 differ" in weights.detail
    assert weights.value > 0.1


class EqualThirds(JoinRows):
    """A join of uneven parts whose way back cuts equal ones."""

    def inverse(self) -> SplitRows:
        size = sum(self.sizes) // len(self.parts)
        return SplitRows(self.whole, self.parts, (size,) * len(self.parts))


def test_a_join_that_comes_back_in_equal_thirds_is_caught() -> None:
    config = tf.LlamaConfig(**{**TEXT, "num_attention_heads": 8, "num_key_value_heads": 2})
    before = build(lambda: tf.LlamaForCausalLM(config))
    after = copy.deepcopy(before)
    rules: list[Step] = []
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn"
        rules += join(after, path, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
    fill(before, after, rules)
    assert prove(before, after, rules=rules).passed
    wrong = [EqualThirds(step.whole, step.parts, step.sizes) for step in rules if isinstance(step, JoinRows)]
    proof = prove(before, after, rules=wrong)
    assert failed(proof) == {"round trip"}
    assert "6 differ" in proof.failures[0].detail
    assert prove(before, after, rules=wrong, round_trip=False).passed


class Scaled(nn.Module):
    """Multiplies what another module gives."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner = (inner,)
        self.weight = inner.weight
        self.bias = inner.bias
        self.factor = factor

    def forward(self, *args: Any) -> Tensor:
        result: Tensor = self.inner[0](*args) * self.factor
        return result


def test_a_residual_scale_off_by_a_thousandth_is_caught() -> None:
    before = lively("bert")
    after = copy.deepcopy(before)
    layer = after.get_submodule("encoder.layer.1.output")
    layer.dense = Scaled(layer.dense, 1.001)  # type: ignore[arg-type]
    proof = prove(before, after)
    assert {"outputs", "gradients"} <= failed(proof)
    assert proof.first_divergence is not None
    assert proof.first_divergence.path == "encoder.layer.1.output.dense"
    assert 1e-5 < proof.max_difference < 1e-2


class Detached(SplitProjection):
    """Right values; no gradient reaches k."""

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = (self.get_submodule(name)(hidden) for name in (Q, K, V))
        return torch.cat([q, k.detach(), v], dim=-1)


def test_a_wrong_gradient_alone_is_caught() -> None:
    before = tiny_sam()
    after, rules = split_everywhere(before, "qkv", SAM_SIZES, lambda fused: Detached(fused, SAM_SIZES))
    proof = prove(before, after, rules=rules)
    assert failed(proof) == {"gradients"}
    assert ".k.weight" in proof.failures[0].detail
    assert proof.first_divergence is None
    assert prove(before, after, rules=rules, gradients=False).passed


def with_padding_changed(before: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy whose last hidden state is changed where the mask is zero."""
    after = copy.deepcopy(before)
    inner = after.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            hidden = result.last_hidden_state
            result["last_hidden_state"] = torch.where(mask[..., None].bool(), hidden, change(hidden))
        return result

    after.forward = forward  # type: ignore[method-assign]
    return after


def test_a_mistake_at_padded_positions_alone_is_caught() -> None:
    before = lively("bert")
    after = with_padding_changed(before, lambda hidden: hidden + 1)
    proof = prove(before, after, gradients=False)
    assert failed(proof) == {"padded positions"}


def test_padded_positions_are_reported_not_judged_when_rounding_is_promised() -> None:
    before = lively("bert")
    after = with_padding_changed(before, torch.zeros_like)
    proof = prove(before, after, promise="rounding")
    assert proof.passed, proof.summary()
    padded = [check for check in proof.checks if check.name.startswith("padded")]
    assert padded
    assert all(check.value == 1 and check.limit == "not judged" for check in padded)


def test_a_mistake_that_weak_weights_hide_is_caught() -> None:
    """SAM as it is initialised: embeddings of 1e-19, where exchanged q and k show nowhere."""
    config = sam_config()
    config.vision_config.initializer_range = 1e-10
    before = build(lambda: tf.SamModel(config))
    make = functools.partial(SplitProjection, sizes=SAM_SIZES, order=(K, Q, V))
    after, rules = split_everywhere(before, "qkv", SAM_SIZES, make)
    proof = prove(before, after, rules=rules, gradients=False)
    assert "outputs" not in failed(proof)
    assert "strong weights: outputs" in failed(proof)
    right, rules = split_everywhere(before, "qkv", SAM_SIZES, lambda fused: SplitProjection(fused, SAM_SIZES))
    proof = prove(before, right, rules=rules)
    assert proof.passed, proof.summary()
    assert "strong weights: sensitivity" in {check.name for check in proof.checks}


def test_a_proof_whose_inputs_do_not_reach_the_edit_is_inconclusive() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(4, 4)
            self.idle = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.used(x)
            return result

    before = Two()
    after = copy.deepcopy(before)
    after.other = after.idle
    del after.idle
    rules = [Rename(f"idle.{leaf}", f"other.{leaf}") for leaf in ("weight", "bias")]
    proof = prove(before, after, rules=rules, inputs={"x": torch.randn(2, 4)})
    assert failed(proof) == {"strong weights: sensitivity"}
    assert "inconclusive" in proof.failures[0].detail


def test_a_model_that_no_longer_runs_is_a_failed_proof() -> None:
    before = build("bert")
    after = copy.deepcopy(before)
    after.get_submodule("encoder.layer.0.output").dense = nn.Linear(3, 3)  # type: ignore[assignment]
    proof = prove(before, after)
    assert "outputs" in failed(proof)
    assert any("does not run: RuntimeError" in check.detail for check in proof.failures)
    assert proof.max_difference == math.inf


def test_a_lost_output_is_caught() -> None:
    before = lively("bert")
    after = copy.deepcopy(before)
    after.pooler = None  # type: ignore[assignment]
    proof = prove(before, after, gradients=False)
    assert "outputs" in failed(proof)


# ---------------------------------------------------------------- rounding


class Roundabout(nn.Module):
    """The same linear map by a way that loses digits: a large number comes and goes."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = inner.weight, inner.bias

    def forward(self, hidden: Tensor) -> Tensor:
        return (nn.functional.linear(hidden, self.weight, self.bias) + 1000.0) - 1000.0


def test_rounding_is_told_from_error_in_float64() -> None:
    before = lively("bert")
    after = copy.deepcopy(before)
    layer = after.get_submodule("encoder.layer.0.output")
    layer.dense = Roundabout(layer.dense)  # type: ignore[arg-type]
    proof = prove(before, after)
    assert proof.passed, proof.summary()
    assert proof.max_difference > 1e-5
    assert proof.first_divergence is None
    assert any("in float64, so rounding" in check.detail for check in proof.checks)


def test_tolerances_can_be_given() -> None:
    before = lively("bert")
    after = copy.deepcopy(before)
    layer = after.get_submodule("encoder.layer.1.output")
    layer.dense = Scaled(layer.dense, 1.001)  # type: ignore[arg-type]
    assert prove(before, after, dtype_tolerances={"float32": 0.1}, gradients=False).passed


def test_lossy_edits_are_reported_not_judged() -> None:
    before = lively("bert")
    after = copy.deepcopy(before)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.copy_((parameter * 8).round() / 8)
    proof = prove(before, after, promise="lossy")
    assert proof.passed, proof.summary()
    assert proof.max_difference > 1e-3
    assert not prove(before, after, promise="lossy", dtype_tolerances={torch.float32: 1e-4}).passed


def test_rules_that_do_not_fit_are_a_failed_check() -> None:
    before = lively("bert")
    proof = prove(before, copy.deepcopy(before), rules=[Rename("nowhere", "somewhere")])
    assert {"weights", "round trip"} <= failed(proof)
    assert "no tensor named nowhere" in proof.failures[0].detail


def test_the_rules_used_here_are_invertible() -> None:
    rules = split_rules("x", {Q: 4, K: 2, V: 2}, groups=2, leaves=("weight",))
    whole = torch.randn(8, 3)
    back = run(invert(rules), run(rules, {"x.weight": whole}, torch), torch)
    assert torch.equal(back["x.weight"], whole)
    shape: Shape = tuple(whole.shape)
    assert shape == (8, 3)


def test_a_small_mistake_in_half_precision_is_caught_in_float32() -> None:
    before = lively("bert").to(torch.bfloat16)
    after = copy.deepcopy(before)
    layer = after.get_submodule("encoder.layer.1.output")
    layer.dense = Scaled(layer.dense, 1.004)  # type: ignore[arg-type]
    proof = prove(before, after, gradients=False)
    assert "float32: outputs" in failed(proof)
    assert "outputs" not in failed(proof)


class StepByStep(nn.Module):
    """Right for a whole text, wrong for a single token after it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = (inner,)
        self.weight = inner.weight

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.inner[0](hidden)
        return result * 1.5 if hidden.shape[1] == 2 else result


def test_a_mistake_in_decoding_with_a_cache_is_caught() -> None:
    before = lively("llama")
    after = copy.deepcopy(before)
    attention = after.get_submodule("model.layers.0.self_attn")
    attention.q_proj = StepByStep(attention.q_proj)  # type: ignore[arg-type]
    proof = prove(before, after)
    assert failed(proof) == {"outputs"}
    assert all("from the cache" in check.name for check in proof.failures)
    assert proof.first_divergence is not None
    assert proof.first_divergence.path == "model.layers.0.self_attn.q_proj"


# ---------------------------------------------------------------- packed encoders


def packed_bert() -> tuple[nn.Module, nn.Module]:
    before = lively("bert")
    after = copy.deepcopy(before)
    rewire.apply_(after, Pack("@encoder"))
    return before, after


def test_a_packed_encoder_passes_on_numbers_of_its_own() -> None:
    before, after = packed_bert()
    proof = prove(before, after)
    assert proof.passed, proof.summary()
    assert proof.max_difference > 0  # so that it was the packed forward that was looked at
    assert vars(after.encoder)["forward"].stack.paths["recipe"] > 0


def test_an_encoder_packed_without_its_mask_is_caught() -> None:
    before, after = packed_bert()

    def without_mask(forward: Any) -> Callable[..., Any]:
        return lambda hidden, mask=None, *more, **others: forward(hidden, None, *more, **others)

    for layer in after.encoder.layer:
        vars(layer)["forward"] = without_mask(vars(layer)["forward"])
    assert not prove(before, after).passed
