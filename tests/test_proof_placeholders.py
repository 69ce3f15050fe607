"""Inputs that put images, videos and sounds into a text: which tokens, how many, and what comes with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rewire import hf_seam
from rewire.proof import Case, cases_for
from rewire.proof.execution import forward
from rewire.proof.facts import Facts
from rewire.proof.placeholders import AUDIO, IMAGE, VIDEO, mixed, together
from rewire.zoo import tiny_model


def first_case(model_type: str) -> tuple[hf_seam.PreTrainedModel, Case]:
    """A tiny model and the first of its cases."""
    model = tiny_model(model_type)
    return model, cases_for(model, (0,))[0]


def count(case: Case, token: int) -> int:
    """How often a token stands in the text."""
    return int((case.kwargs["input_ids"] == token).sum())


def test_an_image_and_a_video_share_a_text() -> None:
    model, case = first_case("qwen2_vl")
    assert case.name == "len 19, batch 1, with image, with video, seed 0"
    assert count(case, model.config.image_token_id) == count(case, model.config.video_token_id) == 4
    assert case.kwargs["mm_token_type_ids"].unique().tolist() == [0, 1, 2]


def test_placeholders_stand_between_the_tokens_around_them() -> None:
    model, case = first_case("qwen2_vl")
    text = case.kwargs["input_ids"][0].tolist()
    start = text.index(model.config.image_token_id)
    assert text[start - 1] == model.config.vision_start_token_id
    assert text[start + 4] == model.config.vision_end_token_id


def test_videos_stand_apart_where_the_model_takes_their_places_for_images() -> None:
    model = tiny_model("glm4v")
    facts = Facts.of(model)
    assert together(facts, mixed(facts)) == ((IMAGE,), (VIDEO,))
    names = [case.name for case in cases_for(model, (0,))]
    assert sum("with image" in name for name in names) == sum("with video" in name for name in names) == 1
    video = next(case for case in cases_for(model, (0,)) if "with video" in case.name)
    assert "pixel_values" not in video.kwargs
    assert count(video, model.config.image_token_id) == 4


def test_a_tower_that_is_left_out_takes_nothing() -> None:
    model = tiny_model("gemma4")
    assert mixed(Facts.of(model)) == (IMAGE, VIDEO, AUDIO)
    model.config.audio_config = None
    assert mixed(Facts.of(model)) == (IMAGE, VIDEO)


def test_queries_of_a_bridge_are_counted_by_the_config() -> None:
    model, case = first_case("instructblipvideo")
    assert count(case, model.config.video_token_id) == 4 * model.config.num_query_tokens
    assert case.kwargs["pixel_values"].shape[:2] == (1, 4)


def test_a_model_that_cannot_do_without_images_gets_them_in_every_case() -> None:
    cases = cases_for(tiny_model("blip-2"), (0,))
    assert [case.kwargs["input_ids"].shape[0] for case in cases] == [1, 2]
    assert all("with image" in case.name for case in cases)


def test_large_images_come_in_pieces() -> None:
    model, case = first_case("llava_next")
    height, width = case.kwargs["image_sizes"][0].tolist()
    side = model.config.vision_config.image_size
    assert case.kwargs["pixel_values"].shape == (1, 1 + height * width // side**2, 3, side, side)


def test_a_text_alone_has_nothing_of_an_image() -> None:
    cases = [case for case in cases_for(tiny_model("lfm2_vl"), (0,)) if "with image" not in case.name]
    assert cases
    assert all(not {"pixel_values", "spatial_shapes", "pixel_attention_mask"} & set(case.kwargs) for case in cases)


@pytest.mark.parametrize(
    "model_type",
    ["idefics3", "mllama", "kosmos-2", "molmo2", "gemma4", "muse_spark", "paddleocr_vl", "udop", "omdet-turbo", "pi0"],
)
def test_every_case_runs(model_type: str) -> None:
    model = tiny_model(model_type)
    for case in cases_for(model):
        found = forward(model, case)
        assert all(bool(value.isfinite().all()) for value in found.values() if value.is_floating_point())


def test_an_image_changes_the_text() -> None:
    model, case = first_case("qwen3_vl")
    changed = Case("another image", {**case.kwargs, "pixel_values": -case.kwargs["pixel_values"]})
    before, after = (last_state(model, one) for one in (case, changed))
    assert not torch.equal(before[:, -1], after[:, -1])


def last_state(model: hf_seam.PreTrainedModel, case: Case) -> Tensor:
    """The last hidden state, (batch, length, width)."""
    return forward(model, case)["last_hidden_state"]
