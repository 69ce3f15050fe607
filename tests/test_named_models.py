"""Models by name: what is found in each, and that all of it can be split and joined, whichever way it is looked at.

Every case says by hand what detection must find. Then one plan splits and joins all of that, and is checked on outputs
and gradients (by a proof), on the way back, and on folders: saved in the original layout, read by plain
`from_pretrained` and by `rewire.load`.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import rewire
from rewire import families
from rewire.errors import NoMatchError
from rewire.plan import Edit, Freeze, Join, Lora, Plan, Split, Unfreeze
from rewire.proof import Case as Inputs
from rewire.zoo import example_inputs, tiny_model
from tiny import ids, same, snapshot, tiny, tree

Found = dict[str, tuple[int, str]]
"""Paths, `*` for digits, with how many places that is and what the parts are."""


@dataclass(frozen=True)
class Model:
    """A model type; what is fused in it, what is separate, and what only looks so."""

    model_type: str
    fused: Found = field(default_factory=dict)
    separate: Found = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] | None = None
    unreached: str = ""  # what a forward pass leaves out

    def make(self) -> tuple[PreTrainedModel, Inputs]:
        """A tiny model and something to call it with."""
        if self.values is not None:
            return tiny(self.model_type, **self.values), Inputs("ids", {"input_ids": ids()})
        model = tiny_model(self.model_type)
        return model, example_inputs(self.model_type, model)


_Q = "q_proj k_proj v_proj"
_G = "gate_proj up_proj"
_BLOCKS = {"self_attn": (2, _Q), "cross_attn_token_to_image": (2, _Q), "cross_attn_image_to_token": (2, _Q)}
_SAM_DECODER = {
    **{f"mask_decoder.transformer.layers.*.{name}": found for name, found in _BLOCKS.items()},
    "mask_decoder.transformer.final_attn_token_to_image": (1, _Q),
}
_HIERA = {"vision_encoder.backbone.blocks.*.attn.qkv": (7, "q k v stacked")}
_FALCON = "h.*.self_attention.query_key_value"
_ENCODER_DECODER = {
    "encoder.layers.*.self_attn": (2, _Q),
    "decoder.layers.*.self_attn": (2, _Q),
    "decoder.layers.*.encoder_attn": (2, _Q),
}
_T5 = {
    "encoder.block.*.layer.*.SelfAttention": (2, "q k v"),
    "decoder.block.*.layer.*.SelfAttention": (2, "q k v"),
    "decoder.block.*.layer.*.EncDecAttention": (2, "q k v"),
}
_GATED_T5 = {f"{side}.block.*.layer.*.DenseReluDense": (2, "wi_0 wi_1") for side in ("encoder", "decoder")}
_STATE_SPACE = "state space model"

MODELS = {
    "SAM": Model("sam", {"vision_encoder.layers.*.attn.qkv": (2, "q k v stacked")}, _SAM_DECODER),
    "SAM 2": Model("sam2", _HIERA, _SAM_DECODER),
    "SAM 2 video": Model(
        "sam2_video",
        _HIERA,
        {
            **_SAM_DECODER,
            "memory_attention.layers.*.self_attn": (4, _Q),
            "memory_attention.layers.*.cross_attn_image": (4, _Q),
        },
    ),
    "GPT-2": Model("gpt2", {"h.*.attn.c_attn": (2, "q k v stacked")}),
    "GPT-NeoX": Model("gpt_neox", {"layers.*.attention.query_key_value": (2, "q k v per_head")}),
    "BLOOM": Model("bloom", {"h.*.self_attention.query_key_value": (2, "q k v per_head")}),
    "Falcon": Model("falcon", {_FALCON: (2, "q k v per_head")}, values={"multi_query": False, "bias": True}),
    "Falcon, multi-query": Model("falcon", {_FALCON: (2, "q k v stacked")}, values={"multi_query": True}),
    "Falcon, new decoder": Model(
        "falcon", {_FALCON: (2, "q k v grouped")}, values={"new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    "Phi-3": Model(
        "phi3",
        {"layers.*.self_attn.qkv_proj": (2, "q k v stacked"), "layers.*.mlp.gate_up_proj": (2, "gate up stacked")},
    ),
    "GLM": Model(
        "glm", {"layers.*.mlp.gate_up_proj": (2, "gate up stacked")}, {"layers.*.self_attn": (2, _Q)}
    ),
    "Moshi": Model(
        "moshi",
        {
            "decoder.model.layers.*.mlp.fc1": (2, "gate up stacked"),
            "depth_decoder.layers.*.mlp.fc1": (2, "gate up stacked"),  # a matrix per codebook
        },
        {
            "audio_encoder.encoder.encoder_transformer.layers.*.self_attn": (2, _Q),
            "audio_encoder.decoder.decoder_transformer.layers.*.self_attn": (2, _Q),
            "decoder.model.layers.*.self_attn": (2, "q_proj.linear k_proj.linear v_proj.linear"),
            "depth_decoder.layers.*.self_attn": (2, "q_proj.linear k_proj.linear v_proj.linear"),
        },
        unreached="audio_encoder.decoder.",
    ),
    "Zamba": Model(
        "zamba",
        {},
        # One block, whose tensors stand in several layers.
        {"layers.*.shared_transf.self_attn": (1, _Q), "layers.*.shared_transf.feed_forward": (1, _G)},
        {"layers.*.mamba.in_proj": _STATE_SPACE, "layers.*.mamba_decoder.mamba.in_proj": _STATE_SPACE},
    ),
    "ViT": Model("vit", {}, {"layers.*.attention": (2, _Q)}),
    "Swin": Model("swin", {}, {"encoder.layers.*.blocks.*.attention": (8, _Q)}),
    "CLIP": Model("clip", {}, {f"{side}_model.encoder.layers.*.self_attn": (2, _Q) for side in ("text", "vision")}),
    "Whisper": Model("whisper", {}, _ENCODER_DECODER),
    "Wav2Vec2": Model("wav2vec2", {}, {"encoder.layers.*.attention": (2, _Q)}),
    "BART": Model("bart", {}, _ENCODER_DECODER),
    "T5": Model("t5", {}, _T5),
    "myT5": Model("mt5", {}, {**_T5, **_GATED_T5}),  # a tokenizer of its own, on the body of T5 with gates
    "ModernBERT": Model(
        "modernbert", {"layers.*.attn.Wqkv": (2, "q k v stacked"), "layers.*.mlp.Wi": (2, "gate up stacked")}
    ),
    "DeBERTa": Model("deberta", {"encoder.layer.*.attention.self.in_proj": (2, "q k v per_head")}),
    "DeBERTa 2": Model(
        "deberta-v2", {}, {"encoder.layer.*.attention.self": (2, "query_proj key_proj value_proj")}
    ),
    "ALBERT": Model(
        "albert", {}, {"encoder.albert_layer_groups.*.albert_layers.*.attention": (1, "query key value")}
    ),
    "Mamba": Model(
        "mamba", {}, {}, {"layers.*.mixer.in_proj": _STATE_SPACE, "layers.*.mixer.x_proj": _STATE_SPACE}
    ),
    "Jamba": Model(
        "jamba",
        {},
        {"layers.*.self_attn": (1, _Q), "layers.*.feed_forward": (1, _G)},
        {"layers.*.mamba.in_proj": _STATE_SPACE, "layers.*.mamba.x_proj": _STATE_SPACE},
    ),
    "Qwen2-VL": Model(
        "qwen2_vl",
        {"visual.blocks.*.attn.qkv": (2, "q k v stacked")},
        {"language_model.layers.*.self_attn": (2, _Q), "language_model.layers.*.mlp": (2, _G)},
    ),
    # Not in every list of names, but of a kind of their own.
    "Qwen3-Next": Model(
        "qwen3_next",
        {
            "layers.*.linear_attn.in_proj_qkvz": (1, "q k v z grouped"),
            "layers.*.linear_attn.in_proj_ba": (1, "b a grouped"),
            "layers.*.self_attn.q_proj": (1, "q gate per_head"),
        },
        {"layers.*.self_attn": (1, _Q), "layers.*.mlp.shared_expert": (2, _G)},
    ),
    "SigLIP": Model(
        "siglip",
        {"vision_model.head.attention": (1, "q k v stacked")},  # nn.MultiheadAttention
        {f"{side}_model.encoder.layers.*.self_attn": (2, _Q) for side in ("text", "vision")},
    ),
    "MobileViT 2": Model(
        "mobilevitv2",
        {"encoder.layer.*.transformer.layer.*.attention.qkv_proj.convolution": (9, "q k v stacked")},
    ),
    "SqueezeBERT": Model("squeezebert", {}, {"encoder.layers.*.attention": (2, "query key value")}),
    "I-BERT": Model("ibert", {}, {}, {"encoder.layer.*.attention.self": "QuantLinear has weight_bit"}),
    "XLNet": Model("xlnet", {}, {}, {"layer.*.rel_attn": "bare parameters"}),
}  # fmt: skip


def kind_of_path(path: str) -> str:
    """A path with `*` for every number of a layer."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def fused_in(model: nn.Module) -> Iterator[families.FusedProjection]:
    for found in families.fused_projections(model):
        if isinstance(found, families.FusedProjection):
            yield found


def counted(found: list[tuple[str, str]]) -> Found:
    return {path: (count, parts) for (path, parts), count in Counter(found).items()}


def plans(model: nn.Module, unreached: str = "") -> Iterator[Plan]:
    """One that splits and one that joins everything (that is reached)."""
    split = [Split(found.path) for found in fused_in(model)]
    separate = [s for s in families.separate_projections(model) if not (unreached and s.path.startswith(unreached))]
    joined = [Join(one.path, parts=one.parts, name=f"joined{number}") for number, one in enumerate(separate)]
    everything: tuple[list[Edit], ...] = ([*split], [*joined])
    yield from (Plan(edits) for edits in everything if edits)


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request: pytest.FixtureRequest) -> Model:
    found: Model = request.param
    return found


def test_what_is_found(model: Model) -> None:
    made, _ = model.make()
    fused = counted([(kind_of_path(f.path), f"{' '.join(f.roles)} {f.layout}") for f in fused_in(made)])
    separate = counted([(kind_of_path(s.path), " ".join(s.parts)) for s in families.separate_projections(made)])
    refusals = [found for found in families.fused_projections(made) if isinstance(found, families.Refusal)]
    refused = {kind_of_path(one.path): one.reason for one in (*refusals, *families.separate_refusals(made))}
    assert fused == model.fused
    assert separate == model.separate
    assert set(refused) == set(model.refused)
    assert all(words in refused[path] for path, words in model.refused.items())


def test_everything_found_is_split_and_joined_and_comes_back(model: Model, tmp_path: Path) -> None:
    made, inputs = model.make()
    before, modules, original = snapshot(made), tree(made), copy.deepcopy(made)
    for number, plan in enumerate(plans(made, model.unreached)):
        folder = tmp_path / str(number)
        rewire.apply_(made, plan)
        proof = rewire.prove(original, made, inputs=[inputs])
        assert proof.passed, [check for check in proof.checks if not check.passed]

        rewire.save(made, folder / "original")
        plain = type(made).from_pretrained(folder / "original")
        assert equal(plain, before)
        loaded = rewire.load(folder / "original", plan, model_class=type(made))
        assert same(snapshot(loaded), snapshot(made))
        assert size(loaded) == size(made)
        rewire.save(made, folder / "edited", "edited")
        assert same(snapshot(rewire.load(folder / "edited", model_class=type(made))), snapshot(made))
        made.save_pretrained(folder / "transformers")
        assert equal(type(made).from_pretrained(folder / "transformers"), before)

        rewire.revert_(made)
        assert same(snapshot(made), before)
        assert tree(made) == modules
    assert same(snapshot(made), before)


def size(model: PreTrainedModel) -> tuple[int, int]:
    """What its receipt says: parameters and bytes."""
    receipt = rewire.receipt(model)
    assert receipt is not None
    return receipt.after.parameters, receipt.after.bytes


def equal(model: nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    now = snapshot(model)
    return set(now) == set(tensors) and all(torch.equal(now[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["Mamba", "I-BERT", "XLNet"])
def test_a_model_without_projections_stays_what_it_is(name: str) -> None:
    made, _ = MODELS[name].make()
    before, modules = snapshot(made), tree(made)
    plan = Plan([Split("@attention", optional=True), Split("@mlp", optional=True), Split("**", optional=True)])
    receipt = rewire.apply_(made, plan)
    assert receipt.count("changed") == 0
    for path in MODELS[name].refused:
        with pytest.raises(rewire.RewireError):
            rewire.apply_(made, Split(path))
    assert same(snapshot(made), before)
    assert tree(made) == modules


def test_the_third_model_within_moshi() -> None:
    made, _ = MODELS["Moshi"].make()
    codes = torch.randint(0, 8, (1, made.config.audio_encoder_config.num_quantizers, 6))
    with torch.no_grad():
        before = made.audio_encoder.decode(codes).audio_values
        receipt = rewire.apply_(made, Join("@attention(audio_encoder.**)", parts=tuple(_Q.split())))
        torch.testing.assert_close(made.audio_encoder.decode(codes).audio_values, before, rtol=1e-4, atol=1e-5)
    assert receipt.count("changed") == 4


# ---------------------------------------------------------------- shared weights


@pytest.mark.parametrize(("name", "copies"), [("Zamba", 2), ("ALBERT", 1)])
def test_shared_weights_are_edited_counted_and_saved_once(name: str, copies: int, tmp_path: Path) -> None:
    made, _ = MODELS[name].make()
    parts = tuple(("query key value" if name == "ALBERT" else _Q).split())
    receipt = rewire.apply_(made, Join("@attention", parts=parts, name="qkv"))
    assert (receipt.count("changed"), receipt.before) == (1, receipt.after)
    joined = [module for path, module in made.named_modules() if path.endswith(".qkv")]
    assert len(joined) == copies
    assert len({id(module.weight) for module in joined}) == 1
    for layout in ("original", "edited"):
        rewire.save(made, tmp_path / layout, layout)
        size = sum(file.stat().st_size for file in (tmp_path / layout).glob("*.safetensors"))
        assert size < 1.1 * receipt.after.bytes
        again = rewire.load(tmp_path / layout, model_class=type(made))
        assert len({id(module.weight) for path, module in again.named_modules() if path.endswith(".qkv")}) == 1
        assert same(snapshot(again), snapshot(made))
    with torch.no_grad():
        joined[0].weight.mul_(2)
    rewire.revert_(made)
    places = [module for path, module in made.named_modules() if path.endswith(parts[0])]
    assert len({id(module.weight) for module in places}) == 1


def test_one_of_two_places_that_share_their_weights_is_enough() -> None:
    made, _ = MODELS["Zamba"].make()
    paths = [path for path, module in made.named_modules() if path.endswith("shared_transf.self_attn")]
    receipt = rewire.apply_(made, Join(paths[1], parts=tuple(_Q.split())))
    assert "and so in" in receipt.decisions[0].detail
    assert all(hasattr(made.get_submodule(path), "qkv_proj") for path in paths)


# ---------------------------------------------------------------- targets by structure


def test_the_attention_of_torch_is_a_target() -> None:
    made, _ = MODELS["SigLIP"].make()
    rewire.apply_(made, Plan([Freeze("**"), Unfreeze("@attention(vision_model.head.**)")]))
    trained = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    assert {name.removeprefix("vision_model.head.attention.") for name in trained} == {
        "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"
    }  # fmt: skip
    rewire.apply_(made, Split("@attention", into=("q", "k", "v")))
    attention = made.get_submodule("vision_model.head.attention")
    assert {name for name, _ in attention.named_children()} == {"q", "k", "v", "out_proj"}


def test_an_adapter_on_a_part_of_the_attention_of_torch() -> None:
    made, inputs = MODELS["SigLIP"].make()
    rewire.apply_(made, Plan([Split("vision_model.head.attention"), Lora("vision_model.head.attention.v", r=2)]))
    with torch.no_grad():
        before = made(**inputs.kwargs).image_embeds.clone()
        adapter = next(p for n, p in made.named_parameters() if "lora_B" in n)
        adapter.fill_(1.0)
        assert not torch.allclose(made(**inputs.kwargs).image_embeds, before)


def test_a_name_that_the_attention_of_torch_has_already() -> None:
    made, _ = MODELS["SigLIP"].make()
    with pytest.raises(rewire.RewireError, match="'out_proj', which an nn"):
        rewire.apply_(made, Split("vision_model.head.attention", into=("q", "k", "out_proj")))


def test_parts_within_wrappers_are_named_with_them() -> None:
    made, _ = MODELS["Moshi"].make()
    with pytest.raises(rewire.RewireError, match=r"q_proj: MoshiLinear is not a linear layer"):
        rewire.apply_(made, Join("decoder.model.layers.*.self_attn", parts=tuple(_Q.split())))
    with pytest.raises(NoMatchError):
        rewire.apply_(made, Join("@attention(decoder.**)", parts=tuple(_Q.split())))
    parts = ("q_proj.linear", "k_proj.linear", "v_proj.linear")
    receipt = rewire.apply_(made, Join("@attention(*decoder.**)", parts=parts))
    assert receipt.count("changed") == 4
    assert made.get_submodule("depth_decoder.layers.0.self_attn.qkv_proj").weight.ndim == 3
