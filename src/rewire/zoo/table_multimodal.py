"""The part of the table for multimodal models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewire.zoo.entry import Draw, Entry

_IMAGE = 60
"""A token that stands for a piece of an image, where the default configuration names none."""

_PIXELS = {f"IMGIMG{letter}Z": 10 + index for index, letter in enumerate("ABCDEFGH")}
"""Names and tokens of image codes, for models that write images as tokens of their vocabulary."""

_VISUAL = {f"<|visual token {code:06d}|>": 10 + code for code in range(8)}
"""The same in another spelling."""

_CODES: dict[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 1, 2], "num_res_blocks": 1}
"""A small encoder of images as codes: its groups of channels are 32."""


_RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 32, 64], "depths": [1, 1, 1, 1]}
_ROTATION = {"rope_type": "default", "rope_theta": 10000.0}

_FEW_BLOCKS = Entry("the last stages of its backbone are wide", then={"backbone_config.depths": (2, 1, 1, 1)})


def _towers(family: str) -> dict[str, Any]:
    """A tower for images and one for sound."""
    return {f"{tower}_config": {"model_type": f"{family}_{tower}"} for tower in ("vision", "audio")}


def _under(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the configuration `name` inside another, by dotted name."""
    return {f"{name}.{key}": value for key, value in values.items()}


ENTRIES: dict[str, Entry] = {
    "aria": Entry(
        "queries for every number of patches stand in the configuration",
        then={"projector_patch_to_query_dict": {16: 8}},
    ),
    "blip-2": Entry("the default names no image token", given={"image_token_index": _IMAGE}),
    "instructblip": Entry("the default names no image token", given={"image_token_index": _IMAGE}),
    "gemma3": Entry("an image of 16 patches becomes 4 tokens", then={"mm_tokens_per_image": 4}),
    "t5gemma2": Entry("an image of 16 patches becomes 4 tokens", then={"encoder.mm_tokens_per_image": 4}),
    "chameleon": Entry(
        "the default has no map of image codes into the vocabulary",
        given={"vocabulary_map": {"<image>": _IMAGE, **_PIXELS}},
        then=_under(
            "vq_config", {**_CODES, "latent_channels": 32, "embed_dim": 32, "num_embeddings": 8, "resolution": 16}
        ),
    ),
    "emu3": Entry(
        "the default has no map of image codes into the vocabulary",
        given={"vocabulary_map": {"<image>": _IMAGE, "<|extra_200|>": 59, **_VISUAL}},
        then=_under("vq_config", {**_CODES, "codebook_size": 8, "attn_resolutions": [2]}),
    ),
    "janus": Entry(
        "groups of channels are 32, and the default tower is not as wide as the text",
        then={
            **_under("vq_config", {**_CODES, "latent_channels": 32, "num_patches": 4}),
            "vision_config.projection_dim": 64,
        },
    ),
    "llama4": Entry(
        "the default sizes of its vision tower do not fit each other",
        then=_under(
            "vision_config",
            {"intermediate_size": 256, "projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64},
        ),
    ),
    "mllama": Entry(
        "outputs of layers named by number stand side by side",
        then=_under("vision_config", {"intermediate_layers_indices": [0, 1], "vision_output_dim": 3 * 64}),
    ),
    "kosmos-2": Entry("an image takes 64 places of every text", then={"latent_query_num": 8}),
    "kosmos-2.5": Entry("an image takes 2048 places of every text", then={"latent_query_num": 8}),
    "tvp": Entry("frames are framed in a prompt of pixels", then={"max_img_size": 64, "visual_prompt_size": 8}),
    "molmo2": Entry(
        "places of patches are counted, and layers whose outputs are used are named by number",
        then={"vision_config.num_position_embeddings": 16, "adapter_config.vision_feature_layer": [-1, -2]},
    ),
    "paddleocr_vl": Entry(
        "the axes of positions share the features of a head, which the default does not write down",
        then={"text_config.rope_parameters": {**_ROTATION, "mrope_section": [3, 3, 2]}},
    ),
    "gemma4": Entry("the default has no towers", given=_towers("gemma4")),
    "gemma4_unified": Entry("the default has no towers", given=_towers("gemma4_unified")),
    "dots3_note": Entry(
        "the sound's convolutions end in the width that they are joined to",
        then={"audio_config.conv_output_size": 32, "audio_config.adapter_input_size": 64},
    ),
    "instructblipvideo": Entry("the default names no video token", given={"video_token_index": _IMAGE}),
    "fast_vlm": Entry(
        "the default tower is one of timm; any that gives a map of features fits",
        given={"vision_config": _RESNET},
        then={"vision_config.hidden_size": 64},
    ),
    "perception_lm": Entry(
        "the default tower is one of timm",
        given={"vision_config": {"model_type": "vit", "model_args": {"embed_dim": 64}}},
    ),
    "omdet-turbo": Entry(
        "the default backbone is one of timm; Swin's maps of features have their channels first; names are wider than "
        "what looks for them",
        given={"use_timm_backbone": False, "apply_layernorm_after_vision_backbone": False},
        then={
            "encoder_in_channels": (48, 96, 192),
            "backbone_config.depths": (2, 1, 1, 1),
            "class_embed_dim": 96,
            "text_projection_in_dim": 96,
            "text_projection_out_dim": 96,
            "text_config.hidden_size": 96,
        },
    ),
    "grounding-dino": _FEW_BLOCKS,
    "mm-grounding-dino": _FEW_BLOCKS,
    "phi4_multimodal": Entry(
        "the model cannot be asked how many tokens its images and sounds take: 13 for two pieces, one for 8 frames",
        then=_under(
            "audio_config",
            {"depthwise_separable_out_channel": 64, "ext_pw_out_channel": 64, "nemo_conv_channels": 64},
        ),
        inputs={
            "input_ids": Draw(values=[[3, 4, *[125] * 13, 5, 6, *[124] * 6, 7, 8, 9]]),
            "image_pixel_values": Draw((1, 2, 3, 56, 56)),
            "image_sizes": Draw(values=[[56, 56]]),
            "image_attention_mask": Draw((1, 2, 4, 4), "constant", 1, dtype="long"),
            "audio_input_features": Draw((1, 48, 80)),
            "audio_embed_sizes": Draw(values=[6]),
        },
        only=True,
    ),
    "paligemma": Entry("counts the patches of an image", then={"text_config.num_image_tokens": 16}),
    "pi0": Entry("counts the patches of an image", then={"vlm_config.text_config.num_image_tokens": 16}),
    "embedding_gemma2": Entry("the default has no towers", given=_towers("gemma4")),
    "cohere_compass": Entry(
        "the default has no rotation for its layers",
        given={
            "text_config": {
                "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 10,
                "rope_parameters": {"sliding_attention": _ROTATION, "full_attention": _ROTATION},
            }
        },
    ),
    "hunyuan_vl": Entry("the default has no size of heads", given={"text_config": {"head_dim": 128}}),
    "qwen4_exp": Entry(
        "the default has no sizes for the choice of positions",
        given={
            "text_config": {
                "indexer_n_heads": 4,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 256,
                "indexer_budget": 8,
                "indexer_compress_ratio": 4,
            }
        },
    ),
    "granite4_vision": Entry(
        "the default does not say which features of the tower go to which layer of the text",
        given={
            "downsample_rate": "2/4",
            "deepstack_layer_map": [[0, 0], [1, 1]],
            "spatial_target_layers": [0, 1, 0, 1],
            "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
        },
        then={
            "vision_config.hidden_size": 128,
            "qformer_config.hidden_size": 128,
            "qformer_config.encoder_hidden_size": 128,
            "qformer_config.num_attention_heads": 2,
        },
    ),
    "bros": Entry("projected boxes are as wide as a head", then={"dim_bbox_projection": 16}),
    "lilt": Entry("six coordinates share the width of the layout", then={"hidden_size": 96, "intermediate_size": 192}),
    "layoutlmv3": Entry(
        "four coordinates and two sides share the width", then={"coordinate_size": 12, "shape_size": 8}
    ),
    "deepseek_ocr2": Entry(
        "the default sizes of the two encoders differ, and of experts for a token there is no default",
        given={
            "vision_config": {"encoder_config": {"hidden_size": 896}},
            "text_config": {
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "mlp_layer_types": ["dense", *["sparse"] * 31],
            },
        },
        then={"vision_config.sam_config.downsample_channels": [32, 64]},
    ),
    "unlimited_ocr": Entry(
        "the two encoders meet in width", then={"vision_config.sam_config.downsample_channels": [32, 64]}
    ),
    "vipllava": Entry("layers whose outputs are used are named by number", then={"vision_feature_layers": [-2, -1]}),
    "step3p7": Entry(
        "the default has no window and no number of heads for it",
        given={
            "text_config": {
                "sliding_window": 8,
                "num_sliding_attention_heads": 96,
                "layer_types": ["full_attention", *["sliding_attention"] * 3, "full_attention"] * 9,
            }
        },
        then={"vision_config.mlp_ratio": 2.25},
    ),
}

#: Types of which no model can be made or run here, and why; every reason lies outside Rewire.
UNAVAILABLE: dict[str, str] = {
    "gemma3n": "its configuration admits no other vision tower than one of timm, which needs torchvision",
    "layoutlmv2": "needs detectron2, which is not on the package index",
}
