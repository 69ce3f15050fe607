"""The part of the table for vision models."""

from __future__ import annotations

from typing import Any

from rewire.zoo.entry import Draw, Entry

_RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage4"],
}
_LCNET_V3 = {
    "model_type": "pp_lcnet_v3",
    "block_configs": [
        [[3, 16, 16, 1, False]],
        [[3, 16, 32, 2, False], [3, 32, 32, 1, False]],
        [[3, 32, 32, 2, False], [3, 32, 32, 1, False]],
        [[3, 32, 64, 2, False], [5, 64, 64, 1, False]],
        [[5, 64, 64, 2, True], [5, 64, 64, 1, False]],
    ],
    "conv_symmetric_num": 2,
    "out_features": ["stage2", "stage3", "stage4", "stage5"],
}


def _lcnet_v4(stride: Any, outputs: int) -> dict[str, Any]:
    """A backbone whose later stages have this stride, and that gives the outputs of its last stages."""
    return {
        "model_type": "pp_lcnet_v4",
        "stem_channels": [3, 16, 16],
        "block_configs": [
            [[3, 16, 16, 1, True]],
            [[3, 16, 16, 1 if outputs == 1 else 2, False], [3, 16, 16, 1, False]],
            [[3, 16, 32, stride, False], [3, 32, 32, 1, True]],
            [[3, 32, 64, stride, False], [3, 64, 64, 1, True]],
        ],
        "out_features": [f"stage{stage}" for stage in range(5 - outputs, 5)],
    }


_STRIPES = {  # kernel, stride and padding of the convolutions of a block, after the published models
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
    "vertical_long_to_small_conv_longratio": [[7, 1], [1, 1], [3, 0]],
    "vertical_long_to_small_conv_midratio": [[5, 1], [1, 1], [2, 0]],
    "vertical_long_to_small_conv_shortratio": [[3, 1], [1, 1], [1, 0]],
    "horizontal_small_to_long_conv_longratio": [[1, 7], [1, 1], [0, 3]],
    "horizontal_small_to_long_conv_midratio": [[1, 5], [1, 1], [0, 2]],
    "horizontal_small_to_long_conv_shortratio": [[1, 3], [1, 1], [0, 1]],
    "symmetric_conv_long_longratio": [[7, 7], [1, 1], [3, 3]],
    "symmetric_conv_long_midratio": [[5, 5], [1, 1], [2, 2]],
    "symmetric_conv_long_shortratio": [[3, 3], [1, 1], [1, 1]],
}
_UVDOC = {
    "model_type": "uvdoc_backbone",
    "resnet_head": [[3, 16], [16, 16]],
    "resnet_configs": [
        [[16, 16, 1, False], [16, 16, 3, False]],
        [[16, 16, 1, True], [16, 16, 3, False]],
        [[16, 32, 1, True], [32, 32, 3, False]],
    ],
    "stage_configs": [[[32, 1]], [[32, 2]], [[32, 3]], [[32, 3], [32, 2]], [[32, 4], [32, 3]], [[32, 4], [32, 2]]],
    "out_features": [f"stage{stage}" for stage in range(1, 7)],
}


def _without_timm(levels: int = 1) -> dict[str, Any]:
    """Values for a detector with a backbone of Transformers in place of one of timm."""
    features = [f"stage{stage}" for stage in range(5 - levels, 5)]
    return {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": {**_RESNET, "out_features": features},
    }


def _minicpm(**given: Any) -> Entry:
    return Entry(
        "the default names no tokens for images and videos, and tells twice behind which layer patches are merged",
        given={"image_token_id": 100, "video_token_id": 101, **given},
        then={"insert_layer_id": 1},
    )


ENTRIES: dict[str, Entry] = {
    "conditional_detr": Entry("the default backbone is one of timm", given=_without_timm()),
    "dab-detr": Entry("the default backbone is one of timm", given=_without_timm()),
    "detr": Entry("the default backbone is one of timm", given=_without_timm()),
    "table-transformer": Entry("the default backbone is one of timm", given=_without_timm()),
    "deformable_detr": Entry("the default backbone is one of timm", given=_without_timm(3)),
    "bit": Entry("groups of channels have to divide the widths", then={"num_groups": 8}),
    "cvt": Entry(
        "every stage takes its drop rate from a list as long as the layers of that stage", then={"depth": (1, 2, 3)}
    ),
    "depth_pro": Entry(
        "a patch is an image of the encoders; layers whose outputs are used are named by number",
        then={"patch_size": 56, "intermediate_hook_ids": (1, 0)},
    ),
    "efficientloftr": Entry(
        "the rotation fills half the width only with as many heads as the default has; widths follow from each other",
        given={"out_features": [16, 16, 32, 64], "hidden_size": 64, "stage_num_blocks": [1, 1, 2, 2]},
        then={"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8},
    ),
    "edgetam": Entry(
        "the default encoder wraps a model of timm; SAM 2's fits as well",
        given={"vision_config": {"model_type": "sam2_vision_model"}},
    ),
    "edgetam_video": Entry(
        "as many latents as there are places in a small image, as wide as the memory",
        then={
            "perceiver_resampler_hidden_size": 64,
            "perceiver_resampler_attention_head_dim": 64,
            "perceiver_resampler_num_latents": 4,
            "perceiver_resampler_num_latents_2d": 4,
            "memory_attention_rope_k_sizes": [2, 2],
        },
    ),
    "lw_detr": Entry(
        "the default tells no scales for its projector; other groups of queries are for training alone",
        given={"projector_scale_factors": [1.0]},
        then={"group_detr": 1, "backbone_config.num_windows": 4, "backbone_config.num_windows_side": 2},
    ),
    "minicpm_ocr": _minicpm(downsample_mode="16x"),
    "minicpmv4_6": _minicpm(),
    "minicpmv4_7": _minicpm(),
    "rf_detr": Entry("other groups of queries are for training alone", then={"group_detr": 1}),
    "mobilenet_v1": Entry("widths follow from one factor", then={"depth_multiplier": 0.125}),
    "mobilenet_v2": Entry("widths follow from one factor", then={"depth_multiplier": 0.25}),
    "pp_ocrv5_mobile_rec": Entry(
        "widths stand in nested lists; a line of text gives three rows in the end",
        given={"backbone_config": _LCNET_V3},
        inputs={"pixel_values": Draw((1, 3, 96, 64))},
    ),
    "pp_ocrv6_small_rec": Entry("widths stand in nested lists", given={"backbone_config": _lcnet_v4([2, 1], 1)}),
    "pp_ocrv6_tiny_rec": Entry("widths stand in nested lists", given={"backbone_config": _lcnet_v4([2, 1], 1)}),
    "pp_ocrv6_small_det": Entry(
        "the default tells no sizes that fit each other, and stands in nested lists",
        given={"backbone_config": _lcnet_v4(2, 4), "layer_list_out_channels": [16, 16, 32, 64]},
        then={"neck_out_channels": 32},
    ),
    "pp_ocrv6_medium_det": Entry(
        "the default tells no kernels",
        given={
            "backbone_config": _lcnet_v4(2, 4),
            "intraclass_block_config": _STRIPES,
            "scale_factor_list": [1, 2, 4, 8],
            "kernel_list": [3, 2, 2],
        },
        then={"neck_out_channels": 64},
    ),
    "sam3_video": Entry(
        "random weights are sure of nothing: everything found counts, and as something new",
        then={
            "score_threshold_detection": 0.0,
            "new_det_thresh": 0.0,
            "det_nms_thresh": 0.0,
            "assoc_iou_thresh": 2.0,
            "trk_assoc_iou_thresh": 2.0,
        },
    ),
    "uvdoc": Entry(
        "the default takes the outputs of six stages and names one; widths stand in nested lists",
        given={"backbone_config": _UVDOC, "bridge_connector": [32, 32], "out_point_positions2D": [[32, 16], [16, 2]]},
    ),
    "pp_doclayout_v3": Entry("the width of the first stage, named apart", then={"x4_feat_dim": 16}),
}

#: Types of which no model can be made or run here, and why; every reason lies outside Rewire.
_TIMM = "wraps a model of timm, which needs torchvision"
UNAVAILABLE: dict[str, str] = {
    "timm_backbone": _TIMM,
    "timm_wrapper": _TIMM,
    "gemma3n_vision": _TIMM,
    "edgetam_vision_model": _TIMM,
    "pe_video": _TIMM,
    "pe_video_encoder": _TIMM,
    "dinat": "needs natten, which is built for one version of torch and CUDA",
    "glm_image_vqmodel": "has no forward function in this release of Transformers",
}
