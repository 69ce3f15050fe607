"""Inputs for tiny models of many types. The other tests of `rewire.proof` take their models from here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from rewire.errors import ProofError
from rewire.proof import Case, cases_for
from rewire.proof.execution import forward
from rewire.proof.facts import Facts
from rewire.proof.guard import untouched

TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = {
    **TEXT,
    "intermediate_size": 40,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "image_size": 16,
    "patch_size": 4,
}
BART: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
WAVE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}

Builder = Callable[[], nn.Module]


def of(model: str, config: str, **options: Any) -> Builder:
    """A builder of `model` from `config`, both classes of Transformers by name."""
    return lambda: getattr(tf, model)(getattr(tf, config)(**options))


def sam_config() -> Any:
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "output_channels": 16,
        "image_size": 64,
        "patch_size": 8,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 64,
        "num_pos_feats": 8,
        "initializer_range": 0.02,
    }
    decoder = {
        "hidden_size": 16,
        "mlp_dim": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "iou_head_hidden_dim": 16,
    }
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4, "image_embedding_size": 8}
    return tf.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)


def clip_config(cls: str) -> Any:
    text = {**TEXT, "projection_dim": 16, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    extra = {} if cls == "SiglipConfig" else {"projection_dim": 16}
    return getattr(tf, cls)(text_config=text, vision_config={**VISION, "projection_dim": 16}, **extra)


def llava_config() -> Any:
    text = tf.LlamaConfig(**GROUPED)
    vision = tf.CLIPVisionConfig(**VISION)
    return tf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=98, vision_feature_layer=-1)


def qwen2_vl_config() -> Any:
    text = {**GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
    ids = {"image_token_id": 97, "video_token_id": 96, "vision_start_token_id": 95, "vision_end_token_id": 94}
    return tf.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)


WHISPER: dict[str, Any] = {
    **{key: value for key, value in BART.items() if key != "max_position_embeddings"},
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "decoder_start_token_id": 3,
    "bos_token_id": 3,
    "eos_token_id": 3,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
T5: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
MAMBA: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}

MODELS: dict[str, Builder] = {
    "bert": of("BertModel", "BertConfig", **TEXT),
    "bert-mlm": of("BertForMaskedLM", "BertConfig", **TEXT),
    "bert-multiple-choice": of("BertForMultipleChoice", "BertConfig", **TEXT),
    "bert-qa": of("BertForQuestionAnswering", "BertConfig", **TEXT),
    "roberta": of("RobertaModel", "RobertaConfig", **TEXT),
    "xlm-roberta": of("XLMRobertaForTokenClassification", "XLMRobertaConfig", **TEXT),
    "distilbert": of(
        "DistilBertModel", "DistilBertConfig", vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=37,
        max_position_embeddings=64,
    ),
    "albert": of("AlbertModel", "AlbertConfig", **TEXT, embedding_size=16),
    "electra": of("ElectraModel", "ElectraConfig", **TEXT, embedding_size=16),
    "mpnet": of("MPNetModel", "MPNetConfig", **TEXT),
    "deberta": of("DebertaModel", "DebertaConfig", **TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": of("DebertaV2Model", "DebertaV2Config", **TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "modernbert": of("ModernBertModel", "ModernBertConfig", **TEXT, pad_token_id=0),
    "longformer": of("LongformerModel", "LongformerConfig", **TEXT, attention_window=4),
    "gpt2": of("GPT2LMHeadModel", "GPT2Config", vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt2-classifier": of(
        "GPT2ForSequenceClassification", "GPT2Config", vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        pad_token_id=0,
    ),
    "gpt-neox": of("GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT),
    "gptj": of("GPTJForCausalLM", "GPTJConfig", vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "opt": of("OPTForCausalLM", "OPTConfig", **TEXT, ffn_dim=37, word_embed_proj_dim=32),
    "bloom": of("BloomForCausalLM", "BloomConfig", vocab_size=99, hidden_size=32, n_layer=2, n_head=4),
    "falcon": of("FalconForCausalLM", "FalconConfig", **TEXT),
    "falcon-new": of("FalconForCausalLM", "FalconConfig", **TEXT, new_decoder_architecture=True, num_kv_heads=2),
    "llama": of("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "mistral": of("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=8),
    "phi3": of("Phi3ForCausalLM", "Phi3Config", **GROUPED),
    "gemma2": of("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, head_dim=8, sliding_window=8),
    "mixtral": of("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4),
    "qwen2": of("Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
    "qwen3": of("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=8),
    "mamba": of("MambaForCausalLM", "MambaConfig", **MAMBA),
    "t5": of("T5ForConditionalGeneration", "T5Config", **T5),
    "t5-encoder": of("T5EncoderModel", "T5Config", **T5),
    "bart": of("BartForConditionalGeneration", "BartConfig", **BART),
    "bart-classifier": of("BartForSequenceClassification", "BartConfig", **BART),
    "marian": of("MarianMTModel", "MarianConfig", **BART, decoder_start_token_id=1),
    "pegasus": of("PegasusModel", "PegasusConfig", **BART),
    "vit": of("ViTModel", "ViTConfig", **VISION),
    "vit-mae": of("ViTMAEModel", "ViTMAEConfig", **VISION),
    "deit": of("DeiTForImageClassification", "DeiTConfig", **VISION),
    "beit": of("BeitModel", "BeitConfig", **VISION, vocab_size=99),
    "dinov2": of("Dinov2Model", "Dinov2Config", **VISION),
    "swin": of(
        "SwinModel", "SwinConfig", image_size=32, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[2, 4],
        window_size=4,
    ),
    "resnet": of("ResNetModel", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    "convnext": of("ConvNextModel", "ConvNextConfig", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32),
    "segformer": of(
        "SegformerModel", "SegformerConfig", hidden_sizes=[8, 16], depths=[1, 1], num_encoder_blocks=2,
        num_attention_heads=[1, 2], sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2],
    ),
    "videomae": of("VideoMAEModel", "VideoMAEConfig", **VISION, num_frames=4, tubelet_size=2),
    "sam": lambda: tf.SamModel(sam_config()),
    "sam-vision": lambda: tf.SamVisionModel(sam_config().vision_config),
    "clip": lambda: tf.CLIPModel(clip_config("CLIPConfig")),
    "clip-text": lambda: tf.CLIPTextModel(clip_config("CLIPConfig").text_config),
    "clip-vision": lambda: tf.CLIPVisionModel(clip_config("CLIPConfig").vision_config),
    "siglip": lambda: tf.SiglipModel(clip_config("SiglipConfig")),
    "llava": lambda: tf.LlavaForConditionalGeneration(llava_config()),
    "qwen2-vl": lambda: tf.Qwen2VLForConditionalGeneration(qwen2_vl_config()),
    "vision-encoder-decoder": lambda: tf.VisionEncoderDecoderModel(
        tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            tf.ViTConfig(**VISION), tf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4)
        )
    ),
    "whisper": of("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER),
    "whisper-classifier": of("WhisperForAudioClassification", "WhisperConfig", **WHISPER),
    "wav2vec2": of("Wav2Vec2Model", "Wav2Vec2Config", **WAVE),
    "hubert": of("HubertModel", "HubertConfig", **WAVE),
    "ast": of(
        "ASTModel", "ASTConfig", **{key: value for key, value in VISION.items() if key != "image_size"},
        num_mel_bins=16, max_length=24, frequency_stride=4, time_stride=4,
    ),
    "speech-to-text": of(
        "Speech2TextForConditionalGeneration", "Speech2TextConfig", **{**BART, "max_position_embeddings": 64},
        max_source_positions=64, max_target_positions=32, input_feat_per_channel=8, conv_channels=16, num_conv_layers=2,
        conv_kernel_sizes=[3, 3], decoder_start_token_id=2,
    ),
}  # fmt: skip


def build(what: str | Builder) -> nn.Module:
    """A tiny model of the table, or of a builder, in evaluation mode."""
    torch.set_num_threads(1)  # faster for tiny models; conftest.py sets it anew for every test
    torch.manual_seed(0)
    return (MODELS[what] if isinstance(what, str) else what)().eval()


@pytest.mark.parametrize("name", MODELS)
def test_inputs_run_on_every_type(name: str) -> None:
    model = build(name)
    with untouched(model):
        cases = cases_for(model)
        assert len(cases) >= 4
        for case in cases:
            outputs = forward(model, case)
            assert outputs
            for key, tensor in outputs.items():
                assert not tensor.isnan().any(), f"{case.name}: {key}"


def case_named(model: nn.Module, part: str) -> Case:
    return next(case for case in cases_for(model) if part in case.name)


def test_texts_have_several_lengths_batches_paddings_and_seeds() -> None:
    cases = cases_for(build("bert"))
    shapes = {tuple(case.kwargs["input_ids"].shape) for case in cases}
    assert {batch for batch, _ in shapes} == {1, 3}
    assert len({length for _, length in shapes}) >= 3
    assert {case.seed for case in cases} == {0, 1}
    for padding in ("right", "left", "hole"):
        assert any(f"{padding} padding" in case.name for case in cases)
    assert len({case.name for case in cases}) == len(cases)


def test_padding_stands_where_the_name_says() -> None:
    model = build("bert")
    right, left, hole = (case_named(model, f"{where} padding").mask for where in ("right", "left", "hole"))
    assert right is not None
    assert left is not None
    assert hole is not None
    assert right[:, 0].all()
    assert not right[1:, -1].any()
    assert left[:, -1].all()
    assert not left[1:, 0].any()
    assert hole[:, 0].all()
    assert hole[:, -1].all()
    assert not hole[1:].all(1).any()
    assert right[0].all()


def test_padding_is_filled_with_the_pad_token_and_nothing_else_is() -> None:
    model = build("llama")
    for case in cases_for(model):
        if case.continuation is not None:
            continue
        assert case.mask is not None
        assert torch.equal(case.kwargs["input_ids"] == 0, ~case.mask)
        assert not {1, 2} & set(case.kwargs["input_ids"].flatten().tolist())


def test_the_mask_is_left_out_where_nothing_is_padded() -> None:
    assert "attention_mask" not in case_named(build("bert"), "len 33").kwargs


def test_lengths_stay_within_the_positions() -> None:
    model = build(of("RobertaModel", "RobertaConfig", **{**TEXT, "max_position_embeddings": 14}))
    lengths = {case.kwargs["input_ids"].shape[1] for case in cases_for(model)}
    assert max(lengths) <= 12
    for case in cases_for(model):
        forward(model, case)


def test_decoders_after_an_encoder_start_as_the_config_says() -> None:
    case = cases_for(build("marian"))[0]
    assert case.kwargs["decoder_input_ids"][:, 0].tolist() == [1]
    assert case.kwargs["decoder_input_ids"].shape[1] != case.kwargs["input_ids"].shape[1]


def test_images_have_the_full_size() -> None:
    shapes = {tuple(case.kwargs["pixel_values"].shape) for case in cases_for(build("sam"))}
    assert shapes == {(1, 3, 64, 64), (3, 3, 64, 64)}


def test_prompts_are_points_and_boxes_inside_the_image() -> None:
    cases = cases_for(build("sam"))
    assert all("input_points" in case.kwargs for case in cases)
    boxes = [case.kwargs["input_boxes"] for case in cases if "input_boxes" in case.kwargs]
    assert boxes
    for box in boxes:
        assert (box[..., 2:] >= box[..., :2]).all()
        assert box.max() <= 64
        assert box.min() >= 0


def test_images_in_texts_get_their_placeholders() -> None:
    model = build("llava")
    case = case_named(model, "with image")
    assert (case.kwargs["input_ids"] == 98).sum() == 16
    others = [one for one in cases_for(model) if one is not case and "with image" not in one.name]
    assert others
    assert all("pixel_values" not in one.kwargs for one in others)
    assert all(not (one.kwargs["input_ids"] == 98).any() for one in others)


def test_large_models_get_few_inputs() -> None:
    with torch.device("meta"):
        model = tf.SamVisionModel(tf.SamVisionConfig())
    assert [tuple(case.kwargs["pixel_values"].shape) for case in cases_for(model)] == [(1, 3, 1024, 1024)] * 2


def test_inputs_are_the_same_every_time() -> None:
    first, second = (cases_for(build("bert")) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.kwargs["input_ids"], other.kwargs["input_ids"])


def test_seeds_give_different_inputs() -> None:
    first, second = (cases_for(build("vit"), seeds=(seed,))[0].kwargs["pixel_values"] for seed in (0, 1))
    assert not torch.equal(first, second)


def test_unknown_inputs_are_an_error_that_names_them() -> None:
    class Odd(nn.Module):
        def forward(self, flux: torch.Tensor) -> torch.Tensor:
            return flux

    with pytest.raises(ProofError, match=r"its forward takes flux.*inputs="):
        cases_for(Odd())


def test_a_text_model_without_vocabulary_is_an_error() -> None:
    class Bare(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    with pytest.raises(ProofError, match="vocabulary size"):
        cases_for(Bare())


def test_facts_look_into_nested_configs() -> None:
    facts = Facts.of(build("clip"))
    assert facts.image_size == (16, 16)
    assert facts.vocab_size == 99
    assert {0, 1, 2} <= facts.special_ids


def test_decoders_continue_from_their_cache() -> None:
    model = build("gpt-neox")
    case = case_named(model, "from the cache")
    assert case.continuation is not None
    outputs = forward(model, case)
    assert outputs["first.logits"].shape[1] == 11
    assert outputs["second.logits"].shape[1] == 2
    assert outputs["first.past_key_values.0.key"].shape[2] == 11
    assert outputs["second.past_key_values.0.key"].shape[2] == 13
    whole = torch.cat([case.kwargs["input_ids"], case.continuation["input_ids"]], dim=1)
    at_once = forward(model, Case("at once", {"input_ids": whole}))["logits"]
    assert torch.allclose(outputs["second.logits"], at_once[:, -2:], atol=1e-5)


def test_encoders_do_not_continue() -> None:
    assert not any(case.continuation for name in ("bert", "bart", "vit") for case in cases_for(build(name)))


def test_a_whole_mask_is_given_in_odd_seeds() -> None:
    given = {case.seed: case.kwargs.get("attention_mask") for case in cases_for(build("bert")) if not case.is_padded}
    assert given[0] is None
    assert given[1] is not None
    assert given[1].all()
