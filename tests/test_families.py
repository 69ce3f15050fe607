"""What families says about linears, fused and separate projections: by hand-made modules and real classes."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import re
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from rewire import families
from rewire.families import (
    FusedProjection,
    Refusal,
    fused_projection,
    fused_projections,
    separate_projections,
    separate_refusals,
)
from rewire.family_rules import Equal
from rewire.family_table import FAMILIES
from rewire.linears import LinearFacts, linear_facts
from rewire.modules import JoinedProjection, SplitProjection
from rewire.tensor_rules import SplitRows, run

QKV = ("q", "k", "v")


def on_meta(model_type: str, **values: Any) -> nn.Module:
    with torch.device("meta"):
        return AutoModel.from_config(CONFIG_MAPPING[model_type](**values))  # type: ignore[no-any-return]


def ends(model: nn.Module, end: str) -> str:
    """The first path that ends so."""
    return next(path for path, _ in model.named_modules() if path.endswith(end))


def found(model: nn.Module, path: str, **wish: Any) -> FusedProjection:
    result = fused_projection(model, path, **wish)
    assert isinstance(result, FusedProjection), result
    return result


def refused(model: nn.Module, path: str, **wish: Any) -> str:
    result = fused_projection(model, path, **wish)
    assert isinstance(result, Refusal), result
    assert result.path == path
    return result.reason


# ---------------------------------------------------------------- linear_facts


class SaysTheSame(nn.Linear):
    """Another way to write the same map, as Falcon does."""

    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Doubles(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class ForgetsBias(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight)


class RoundsInside(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float().double() if input.dtype == torch.float64 else input)


class HasScale(nn.Linear):
    """Another tensor, at first without effect."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.scale = nn.Parameter(torch.ones(n_out))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class NeedsMore(nn.Linear):
    def __init__(self, n_in: int, n_out: int, n_groups: int) -> None:
        super().__init__(n_in, n_out)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class PackedWeight(nn.Linear):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        packed = torch.zeros(n_out, n_in, dtype=torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)


def test_a_plain_linear() -> None:
    assert linear_facts(nn.Linear(3, 5)) == LinearFacts(3, 5, False, True)
    assert linear_facts(nn.Linear(3, 5, bias=False, device="meta")) == LinearFacts(3, 5, False, False)


def test_a_transposed_linear() -> None:
    assert linear_facts(Conv1D(5, 3)) == LinearFacts(3, 5, True, True)


def test_a_subclass_counts_if_it_computes_the_same() -> None:
    assert linear_facts(SaysTheSame(3, 5)) == LinearFacts(3, 5, False, True)
    falcon = on_meta("falcon", hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    fused = falcon.get_submodule(ends(falcon, "query_key_value"))
    assert type(fused).__name__ == "FalconLinear"
    assert linear_facts(fused) == LinearFacts(32, 48, False, False)


@pytest.mark.parametrize("kind", [Doubles, ForgetsBias, HasScale, RoundsInside])
def test_a_subclass_that_computes_something_else_is_refused(kind: type[nn.Linear]) -> None:
    reason = linear_facts(kind(3, 5))
    assert isinstance(reason, str)
    assert kind.__name__ in reason
    assert "not the one of nn.Linear" in reason


def test_a_subclass_that_cannot_be_tried_is_refused_with_the_error() -> None:
    reason = linear_facts(NeedsMore(3, 5, 2))
    assert isinstance(reason, str)
    assert "n_groups" in reason


def test_trying_a_subclass_leaves_no_trace() -> None:
    class Fresh(SaysTheSame):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    before = torch.get_rng_state()
    with torch.device("meta"):
        module = Fresh(3, 5)
        assert isinstance(linear_facts(module), LinearFacts)
    assert torch.equal(before, torch.get_rng_state())


def replaced_forward() -> nn.Module:
    linear = nn.Linear(3, 5)
    linear.forward = lambda x: 3 * x  # type: ignore[method-assign]
    return linear


def marked(**attributes: Any) -> nn.Module:
    linear = nn.Linear(3, 5)
    for name, value in attributes.items():
        setattr(linear, name, value)
    return linear


def eight_bit() -> nn.Module:
    linear = nn.Linear(3, 5)
    linear.weight = nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return linear


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(nn.Linear(3, 5))


class Subclassed(Tensor):
    """Stands for the tensors of torchao and of DTensor."""


def subclassed() -> nn.Module:
    linear = nn.Linear(3, 5)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Subclassed))
    return linear


class HalvedConvolution(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


class LoudAttention(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


ALTERED: dict[str, tuple[Any, str]] = {
    "relu": (nn.ReLU, "ReLU is not a linear layer"),
    "convolution": (lambda: nn.Conv1d(3, 5, 3), "not a linear layer: it looks at 3 positions at a time"),
    "convolution with padding": (lambda: nn.Conv2d(3, 5, 1, padding=1), "it skips or adds positions"),
    "convolution in steps": (lambda: nn.Conv1d(3, 5, 1, stride=2), "it skips or adds positions"),
    "other convolution": (lambda: HalvedConvolution(3, 5, 1), "a forward of its own that is not the one of a conv"),
    "keys of another width": (lambda: nn.MultiheadAttention(4, 2, kdim=6), "keys 6, values 4, so each has a weight"),
    "other attention": (lambda: LoudAttention(4, 2), "a forward of its own that is not the one of nn.Multihead"),
    "embedding": (lambda: nn.Embedding(3, 5), "not a linear layer"),
    "bilinear": (lambda: nn.Bilinear(3, 3, 5), "not a linear layer"),
    "lazy": (lambda: nn.LazyLinear(5), "no shape yet"),
    "packed": (lambda: PackedWeight(3, 5), "already quantised (weight of torch.int8"),
    "eight bit": (eight_bit, "already quantised (weight of torch.float8_e4m3fn"),
    "subclassed": (subclassed, "already quantised (weight is a Subclassed"),
    "quant_state": (lambda: marked(quant_state=1), "Linear has quant_state"),
    "lora": (lambda: marked(base_layer=nn.Identity()), "already adapted"),
    "weight norm": (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)), "parametrizations"),
    "old weight norm": (old_weight_norm, "weight_g"),
    "pruned": (lambda: prune.identity(nn.Linear(3, 5), "weight"), "weight_orig"),
    "replaced forward": (replaced_forward, "its forward was replaced"),
    "split": (lambda: SplitProjection(3, ("q", "k"), (5, 5)), "already edited by Rewire: SplitProjection"),
    "joined": (lambda: JoinedProjection(3, ("q", "k"), (5, 5), (True, True)), "already edited by Rewire"),
}


@pytest.mark.parametrize("case", ALTERED)
def test_what_is_no_plain_linear_is_refused_with_the_reason(case: str) -> None:
    make, words = ALTERED[case]
    reason = linear_facts(make())
    assert isinstance(reason, str)
    assert words in reason


def test_an_adapted_model_is_refused_at_the_adapted_place() -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModel.from_config(CONFIG_MAPPING["bloom"](hidden_size=32, n_layer=2, n_head=4, vocab_size=60))
    before = fused_projections(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["query_key_value"], r=2))
    after = fused_projections(adapted)
    assert [type(one) for one in before] == [FusedProjection] * 2
    assert [one.reason.split(";")[0] for one in after if isinstance(one, Refusal)] == ["already adapted (peft)"] * 2
    assert all(one.path.endswith("query_key_value") for one in after)


# ---------------------------------------------------------------- a stated layout

counts = st.integers(1, 4)


def labels(layout: str, roles: Sequence[str], sizes: Sequence[int], groups: int) -> list[str]:
    """The role of every row, written out the slow way."""
    per_group = [size // groups for size in sizes]
    if layout == "stacked":
        assert groups == 1
    return [role for _ in range(groups) for role, size in zip(roles, per_group, strict=True) for _ in range(size)]


def toy(rows: int, **config: Any) -> nn.Module:
    """A model whose attention holds one linear of so many rows."""
    model = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(8, rows, device="meta")})})
    model.config = SimpleNamespace(**config)  # type: ignore[assignment]
    return model


def assert_pure(projection: FusedProjection, rows: list[str]) -> None:
    """Cut where it says, every part holds the rows of one role, and each role is where it is said to be."""
    parts = tuple(f"part{i}" for i in range(len(projection.roles)))
    rule = (SplitRows("whole", parts, projection.sizes, projection.groups),)
    cut = run(rule, {"whole": np.array(rows)}, xp=np)
    assert [set(cut[part].tolist()) for part in parts] == [{role} for role in projection.roles]


@given(kv_heads=counts, ratio=counts, head_dim=counts, layout=st.sampled_from(["stacked", "grouped"]))
def test_sizes_of_grouped_queries_come_from_the_config(kv_heads: int, ratio: int, head_dim: int, layout: str) -> None:
    heads = kv_heads * ratio
    sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    projection = found(toy(sum(sizes), **config), "attn.qkv", layout=layout)
    groups = 1 if layout == "stacked" else kv_heads
    assert (projection.roles, projection.sizes, projection.groups) == (QKV, sizes, groups)
    assert_pure(projection, labels(layout, QKV, sizes, groups))


@given(heads=counts, head_dim=counts, count=st.integers(2, 4))
def test_equal_parts_per_head_and_alternating(heads: int, head_dim: int, count: int) -> None:
    names = tuple("abcd"[:count])
    size = heads * head_dim
    model = toy(size * count, num_heads=heads)
    per_head = found(model, "attn.qkv", layout="per_head", into=names)
    assert (per_head.sizes, per_head.groups) == ((size,) * count, heads)
    alternating = found(model, "attn.qkv", layout="interleaved", into=names)
    assert (alternating.sizes, alternating.groups) == ((size,) * count, size)
    assert_pure(alternating, list(names) * size)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 5), st.integers(-3, 3))
def test_stated_numbers_are_obeyed_or_refused_never_bent(sizes: list[int], groups: int, extra: int) -> None:
    names = tuple("abcd"[: len(sizes)])
    rows = max(1, sum(sizes) + extra)
    result = fused_projection(toy(rows), "attn.qkv", layout="grouped", into=names, sizes=sizes, groups=groups)
    fits = rows == sum(sizes) and all(size % groups == 0 for size in sizes)
    assert isinstance(result, FusedProjection) == fits
    if isinstance(result, FusedProjection):
        assert (result.names, result.sizes, result.groups) == (names, tuple(sizes), groups)


def test_the_owners_own_numbers_come_before_the_config() -> None:
    model = toy(24, num_attention_heads=7)
    model.get_submodule("attn").num_heads = 4  # type: ignore[assignment]
    assert found(model, "attn.qkv", layout="per_head").groups == 4


def test_the_nearest_config_counts() -> None:
    vision = toy(24, num_attention_heads=2)
    whole = nn.ModuleDict({"vision": vision})
    whole.config = SimpleNamespace(num_attention_heads=3)  # type: ignore[assignment]
    assert found(whole, "vision.attn.qkv", layout="per_head").groups == 2


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "sum": ({}, {"layout": "stacked", "into": QKV, "sizes": (8, 8, 9)}, ("24 is not 8 + 8 + 9", "state sizes")),
    "config": (
        {"num_heads": 4, "num_key_value_heads": 1, "head_dim": 10},
        {"layout": "stacked"},
        ("out_features 24 is not 40 + 2·10", "4 heads of 10, 1 for keys and values", "state sizes"),
    ),
    "groups": ({"num_heads": 5}, {"layout": "per_head"}, ("8 + 8 + 8 do not divide by 5 groups",)),
    "no heads": ({}, {"layout": "per_head"}, ("no head count near attn.qkv", "state groups")),
    "stacked groups": ({}, {"layout": "stacked", "groups": 2}, ("stacked parts are one group, not 2",)),
    "parts": ({}, {"layout": "stacked", "into": ("a", "b"), "sizes": (8, 8, 8)}, ("2 parts but 3 sizes",)),
    "equal": ({}, {"layout": "stacked", "into": tuple("abcde")}, ("24 is not 5 equal parts",)),
    "uneven alternating": (
        {},
        {"layout": "interleaved", "into": ("a", "b"), "sizes": (8, 16)},
        ("alternating rows need equal parts",),
    ),
    "layout": ({}, {"layout": "wild"}, ("unknown layout 'wild'", "stacked | per_head")),
    "twice": ({}, {"layout": "stacked", "into": ("q", "q", "v")}, ("into names a part twice: q, q, v",)),
    "negative": ({}, {"layout": "stacked", "into": ("a", "b"), "sizes": (25, -1)}, ("is not 25 + -1",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_the_numbers(case: str) -> None:
    config, wish, words = REFUSED[case]
    reason = refused(toy(24, **config), "attn.qkv", **wish)
    assert all(word in reason for word in words), reason


def test_which_of_gate_and_up_comes_first_is_not_guessed_from_a_name() -> None:
    model = nn.ModuleDict({"gate_up_proj": nn.Linear(4, 8)})
    assert "state `into`" in refused(model, "gate_up_proj", layout="stacked")
    assert found(model, "gate_up_proj", layout="stacked", into=("up_proj", "gate_proj")).roles == ("up", "gate")


def test_a_path_that_leads_nowhere() -> None:
    assert "no module of this name" in refused(toy(24), "attn.nothing", layout="stacked")
    assert "not a linear layer" in refused(toy(24), "attn", layout="stacked")


def test_an_unknown_class_is_never_guessed() -> None:
    reason = refused(toy(24, num_heads=4), "attn.qkv")
    assert "ambiguous layout of ModuleDict.qkv" in reason
    assert "state layout: stacked | per_head" in reason


# ---------------------------------------------------------------- known families

FALCON = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 8}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4}
# Written by hand from each forward: roles in the order of the rows, their sizes, the groups.
KNOWN: list[tuple[str, dict[str, Any], str, tuple[str, ...], tuple[int, ...], int]] = [
    ("gpt2", GPT2, "c_attn", QKV, (32, 32, 32), 1),
    ("gpt2", {**GPT2, "add_cross_attention": True}, "crossattention.c_attn", ("k", "v"), (32, 32), 1),
    ("gpt_neox", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}, "query_key_value", QKV,
     (32, 32, 32), 4),
    ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 4}, "query_key_value", QKV, (32, 32, 32), 4),
    ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, "query_key_value", QKV,
     (32, 8, 8), 2),
    ("falcon", {**FALCON, "multi_query": True}, "query_key_value", QKV, (32, 4, 4), 1),
    ("falcon", {**FALCON, "multi_query": False}, "query_key_value", QKV, (32, 32, 32), 8),
    ("gpt_bigcode", {**GPT2, "multi_query": True}, "c_attn", QKV, (32, 8, 8), 1),
    ("gpt_bigcode", {**GPT2, "multi_query": False}, "c_attn", QKV, (32, 32, 32), 4),
    ("codegen", {"n_embd": 32, "n_layer": 1, "n_head": 8, "rotary_dim": 4}, "qkv_proj", ("q", "v", "k"),
     (32, 32, 32), 4),
    ("mpt", {"d_model": 32, "n_layers": 1, "n_heads": 4}, "Wqkv", QKV, (32, 32, 32), 1),
    ("phi3", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 48}, "qkv_proj", QKV, (32, 16, 16), 1),
    ("phi3", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 48}, "gate_up_proj", ("gate", "up"), (48, 48), 1),
    ("phi4_multimodal", {}, "encoders.0.feed_forward_in.gate_up_proj", ("up", "gate"), (1536, 1536), 1),
    ("deepseek_v3", {}, "kv_b_proj", ("k", "v"), (16384, 16384), 128),
    ("glm4_moe_lite", {}, "kv_b_proj", ("k", "v"), (3840, 5120), 20),
    ("qwen3_next", {}, "layers.3.self_attn.q_proj", ("q", "gate"), (4096, 4096), 16),
    ("exaone4_5_vision", {}, "qkv", QKV, (3584, 1792, 1792), 1),
    ("levit", {}, "queries_keys_values.linear", QKV, (64, 64, 128), 4),
    ("levit", {}, ".keys_values.linear", ("k", "v"), (128, 512), 8),
    ("jetmoe", {}, "kv_proj", ("k", "v"), (2048, 2048), 1),
    ("sam_vision_model", {}, "qkv", QKV, (768, 768, 768), 1),
    ("moonshine", {}, "decoder.layers.0.mlp.fc1", ("up", "gate"), (1152, 1152), 1),
    ("minimax", {}, "qkv_proj", QKV, (4096, 4096, 4096), 32),
    ("qwen3_5", {}, "in_proj_qkv", QKV, (2048, 2048, 4096), 1),
    ("qwen3_next", {}, "in_proj_qkvz", ("q", "k", "v", "z"), (2048, 2048, 4096, 4096), 16),
    ("qwen3_next", {}, "in_proj_ba", ("b", "a"), (32, 32), 16),
    ("mobilevitv2", {}, "qkv_proj.convolution", QKV, (1, 128, 128), 1),
]  # fmt: skip


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: f"{case[0]}-{case[2]}-{case[5]}")
def test_known_families(case: tuple[str, dict[str, Any], str, tuple[str, ...], tuple[int, ...], int]) -> None:
    model_type, values, end, roles, sizes, groups = case
    model = on_meta(model_type, **values)
    projection = found(model, ends(model, end))
    assert (projection.roles, projection.sizes, projection.groups) == (roles, sizes, groups)
    assert projection.kind == ("mlp" if "up" in roles else "attention")
    assert "known family" in projection.evidence[0]
    assert projection in fused_projections(model)


def test_names_follow_the_habit_of_the_model() -> None:
    neox = on_meta("gpt_neox", num_hidden_layers=1)
    assert found(neox, ends(neox, "query_key_value")).names == QKV
    phi3 = on_meta("phi3", num_hidden_layers=1)
    assert found(phi3, ends(phi3, "qkv_proj")).names == ("q_proj", "k_proj", "v_proj")
    assert found(phi3, ends(phi3, "gate_up_proj")).names == ("gate_proj", "up_proj")
    gpt2 = on_meta("gpt2", n_layer=1)  # c_attn beside c_proj
    assert found(gpt2, ends(gpt2, "c_attn")).names == ("q_proj", "k_proj", "v_proj")


def test_names_that_speak_of_roles_are_put_in_the_order_of_the_rows() -> None:
    model = on_meta("codegen", n_embd=32, n_layer=1, n_head=8, rotary_dim=4)
    path = ends(model, "qkv_proj")
    assert found(model, path, into=QKV).names == ("q", "v", "k")
    assert found(model, path, into=("query", "key", "value"), layout="grouped").names == ("query", "value", "key")
    assert found(model, path, into=("a", "b", "c")).names == ("a", "b", "c")


def test_sizes_go_along_with_names() -> None:
    model = on_meta("phi3", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    path = ends(model, "qkv_proj")
    assert found(model, path, into=("k", "q", "v"), sizes=(16, 32, 16)).sizes == (32, 16, 16)
    assert "sizes are [32, 16, 16]" in refused(model, path, into=("k", "q", "v"), sizes=(32, 16, 16))


def test_what_the_caller_states_must_agree_with_what_is_known() -> None:
    model = on_meta("gpt_neox", hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    path = ends(model, "query_key_value")
    assert "groups is 4, not 2" in refused(model, path, groups=2)
    assert "into names 2 parts" in refused(model, path, into=("a", "b"))
    assert "state the layout too if you mean it" in refused(model, path, sizes=(64, 16, 16))


def test_a_stated_layout_is_obeyed_and_the_contradiction_recorded() -> None:
    model = on_meta("gpt_neox", hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    projection = found(model, ends(model, "query_key_value"), layout="stacked")
    assert (projection.sizes, projection.groups, projection.layout) == ((32, 32, 32), 1, "stacked")
    assert projection.evidence == (
        "stated by the plan",
        "GPTNeoXAttention.query_key_value: rows per head (known family)",
    )


NOT_FUSED = [
    ("mamba", "in_proj", "state space model"),
    ("jamba", "in_proj", "state space model"),
    ("lfm3", "in_proj", "short convolution"),
    ("mamba", "x_proj", "time steps"),
    ("gemma3n_audio", "linear_start", "short convolution"),
    ("focalnet", "projection_in", "focal modulation"),
    ("d_fine", "gateway.gate", "two gates"),
    ("vibevoice", "layers.0.linear", "adaptive norm"),
    ("deepseek_v2", "kv_a_proj_with_mqa", "latent"),
    ("deepseek_v4", "self_attn.kv_proj", "same rows"),
    ("reformer", "query_key", "same rows"),
]


@pytest.mark.parametrize(("model_type", "end", "words"), NOT_FUSED)
def test_what_looks_fused_but_is_something_else(model_type: str, end: str, words: str) -> None:
    model = on_meta(model_type)
    path = ends(model, end)
    assert words in refused(model, path)
    assert path in [one.path for one in fused_projections(model) if isinstance(one, Refusal)]
    linear = linear_facts(model.get_submodule(path))
    assert isinstance(linear, LinearFacts)
    half = linear.out_features // 2
    parts = found(model, path, layout="stacked", into=("a", "b"), sizes=(half, linear.out_features - half))
    assert parts.names == ("a", "b")


def test_a_subclass_from_elsewhere_with_its_own_forward_is_not_known() -> None:
    model = on_meta("gpt_neox", num_hidden_layers=1)
    path = ends(model, "query_key_value")
    owner = model.get_submodule(path.rpartition(".")[0])

    class Renamed(type(owner)):  # type: ignore[misc]
        """Only a new name."""

    class Rewritten(type(owner)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError("rows in an order of its own")

    owner.__class__ = Renamed
    assert found(model, path).groups == 64
    owner.__class__ = Rewritten
    assert "ambiguous layout of Rewritten.query_key_value" in refused(model, path)


# ---------------------------------------------------------------- the table against the package

MODELS = Path(transformers.__file__).parent / "models"


def sources() -> dict[str, str]:
    """The text of every modelling file, by the name of its module."""
    files = sorted(MODELS.glob("*/modeling_*.py"))
    return {f"transformers.models.{file.parent.name}.{file.stem}": file.read_text("utf-8") for file in files}


def linears() -> dict[str, str]:
    """`Class.attribute` of every linear that a class of the package gives itself, and how it is made."""
    made: dict[str, str] = {}
    layers = "Linear|Conv1[dD]|LayerWithBN|MobileViTV2ConvLayer"
    pattern = rf"^ *class (\w+)|self\.(\w+) = (?:\(\s*)?[\w.]*(?:{layers})\(\s*([^\n]*)"
    for text in sources().values():
        owner = ""
        for found in re.finditer(pattern, text, re.MULTILINE):
            owner = found[1] or owner
            if found[2]:
                made[f"{owner}.{found[2]}"] = found[3]
    return made


#: A projector whose width is that of the next model, and one that reads two at a time.
JUST_WIDE = {"GlmAsrMultiModalProjector.linear_1", "GlmAsrMultiModalProjector.linear_2", "EfficientLoFTRMLP.fc1"}


def test_every_owner_in_the_table_exists_and_none_is_forgotten() -> None:
    made = linears()
    in_table = {f"{owner}.{family.leaf.partition('.')[0]}" for family in FAMILIES for owner in family.owners}
    in_table = {name for name in in_table if not name.startswith("timm.")}
    assert not in_table - set(made), "not in this version of Transformers"
    sounds_fused = {name for name in made if families._FUSED_NAMES.search(name.partition(".")[2])}
    assert not sounds_fused - in_table, "new fused projections: read their forward, and add them to the table"
    twice = re.compile(r"\b[23] \* [\w.]+( \*| \+|,|\))|[\w.)] \* [23]\b")
    owner = re.compile(r"\w*(Attention|MLP|Mlp|FeedForward|Gat(ed|ing)|GLU|DenseActDense|Projector)\w*\.(?!sampling)")
    wide = {name for name, how in made.items() if twice.search(how) and owner.match(name)}
    assert wide - in_table == JUST_WIDE, "new linears of two or three rows per feature: are they fused?"


def test_the_classes_of_timm_exist() -> None:
    spec = importlib.util.find_spec("timm")  # which is read, not imported: it needs more than torch
    if spec is None or spec.origin is None:
        pytest.skip("timm is not installed")
    for family in FAMILIES:
        for owner in (owner for owner in family.owners if owner.startswith("timm.")):
            *modules, name = owner.split(".")[1:]
            text = Path(spec.origin).parent.joinpath(*modules).with_suffix(".py").read_text("utf-8")
            body = re.search(rf"^class {name}\(.*?(?=^class |\Z)", text, re.MULTILINE | re.DOTALL)
            assert body is not None
            assert f"self.{family.leaf} = nn." in body[0] or f"self.{family.leaf}: " in body[0]


GATED = {
    owner: family
    for family in FAMILIES
    for owner in family.owners
    if isinstance(family.rule, Equal) and set(family.rule.roles) == {"gate", "up"}
}
#: What the constructors of these classes read from their configurations.
READ = SimpleNamespace(
    hidden_size=8, intermediate_size=6, shared_intermediate_size=6, ffn_dim=12, hidden_act="silu",
    hidden_activation="gelu", activation="silu", dropout=0.0, dropout_rate=0.0, mlp_dropout=0.0, mlp_bias=True,
    use_bias=True, add_bias_linear=False, adapter_rank=2, hybrid_layer_ids=[0], num_mem_blocks=1,
    weight_mode="fused", ffn_proj_factor=0.75, ffn_round_up_to_multiple_of=2, swiglu_alpha=1.7, swiglu_limit=70.0,
    dense_intermediate_size=6, vision_config=SimpleNamespace(hidden_size=2), downsample_factor=2,
    alignment_intermediate_size=12, text_config=SimpleNamespace(hidden_size=8), adapter_layer_norm_eps=1e-6,
)  # fmt: skip
GIVEN = {"config": READ, "hidden_act": "silu", "hidden_size": 8, "intermediate_size": 6, "num_fwd_mem_blocks": 1,
         "block_id": 0}  # fmt: skip


@pytest.fixture(scope="module")
def homes() -> dict[str, str]:
    """Which module each gated class stands in."""
    found = {}
    for module, text in sources().items():
        found.update(dict.fromkeys(re.findall(r"^ *class (\w+)", text, re.MULTILINE), module))
    return found


@pytest.mark.parametrize("owner", GATED)
@torch.no_grad()
def test_up_rows_enter_the_output_linearly_and_gate_rows_do_not(owner: str, homes: dict[str, str]) -> None:
    kind = getattr(importlib.import_module(homes[owner]), owner)
    wanted = inspect.signature(kind).parameters
    module = kind(**{name: value for name, value in GIVEN.items() if name in wanted}).double().eval()
    given: list[Tensor] = []
    fused = module.get_submodule(GATED[owner].leaf)
    fused.register_forward_hook(lambda *call: given[0])
    assert fused.out_features == 12
    rule = GATED[owner].rule
    assert isinstance(rule, Equal)
    x = torch.zeros(1, 4, 2 if "Projector" in owner else 8, dtype=torch.float64)
    shape = (1, 1, 1, 12) if "Projector" in owner else (1, 4, 12)
    more = (0,) if owner == "Zamba2MLP" else ()  # which of its adapters to add
    random = torch.Generator().manual_seed(0)
    middle, step = (torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(2))

    def bend(role: str) -> float:
        rows = torch.tensor([one == role for one in labels("stacked", rule.roles, (6, 6), 1)])
        outputs = []
        for by in (-1, 0, 1):
            given[:] = [middle + by * step * rows]
            outputs.append(module(x, *more))
        return float((outputs[0] + outputs[2] - 2 * outputs[1]).norm() / (outputs[2] - outputs[0]).norm())

    assert bend("up") < 1e-12
    assert bend("gate") > 1e-3


# ---------------------------------------------------------------- whole models


def test_a_model_of_600_billion_parameters_takes_a_second() -> None:
    model = on_meta("deepseek_v3")
    assert sum(parameter.numel() for parameter in model.parameters()) > 6e11
    start = time.perf_counter()
    fused, separate = fused_projections(model), separate_projections(model)
    assert time.perf_counter() - start < 5
    assert len(fused) == 2 * 61
    assert len(separate) == 61  # gate and up of the dense layers and of the shared experts


def test_a_model_edited_in_part() -> None:
    model = on_meta("gpt2", **{**GPT2, "n_layer": 2})
    first = found(model, "h.0.attn.c_attn")
    split = SplitProjection(32, first.names, first.sizes, first.groups, device="meta")
    model.get_submodule("h.0.attn").c_attn = split
    after = fused_projections(model)
    assert [type(one) for one in after] == [Refusal, FusedProjection]
    assert "already edited by Rewire" in after[0].reason  # type: ignore[union-attr]
    assert [one.path for one in separate_projections(model)] == ["h.0.attn.c_attn"]


def test_nothing_is_run_and_nothing_changes() -> None:
    model = AutoModel.from_config(CONFIG_MAPPING["gpt2"](**GPT2, vocab_size=60))
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    fused_projections(model)
    separate_projections(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


SEPARATE: list[tuple[str, dict[str, Any], str, tuple[str, ...], tuple[str, ...]]] = [
    ("bert", {}, "encoder.layer.0.attention.self", QKV, ("query", "key", "value")),
    ("llama", {"num_hidden_layers": 1}, "layers.0.self_attn", QKV, ("q_proj", "k_proj", "v_proj")),
    ("llama", {"num_hidden_layers": 1}, "layers.0.mlp", ("gate", "up"), ("gate_proj", "up_proj")),
    ("t5", {}, "encoder.block.0.layer.0.SelfAttention", QKV, ("q", "k", "v")),
    ("distilbert", {}, "transformer.layer.0.attention", QKV, ("q_lin", "k_lin", "v_lin")),
    ("deberta-v2", {}, "encoder.layer.0.attention.self", QKV, ("query_proj", "key_proj", "value_proj")),
    ("ctrl", {"n_layer": 1}, "h.0.multi_head_attention", QKV, ("Wq", "Wk", "Wv")),
    ("cpmant", {"num_hidden_layers": 1}, "encoder.layers.0.self_att.self_attention", QKV,
     ("project_q", "project_k", "project_v")),
    ("longformer", {}, "encoder.layer.0.attention.self", QKV, ("query_global", "key_global", "value_global")),
    ("mobilebert", {}, "encoder.layer.0.attention.self", ("q", "k"), ("query", "key")),
    ("mt5", {}, "encoder.block.0.layer.1.DenseReluDense", ("gate", "up"), ("wi_0", "wi_1")),
    ("blip_2_qformer", {}, "encoder.layer.0.crossattention.attention", ("k", "v"), ("key", "value")),
    ("cpmant", {"num_hidden_layers": 1}, "encoder.layers.0.ffn.ffn.w_in", ("gate", "up"), ("w_0", "w_1")),
    ("moshi", {}, "layers.0.self_attn", QKV, ("q_proj.linear", "k_proj.linear", "v_proj.linear")),
    ("gemma4_vision", {}, "encoder.layers.0.mlp", ("gate", "up"), ("gate_proj.linear", "up_proj.linear")),
    ("squeezebert", {}, "encoder.layers.0.attention", QKV, ("query", "key", "value")),
    ("janus", {}, "vqmodel.encoder.mid.attn_1", QKV, ("q", "k", "v")),
    ("aimv2", {}, "vision_model.head", ("k", "v"), ("k_proj", "v_proj")),  # whose queries are learned
    ("swiftformer", {}, "encoder.network.0.blocks.2.attn", ("q", "k"), ("to_query", "to_key")),
    ("zaya", {}, "layers.0.self_attn.qkv_proj", QKV, ("q_proj", "k_proj", "v_proj_current")),
    ("grounding-dino", {}, "encoder.layers.0.fusion_layer.attn", ("k", "v"), ("text_proj", "values_text_proj")),
]  # fmt: skip


@pytest.mark.parametrize("case", SEPARATE, ids=lambda case: f"{case[0]}-{'-'.join(case[4])}")
def test_separate_projections(case: tuple[str, dict[str, Any], str, tuple[str, ...], tuple[str, ...]]) -> None:
    model_type, values, path, roles, parts = case
    places = [one for one in separate_projections(on_meta(model_type, **values)) if one.path == path]
    assert (roles, parts) in [(one.roles, one.parts) for one in places]


def test_what_is_alike_in_name_only_is_not_listed() -> None:
    def linears(**shapes: tuple[int, int]) -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()})

    nothing = [
        linears(q_proj=(4, 4), k_proj=(4, 4)),  # a pointer, not an attention
        linears(q_proj=(4, 4), k_proj=(5, 4), v_proj=(6, 4)),
        linears(gate_proj=(4, 8), up_proj=(4, 9)),
        linears(gate_proj=(4, 8), q_proj=(4, 8)),
        linears(q_a_proj=(4, 8), k_b_proj=(4, 8), v_proj=(4, 8)),
    ]
    assert [separate_projections(module) for module in nothing] == [()] * len(nothing)


def test_keys_may_stand_in_for_values() -> None:
    attention = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 4)})
    assert separate_projections(attention) == ()
    attention.v_proj = None  # type: ignore[assignment]
    assert [one.parts for one in separate_projections(attention)] == [("q_proj", "k_proj")]


def test_tensors_that_two_modules_hold_are_counted_once() -> None:
    attentions = nn.ModuleList(nn.ModuleDict({name: nn.Linear(4, 4) for name in QKV}) for _ in range(2))
    assert len(separate_projections(attentions)) == 2
    for name in QKV:
        attentions[1][name].weight = attentions[0][name].weight
    assert [one.path for one in separate_projections(attentions)] == ["0"]


class NotLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.zeros(4, 2, 2)) for _ in range(3))


NOT_JOINED: dict[str, tuple[nn.Module, str]] = {
    "bare": (Bare(), "q, k, v are bare parameters of Bare, not layers"),
    "not linear": (
        nn.ModuleDict({name: NotLinear() for name in QKV}), "q, k, v: NotLinear is not a linear layer"
    ),
    "widths": (
        nn.ModuleDict({"q": nn.Linear(4, 2), "k": nn.Linear(5, 2), "v": nn.Linear(6, 2)}),
        "q 4 → 2, k 5 → 2, v 6 → 2: no two of them read inputs of the same width",
    ),
    "packed": (
        nn.ModuleDict({"gate_proj": PackedWeight(4, 4), "up_proj": nn.Linear(4, 4)}),
        "gate_proj: already quantised (weight of torch.int8)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_JOINED)
def test_what_sounds_separate_and_cannot_be_joined_is_refused_with_the_reason(case: str) -> None:
    module, words = NOT_JOINED[case]
    (refusal,) = separate_refusals(nn.ModuleDict({"attn": module}))
    assert refusal.path == "attn"
    assert words in refusal.reason
    assert separate_projections(module) == ()


@pytest.mark.parametrize("model_type", ["gemma4_text", "cvt", "llama", "longformer", "rwkv", "qwen3_next"])
def test_norms_and_the_like_are_no_projections_that_are_missing(model_type: str) -> None:
    assert separate_refusals(on_meta(model_type)) == ()


def test_the_attention_of_torch() -> None:
    model = nn.ModuleDict({"head": nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})})
    (projection,) = fused_projections(model)
    assert isinstance(projection, FusedProjection)
    assert (projection.path, projection.owner) == ("head.attention", "head.attention")
    assert (projection.roles, projection.sizes, projection.layout) == (QKV, (8, 8, 8), "stacked")
    assert families.known_projection(model, "head.attention") == projection
    assert "groups is 1, not 2" in refused(model, "head.attention", groups=2)
    (other,) = fused_projections(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, kdim=4)}))
    assert isinstance(other, Refusal)
    assert "keys 4, values 8, so each has a weight of its own" in other.reason


def test_convolutions_that_sound_fused() -> None:
    convolutions = {"qkv": nn.Conv1d(4, 12, 1), "kv": nn.Conv1d(4, 8, 1, groups=2), "in_proj": nn.Conv1d(4, 8, 3)}
    model = nn.ModuleDict(convolutions)
    assert [one.path for one in fused_projections(model)] == ["qkv", "kv"]  # the third looks at three positions
    assert "the probe tries linear layers alone" in refused(model, "qkv")
    assert "Conv1d of 2 groups: each reads a part of the input alone" in refused(model, "kv")
    assert found(model, "qkv", layout="stacked").sizes == (4, 4, 4)


def test_linears_that_are_not_plain_are_left_out() -> None:
    plain = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj")})
    assert len(separate_projections(plain)) == 1
    plain["v_proj"] = PackedWeight(4, 4)
    assert [one.parts for one in separate_projections(plain)] == [("q_proj", "k_proj")]
