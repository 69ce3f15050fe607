"""The tensors that models for documents, regions and robots take, one maker per argument name.

Boxes of words, features of regions, names of things to find, patches of pages, steps of a robot.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from rewire.proof import fields
from rewire.proof.facts import Facts, lookup
from rewire.proof.fields import Maker, Shape, text
from rewire.proof.fields_multimodal import PARTS, STEPS, patch_positions
from rewire.proof.patches import patch_numbers

BOXES = 1000
"""Boxes of words are given in thousandths of a page."""

REGIONS = 5
"""Regions of an image, where a model takes features of regions."""

WORDS = 5
"""Tokens of the name of a thing."""


# ---------------------------------------------------------------- names of things to find


def classes_input_ids(facts: Facts, shape: Shape) -> Tensor:
    """Names of the things to find in all images, (names, length)."""
    return text(facts, shape, shape.batch * PARTS, WORDS, "classes_input_ids")


def tasks_input_ids(facts: Facts, shape: Shape) -> Tensor:
    """What to do with each image, (batch, length)."""
    return text(facts, shape, shape.batch, WORDS, "tasks_input_ids")


def input_boxes(facts: Facts, shape: Shape) -> Tensor | None:
    """Boxes as `fields.input_boxes` gives them; as fractions beside a text, if torchvision is there to cut them out."""
    if "input_boxes_labels" not in facts.accepts:
        return fields.input_boxes(facts, shape)
    if importlib.util.find_spec("torchvision") is None:
        return None
    middles = 0.25 + 0.5 * torch.rand(shape.batch, PARTS, 4, generator=shape.generator("input_boxes"))
    return middles * torch.tensor([1.0, 1.0, 0.5, 0.5])


def classes_structure(facts: Facts, shape: Shape) -> Tensor:
    """How many of the names belong to each image, (batch,)."""
    return torch.full((shape.batch,), PARTS)


def _all(maker: Maker) -> Maker:
    """Ones of the shape of another argument: all of it counts."""
    return lambda facts, shape: torch.ones_like(maker(facts, shape))


# ---------------------------------------------------------------- documents and regions


def bbox(facts: Facts, shape: Shape) -> Tensor | None:
    """The box of each word as (left, top, right, bottom), (batch, length, 4): thousandths of the page, or fractions."""
    if "input_ids" not in facts.accepts:
        return None
    corners = (
        torch.rand(shape.batch, shape.length, 2, 2, generator=shape.generator("bbox")).sort(dim=2).values.flatten(2)
    )
    limit = lookup(facts.config, "max_2d_position_embeddings")
    if "visual_bbox" in facts.accepts or not isinstance(limit, int):
        return corners
    return (corners * (min(BOXES, limit) - 1)).long()


def visual_feats(facts: Facts, shape: Shape) -> Tensor:
    """Features of regions of an image, (batch, regions, features)."""
    size = (shape.batch, REGIONS, int(lookup(facts.config, "visual_feat_dim")))
    return torch.randn(*size, generator=shape.generator("visual_feats"))


def visual_pos(facts: Facts, shape: Shape) -> Tensor:
    """Boxes of those regions as fractions of the image, (batch, regions, 4)."""
    size = (shape.batch, REGIONS, int(lookup(facts.config, "visual_pos_dim")))
    return torch.rand(*size, generator=shape.generator("visual_pos"))


def visual_embeds(facts: Facts, shape: Shape) -> Tensor:
    """Features of regions of an image, (batch, regions, features)."""
    size = (shape.batch, REGIONS, int(lookup(facts.config, "visual_embedding_dim")))
    return torch.randn(*size, generator=shape.generator("visual_embeds"))


def flattened_patches(facts: Facts, shape: Shape) -> Tensor:
    """Patches behind their row and column, (batch, patches, 2 + numbers of a patch)."""
    places = patch_positions(facts, shape.batch).flip(-1) + 1
    size = (*places.shape[:2], patch_numbers(facts))
    return torch.cat([places, torch.randn(*size, generator=shape.generator("flattened_patches"))], dim=-1)


def action_embeds(facts: Facts, shape: Shape) -> Tensor:
    """The state and the actions of a robot as embedded already, (batch, steps, width)."""
    size = (shape.batch, STEPS, int(lookup(facts.config.dit_config, "hidden_size")))
    return torch.randn(*size, generator=shape.generator("action_embeds"))


MAKERS: dict[str, Maker] = {
    "classes_input_ids": classes_input_ids,
    "classes_attention_mask": _all(classes_input_ids),
    "classes_structure": classes_structure,
    "tasks_input_ids": tasks_input_ids,
    "tasks_attention_mask": _all(tasks_input_ids),
    "input_boxes": input_boxes,
    "bbox": bbox,
    "visual_feats": visual_feats,
    "visual_pos": visual_pos,
    "visual_embeds": visual_embeds,
    "flattened_patches": flattened_patches,
    "action_embeds": action_embeds,
}
