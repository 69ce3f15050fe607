"""The rules that make a configuration small keep what matters: kinds of layers, groups of heads, proportions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rewire.proof.execution import forward
from rewire.proof.guard import untouched
from rewire.zoo import example_inputs, tiny_config, tiny_model
from rewire.zoo.heads import HeadSizes, few_heads, fill_state_spaces, split_rotation
from rewire.zoo.layers import few_layers

# ---------------------------------------------------------------- layers


def test_two_layers_where_all_are_alike() -> None:
    config = SimpleNamespace(num_hidden_layers=32, layer_types=["full"] * 32)
    few_layers(config, {})
    assert config.num_hidden_layers == 2
    assert config.layer_types == ["full", "full"]


def test_one_layer_of_every_kind() -> None:
    config = SimpleNamespace(num_hidden_layers=12, layer_types=["a", "a", "a", "b"] * 3, mlp=["x"] + ["y"] * 11)
    few_layers(config, {})
    assert config.layer_types == ["a", "b"]
    assert config.mlp == ["x", "y"]


def test_first_dense_layers_stay_the_first() -> None:
    config = SimpleNamespace(num_hidden_layers=61, first_k_dense_replace=3)
    few_layers(config, {})
    assert (config.num_hidden_layers, config.first_k_dense_replace) == (2, 1)


def test_numbers_of_special_layers_are_counted_anew() -> None:
    config = SimpleNamespace(num_hidden_layers=12, hybrid_layer_ids=[5, 9])
    few_layers(config, {})
    assert (config.num_hidden_layers, config.hybrid_layer_ids) == (2, [1])


def test_layers_that_share_have_one_to_share_with() -> None:
    kinds = ["local", "local", "global"] * 4
    config = SimpleNamespace(num_hidden_layers=12, layer_types=kinds, num_kv_shared_layers=6)
    few_layers(config, {})
    assert config.layer_types == ["local", "global", "local", "global"]
    assert config.num_kv_shared_layers == 2


def test_overrides_go_with_their_layers() -> None:
    config = SimpleNamespace(num_hidden_layers=12)
    assert few_layers(config, {5: {"head_dim": 512}, 11: {"head_dim": 512}}) == {1: {"head_dim": 512}}


def test_every_other_layer_of_a_period() -> None:
    config = SimpleNamespace(num_hidden_layers=32, attn_layer_period=8, attn_layer_offset=4)
    few_layers(config, {})
    assert (config.num_hidden_layers, config.attn_layer_period, config.attn_layer_offset) == (2, 2, 1)


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize(("heads", "kept"), [(32, 4), (8, 2), (1, 1)])
def test_key_value_heads_keep_their_proportion(heads: int, kept: int) -> None:
    config = SimpleNamespace(num_attention_heads=32, num_key_value_heads=heads)
    few_heads(config)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, kept)


def test_fewer_linear_key_heads_than_value_heads() -> None:
    config = SimpleNamespace(linear_num_key_heads=16, linear_num_value_heads=32)
    few_heads(config)
    assert (config.linear_num_key_heads, config.linear_num_value_heads) == (2, 4)


def test_head_sizes_still_add_up() -> None:
    config = SimpleNamespace(head_dim=64, qk_rope_head_dim=64, qk_nope_head_dim=128, qk_head_dim=192, v_head_dim=128)
    HeadSizes.of([config]).apply(config)
    assert config.qk_head_dim == config.qk_rope_head_dim + config.qk_nope_head_dim == 48
    assert (config.head_dim, config.v_head_dim) == (16, 32)


def test_state_space_heads_fill_the_widened_model() -> None:
    config = SimpleNamespace(mamba_n_heads=4, mamba_d_head=16, mamba_expand=2)
    fill_state_spaces(config, 64)
    assert config.mamba_n_heads == 8


def test_axes_of_positions_share_the_features_of_a_head() -> None:
    rotation = {"rope_type": "default", "partial_rotary_factor": 0.5}
    config = SimpleNamespace(
        head_dim=16, rope_parameters=rotation, ignore_keys_at_rope_validation={"mrope_section", "mrope_interleaved"}
    )
    split_rotation(config)
    assert sum(config.rope_parameters["mrope_section"]) == 4


# ---------------------------------------------------------------- whole models

TELLING = (
    "dbrx",
    "deepseek_v4",
    "dots3_note_text",
    "gemma3n_text",
    "gemma4_text",
    "glm_moe_dsa",
    "granitemoehybrid",
    "jamba",
    "led",
    "longcat_flash",
    "luke",
    "mistral4",
    "mistral_large4_text",
    "muse_glimmer_assistant",
    "nemotron_h",
    "patchtst",
    "perceiver",
    "qwen2_vl_text",
    "qwen4_exp_text",
    "reformer",
    "time_series_transformer",
    "zamba2",
)
"""Types with layers of several kinds, sizes that depend on each other, or inputs of their own."""


@pytest.mark.parametrize("model_type", TELLING)
def test_a_tiny_model_runs_and_its_configuration_can_be_saved(model_type: str) -> None:
    model = tiny_model(model_type)
    with untouched(model):
        outputs = forward(model, example_inputs(model_type, model))
    assert outputs
    assert all(torch.isfinite(one).all() for one in outputs.values() if one.is_floating_point())
    saved = model.config.to_dict()
    assert type(model.config).from_dict(saved).to_dict() == saved


def test_every_layer_kind_of_a_hybrid_is_there() -> None:
    assert set(tiny_config("nemotron_h").layers_block_type) == {"linear_attention", "moe", "full_attention", "mlp"}
    assert set(tiny_config("bamba").layers_block_type) == {"linear_attention", "full_attention"}
