"""The tensors that forward functions take, one maker per argument name.

A maker gets the facts of the model and the shape of one case and gives a tensor, or None where that argument
is better left out. `MAKERS` is the table; a new kind of input is one more line in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rewire.proof.cases import Padding, padding_mask
from rewire.proof.facts import Facts, lookup, pair, vision_config

AUDIO_FRAMES = 12
GRID_SIDE = 2
"""Side, in merged patches, of the small image given to models that take images as flat lists of patches."""


@dataclass(frozen=True)
class Shape:
    """Size, padding and seed of one case.

    `placeholders` is how many tokens of a text stand for an image (0: no image), `more` how many follow in a
    second call.
    """

    batch: int
    length: int
    padding: Padding = "none"
    seed: int = 0
    placeholders: int = 0
    more: int = 0

    @property
    def mask(self) -> Tensor:
        """True at real positions, (batch, length)."""
        return padding_mask(self.padding, self.batch, self.length)

    def generator(self, salt: str) -> torch.Generator:
        """Random numbers that depend on this shape and on what they are for, and on nothing else."""
        number = sum((index + 1) * ord(letter) for index, letter in enumerate(salt)) + self.batch * 31 + self.length
        return torch.Generator().manual_seed(1_000_003 * self.seed + number)


def text(facts: Facts, shape: Shape, batch: int, length: int, salt: str) -> Tensor:
    """Random ordinary tokens, (batch, length)."""
    ids = facts.token_ids
    return ids[torch.randint(len(ids), (batch, length), generator=shape.generator(salt))]


def input_ids(facts: Facts, shape: Shape) -> Tensor:
    """Tokens, padded; (batch, length). Sequences end with the end token where a decoder follows."""
    tokens = text(facts, shape, shape.batch, shape.length, "input_ids")
    mask = shape.mask
    if facts.is_encoder_decoder and facts.end_id is not None and shape.length > 1:
        last = (mask * torch.arange(shape.length)).argmax(1)
        tokens[torch.arange(shape.batch), last] = facts.end_id
    if facts.image_token is not None:
        tokens[:, 1 : 1 + shape.placeholders] = facts.image_token
    return torch.where(mask, tokens, torch.full_like(tokens, facts.pad_id))


def image_tokens(facts: Facts) -> int:
    """How many placeholders one image takes in a text: asked of the model where it can tell."""
    if "image_grid_thw" in facts.accepts:
        return GRID_SIDE**2
    features = getattr(facts.model, "get_image_features", None)
    pixels = pixel_values(facts, Shape(1, 1))
    with torch.no_grad():
        parameter = next(facts.model.parameters())
        found = features(pixels.to(parameter.device, parameter.dtype)) if features is not None else None
    found = getattr(found, "pooler_output", found)
    found = found[0] if isinstance(found, list | tuple) else found
    return int(found.shape[-2]) if isinstance(found, Tensor) else 0


def attention_mask(facts: Facts, shape: Shape) -> Tensor | None:
    """Ones at real positions. Where nothing is padded, odd seeds get one and even seeds get none: two paths of
    their own in many models.
    """
    if shape.padding == "none" and (shape.seed % 2 == 0 or "input_ids" not in facts.accepts):
        return None
    is_text = "input_ids" in facts.accepts
    return padding_mask(shape.padding, shape.batch, shape.length if is_text else samples(facts)).long()


def takes_samples(facts: Facts) -> bool:
    """Whether sound comes as samples that convolutions turn into frames."""
    return lookup(facts.config, "conv_kernel") is not None


def token_type_ids(facts: Facts, shape: Shape) -> Tensor | None:
    """Segment numbers, rising along the sequence."""
    kinds = lookup(facts.config, "type_vocab_size")
    if not isinstance(kinds, int) or kinds < 2 or "input_ids" not in facts.accepts:
        return None
    halves = (torch.arange(shape.length) * 2 // max(shape.length, 1)).clamp(max=kinds - 1)
    return halves.expand(shape.batch, -1).clone()


def decoder_input_ids(facts: Facts, shape: Shape) -> Tensor | None:
    """Tokens for a decoder, of another length than the encoder's; (batch, length // 2 + 2).

    Classifiers of whole texts make their own from the encoder's.
    """
    if type(facts.model).__name__.endswith("SequenceClassification"):
        return None
    tokens = text(facts, shape, shape.batch, shape.length // 2 + 2, "decoder_input_ids")
    tokens[:, 0] = facts.start_id
    return tokens


def mm_token_type_ids(facts: Facts, shape: Shape) -> Tensor | None:
    """Ones where a placeholder stands for a piece of an image; (batch, length)."""
    if not shape.placeholders or facts.image_token is None:
        return None
    return input_ids(facts, shape).eq(facts.image_token).long()


def pixel_values(facts: Facts, shape: Shape) -> Tensor:
    """Images of the model's full size, normalised colours; (batch, [frames,] channels, height, width)."""
    height, width = facts.image_size
    frames = lookup(facts.config, "num_frames")
    lead = (shape.batch, frames) if isinstance(frames, int) else (shape.batch,)
    if "image_grid_thw" in facts.accepts:
        return _flat_patches(facts, shape)
    return torch.randn(*lead, facts.channels, height, width, generator=shape.generator("pixel_values"))


def _merge(facts: Facts) -> int:
    return int(lookup(vision_config(facts.config), "spatial_merge_size") or 1)


def _flat_patches(facts: Facts, shape: Shape) -> Tensor:
    patches = shape.batch * (GRID_SIDE * _merge(facts)) ** 2
    depth = int(lookup(vision_config(facts.config), "temporal_patch_size") or 1)
    size = facts.channels * depth * facts.patch_size**2
    return torch.randn(patches, size, generator=shape.generator("pixel_values"))


def image_grid_thw(facts: Facts, shape: Shape) -> Tensor:
    """Frames, rows and columns of patches of each image, (batch, 3)."""
    side = GRID_SIDE * _merge(facts)
    return torch.tensor([[1, side, side]] * shape.batch)


def input_points(facts: Facts, shape: Shape) -> Tensor:
    """Two prompts of two points each, in pixels; (batch, prompts, points, 2)."""
    return _inside(facts, torch.rand(shape.batch, 2, 2, 2, generator=shape.generator("input_points")))


def input_boxes(facts: Facts, shape: Shape) -> Tensor | None:
    """One box per prompt as (left, top, right, bottom) in pixels, (batch, prompts, 4); in odd seeds only."""
    if shape.seed % 2 == 0:
        return None
    corners = torch.rand(shape.batch, 2, 2, 2, generator=shape.generator("input_boxes")).sort(dim=2).values
    return _inside(facts, corners).flatten(2)


def _inside(facts: Facts, fractions: Tensor) -> Tensor:
    height, width = facts.image_size
    return fractions * torch.tensor([width, height])


def input_features(facts: Facts, shape: Shape) -> Tensor | None:
    """Spectrograms: Whisper's (batch, mel bins, frames) of full length, else (batch, frames, features)."""
    config, generator = facts.config, shape.generator("input_features")
    bins, positions = lookup(config, "num_mel_bins"), lookup(config, "max_source_positions")
    if isinstance(lookup(config, "spec_size"), int) and isinstance(bins, int):
        return torch.randn(shape.batch, 1, lookup(config, "spec_size") * 2, bins, generator=generator)
    if lookup(config, "input_feat_per_channel"):
        size = int(lookup(config, "input_feat_per_channel")) * int(lookup(config, "input_channels") or 1)
        return torch.randn(shape.batch, 4 * AUDIO_FRAMES, size, generator=generator)
    if isinstance(bins, int) and isinstance(positions, int):
        return torch.randn(shape.batch, bins, 2 * positions, generator=generator)
    size = lookup(config, "feature_projection_input_dim", "num_mel_bins", "input_dim")
    return torch.randn(shape.batch, 4 * AUDIO_FRAMES, size, generator=generator) if isinstance(size, int) else None


def input_values(facts: Facts, shape: Shape) -> Tensor:
    """Sound: samples (batch, [channels,] samples), or spectrograms (batch, frames, mel bins) for AST."""
    config, generator = facts.config, shape.generator("input_values")
    bins, frames = lookup(config, "num_mel_bins"), lookup(config, "max_length")
    if isinstance(bins, int) and isinstance(frames, int) and not takes_samples(facts):
        return torch.randn(shape.batch, frames, bins, generator=generator)
    channels = lookup(config, "audio_channels")
    lead = (shape.batch, channels) if isinstance(channels, int) else (shape.batch,)
    return torch.randn(*lead, samples(facts), generator=generator)


def samples(facts: Facts, frames: int = AUDIO_FRAMES) -> int:
    """How many samples give `frames` frames after the convolutions of the config."""
    kernels, strides = lookup(facts.config, "conv_kernel"), lookup(facts.config, "conv_stride")
    if not isinstance(kernels, list | tuple) or not isinstance(strides, list | tuple):
        ratios = lookup(facts.config, "upsampling_ratios", "downsampling_ratios")
        return AUDIO_FRAMES * (math.prod(ratios) if isinstance(ratios, list | tuple) else 320)
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        frames = (frames - 1) * stride + kernel
    return int(frames)


def pixel_values_videos(facts: Facts, shape: Shape) -> Tensor:
    """Videos, (batch, frames, channels, height, width)."""
    frames = lookup(facts.config, "frames_per_clip", "num_frames") or 4
    height, width = pair(lookup(facts.config, "crop_size", "image_size") or 64)
    size = (shape.batch, int(frames), facts.channels, height, width)
    return torch.randn(*size, generator=shape.generator("pixel_values_videos"))


Maker = Callable[[Facts, Shape], Tensor | None]

MAKERS: dict[str, Maker] = {
    "input_ids": input_ids,
    "attention_mask": attention_mask,
    "token_type_ids": token_type_ids,
    "mm_token_type_ids": mm_token_type_ids,
    "decoder_input_ids": decoder_input_ids,
    "pixel_values": pixel_values,
    "image_grid_thw": image_grid_thw,
    "input_points": input_points,
    "input_boxes": input_boxes,
    "input_features": input_features,
    "input_values": input_values,
    "pixel_values_videos": pixel_values_videos,
}

IMAGE_NAMES = frozenset({"pixel_values", "image_grid_thw"})
"""Arguments that a model mixing images into its text takes only together with placeholders."""
