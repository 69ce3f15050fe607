"""The tensors that forward functions of vision models take, one maker per argument name."""

from __future__ import annotations

import math
from typing import Any, get_type_hints

import torch
from torch import Tensor

from rewire.proof.facts import Facts, lookup
from rewire.proof.fields import Maker, Shape, pixel_values, text
from rewire.proof.patches import grid_side
from rewire.proof.sessions import FRAME, VideoSession

QUERIES, ENCODED = 6, 9
"""Length of a sequence of queries, and of the encoded sequence that they look at."""

WORDS = 5
"""Tokens that say what to look for in a video."""


def hidden_states(facts: Facts, shape: Shape) -> Tensor | None:
    """Patches as flat rows, (patches of all images, numbers of a patch), for encoders that call them so."""
    return pixel_values(facts, shape) if "grid_thw" in facts.accepts else None


def grid_thw(facts: Facts, shape: Shape) -> Tensor:
    """Frames, rows and columns of patches of each image, (batch, 3)."""
    side = grid_side(facts)
    return torch.tensor([[1, side, side]] * shape.batch)


def merge_sizes(facts: Facts, shape: Shape) -> Tensor:
    """How many patches in a row become one token, for each image; (batch,)."""
    return torch.full((shape.batch,), 2)


def spatial_shapes(facts: Facts, shape: Shape) -> Tensor:
    """Rows and columns of patches that count, (batch, 2); every second image has a row less than the largest."""
    side = grid_side(facts)
    return torch.tensor([[side - index % 2, side] for index in range(shape.batch)])


def pixel_attention_mask(facts: Facts, shape: Shape) -> Tensor | None:
    """Ones at the patches that count, (batch, patches)."""
    if "spatial_shapes" not in facts.accepts:
        return None
    counts = spatial_shapes(facts, shape).prod(1, keepdim=True)
    return (torch.arange(grid_side(facts) ** 2) < counts).long()


def pixel_position_ids(facts: Facts, shape: Shape) -> Tensor:
    """Column and row of each patch, (batch, patches, 2)."""
    side = grid_side(facts)
    return torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(1).expand(shape.batch, -1, -1).clone()


def target_sizes(facts: Facts, shape: Shape) -> Tensor:
    """Rows and columns of patches of each image, (batch, 2)."""
    return torch.full((shape.batch, 2), grid_side(facts), dtype=torch.int32)


def prompt_pixel_values(facts: Facts, shape: Shape) -> Tensor:
    """Another image, to show what to do with the first; shaped like that one."""
    generator = shape.generator("prompt_pixel_values")
    return torch.randn(pixel_values(facts, shape).shape, generator=generator)


def prompt_masks(facts: Facts, shape: Shape) -> Tensor:
    """What was done with the other image; shaped like that one."""
    return torch.randn(pixel_values(facts, shape).shape, generator=shape.generator("prompt_masks"))


def task_inputs(facts: Facts, shape: Shape) -> Tensor | None:
    """Tokens of the name of a task as numbers, (batch, length)."""
    length, vocabulary = lookup(facts.config, "task_seq_len"), lookup(facts.config, "text_encoder_vocab_size")
    if not isinstance(length, int) or not isinstance(vocabulary, int):
        return None
    ids = torch.randint(vocabulary, (shape.batch, length), generator=shape.generator("task_inputs"))
    return ids.float()


def query_embeds(facts: Facts, shape: Shape) -> Tensor | None:
    """Queries that look at an encoded sequence, (batch, queries, hidden size)."""
    return _sequence(facts, shape, "query_embeds", QUERIES, "hidden_size")


def encoder_hidden_states(facts: Facts, shape: Shape) -> Tensor | None:
    """An encoded sequence for queries to look at, (batch, positions, hidden size of the encoder)."""
    if "query_embeds" not in facts.accepts:
        return None
    return _sequence(facts, shape, "encoder_hidden_states", ENCODED, "encoder_hidden_size")


def _sequence(facts: Facts, shape: Shape, name: str, length: int, width_key: str) -> Tensor | None:
    width = lookup(facts.config, width_key)
    if not isinstance(width, int):
        return None
    return torch.randn(shape.batch, length, width, generator=shape.generator(name))


def inference_session(facts: Facts, shape: Shape) -> VideoSession | None:
    """A video of two frames with one object for each row of the batch, known from the first frame."""
    make = _annotations(facts).get("inference_session")
    sizes = lookup(facts.config, "backbone_feature_sizes")
    if not callable(make) or not sizes:
        return None
    generator = shape.generator("inference_session")
    frames = torch.randn(2, facts.channels, *facts.image_size, generator=generator)
    points = torch.rand(shape.batch, 1, 2, generator=generator) * torch.tensor(facts.image_size[::-1])
    return VideoSession(make, frames, _memory(facts, shape.batch, sizes[-1], generator), points, _words(facts, shape))


def frame_idx(facts: Facts, shape: Shape) -> int | None:
    """The frame of a session to look at."""
    return FRAME if "inference_session" in facts.accepts else None


def _annotations(facts: Facts) -> dict[str, Any]:
    """The types of the arguments of forward."""
    try:
        return get_type_hints(type(facts.model).forward)
    except (NameError, TypeError):
        return {}


def _memory(facts: Facts, objects: int, size: list[int], generator: torch.Generator) -> dict[str, Tensor]:
    """What is remembered of a frame: features of the object, where they lie, and a pointer to it."""
    config = facts.config
    hidden, width = lookup(config, "memory_attention_hidden_size"), lookup(config, "memory_encoder_output_channels")
    if not isinstance(hidden, int) or not isinstance(width, int):
        return {}
    latents = lookup(config, "perceiver_resampler_num_latents")
    places = (math.prod(size), 1)
    if isinstance(latents, int):  # a few latents in place of all positions
        places = (1, latents + int(lookup(config, "perceiver_resampler_num_latents_2d") or 0))
    shapes = {"maskmem_features": (*places, width), "maskmem_pos_enc": (*places, width), "object_pointer": (1, hidden)}
    return {name: torch.randn(objects, *shape, generator=generator) for name, shape in shapes.items()}


def _words(facts: Facts, shape: Shape) -> Tensor | None:
    """Tokens that say what to look for, where the model has a part for texts."""
    if not isinstance(lookup(facts.config, "vocab_size"), int):
        return None
    limit = lookup(facts.config, "max_position_embeddings")
    return text(facts, shape, 1, min(limit, WORDS) if isinstance(limit, int) else WORDS, "words")


MAKERS: dict[str, Maker] = {
    "hidden_states": hidden_states,
    "grid_thw": grid_thw,
    "merge_sizes": merge_sizes,
    "spatial_shapes": spatial_shapes,
    "pixel_attention_mask": pixel_attention_mask,
    "pixel_position_ids": pixel_position_ids,
    "target_sizes": target_sizes,
    "target_sizes_videos": target_sizes,
    "prompt_pixel_values": prompt_pixel_values,
    "prompt_masks": prompt_masks,
    "task_inputs": task_inputs,
    "query_embeds": query_embeds,
    "encoder_hidden_states": encoder_hidden_states,
    "inference_session": inference_session,
    "frame_idx": frame_idx,
}
