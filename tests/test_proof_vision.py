"""Inputs of vision models: patches as lists, images that belong together, and sessions of trackers."""

from __future__ import annotations

import pytest
import torch

from rewire import prove
from rewire.proof import cases_for
from rewire.proof.execution import forward, forward_with_graph
from rewire.proof.facts import Facts
from rewire.proof.patches import grid_side, patch_numbers, pixel_shape
from rewire.proof.sessions import FRAME, VideoSession
from rewire.zoo import tiny_model

TRACKERS = ("sam2_video", "edgetam_video", "sam3_tracker_video", "sam3_video")


@pytest.mark.parametrize(
    ("model_type", "shape"),
    [
        ("vit", (3, 3, 64, 64)),
        ("qwen2_5_vl_vision", (48, 1176)),  # 16 patches of 2 · 3 · 14 · 14 numbers an image
        ("siglip2_vision_model", (3, 16, 768)),  # filled up to as many patches for each image
        ("kimi_k25_vision", (48, 3, 14, 14)),  # patches as images of their own
        ("minicpm_ocr_vision", (1, 3, 16, 768)),  # 48 patches in a row
        ("lightglue", (3, 2, 3, 64, 64)),  # two images to match
        ("seggpt", (3, 3, 64, 64)),  # the config counts 128 rows, half of them the prompt's
        ("depth_pro", (3, 3, 224, 224)),  # a quarter of it is an image of the encoder
    ],
)
def test_pixels_come_as_the_model_takes_them(model_type: str, shape: tuple[int, ...]) -> None:
    facts = Facts.of(tiny_model(model_type))

    assert pixel_shape(facts, 3) == shape


def test_the_layer_that_embeds_patches_tells_their_size() -> None:
    facts = Facts.of(tiny_model("glm4v_vision"))

    assert patch_numbers(facts) == 2 * 3 * 14 * 14
    assert grid_side(facts) == 4


def test_patches_that_only_fill_up_are_masked() -> None:
    case = cases_for(tiny_model("siglip2_vision_model"))[2]

    assert case.kwargs["spatial_shapes"].tolist() == [[4, 4], [3, 4], [4, 4]]
    assert case.kwargs["pixel_attention_mask"].sum(1).tolist() == [16, 12, 16]


@pytest.mark.parametrize("model_type", TRACKERS)
def test_a_session_is_made_anew_for_each_forward(model_type: str) -> None:
    model = tiny_model(model_type)
    case = cases_for(model)[0]

    first, second = forward(model, case), forward(model, case)

    assert first.keys() == second.keys()
    assert len(first) > 2
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_session_holds_one_object_for_each_row_and_a_click_on_the_second_frame() -> None:
    model = tiny_model("sam2_video")
    case = cases_for(model)[2]
    session = case.kwargs["inference_session"].fresh(torch.device("cpu"), torch.float64)

    assert isinstance(case.kwargs["inference_session"], VideoSession)
    assert session.get_obj_num() == 3
    assert session.num_frames == 2
    assert session.point_inputs_per_obj[2][FRAME]["point_coords"].dtype == torch.float64


def test_what_a_tracker_remembers_is_compared_too() -> None:
    outputs = forward(tiny_model("edgetam_video"), cases_for(tiny_model("edgetam_video"))[0])

    assert {"output.pred_masks", "inference_session.0.maskmem_features"} <= outputs.keys()


def test_gradients_reach_through_a_forward_in_inference_mode() -> None:
    model = tiny_model("sam3_tracker_video")
    with torch.enable_grad():
        outputs = forward_with_graph(model, cases_for(model)[0])

    assert outputs["output.pred_masks"].requires_grad


def test_a_tracker_is_proven_equal_to_itself() -> None:
    proof = prove(tiny_model("sam2_video"), tiny_model("sam2_video"))

    assert proof.passed
    assert any(check.name.startswith("gradients") for check in proof.checks)
