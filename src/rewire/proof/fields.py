"""The tensors that forward functions take, one maker per argument name.

A maker gets the facts of the model and the shape of one case and gives a tensor, or None where that argument
is better left out. `MAKERS` is the table; a new kind of input is one more line in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewire.proof.cases import Padding, padding_mask
from rewire.proof.facts import Facts, lookup, pair
from rewire.proof.patches import pixel_shape
from rewire.proof.placeholders import Run
from rewire.proof.sound import samples_of


@dataclass(frozen=True)
class Shape:
    """Size, padding and seed of one case.

    `placeholders` are the tokens of a text that stand for images, videos and sounds, with those around them
    (none: a text alone), `more` is how many tokens follow in a second call.
    """

    batch: int
    length: int
    padding: Padding = "none"
    seed: int = 0
    placeholders: tuple[Run, ...] = ()
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
    if shape.placeholders:
        where, what = places(shape.placeholders)
        tokens[:, where] = what
    return torch.where(mask, tokens, torch.full_like(tokens, facts.pad_id))


def places(placeholders: tuple[Run, ...]) -> tuple[slice, Tensor]:
    """Where in a text the placeholders stand, and which tokens they are."""
    what = torch.tensor([run.token for run in placeholders for _ in range(run.count)])
    return slice(1, 1 + len(what)), what


def attention_mask(facts: Facts, shape: Shape) -> Tensor | None:
    """Ones at real positions. Where nothing is padded, odd seeds get one and even seeds get none: two paths of
    their own in many models.
    """
    if shape.padding == "none" and (shape.seed % 2 == 0 or "input_ids" not in facts.accepts):
        return None
    is_text = "input_ids" in facts.accepts
    return padding_mask(shape.padding, shape.batch, shape.length if is_text else samples_of(facts)).long()


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
    """Which tokens stand for a piece of an image, of a video or of a sound; (batch, length)."""
    return kinds(shape) if shape.placeholders else None


def moe_mm_token_type_ids(facts: Facts, shape: Shape) -> Tensor | None:
    """Ones where a token goes to the experts for images; (batch, length)."""
    kinds = mm_token_type_ids(facts, shape)
    return None if kinds is None else kinds.clamp(max=1)


def kinds(shape: Shape) -> Tensor:
    """The kind of what every token of a text stands for, (batch, length)."""
    where, _ = places(shape.placeholders)
    found = torch.zeros(shape.batch, shape.length, dtype=torch.long)
    found[:, where] = torch.tensor([run.kind for run in shape.placeholders for _ in range(run.count)])
    return found


def pixel_values(facts: Facts, shape: Shape) -> Tensor:
    """Images of the model's full size, normalised colours; (batch, [frames,] channels, height, width), or patches."""
    return torch.randn(*pixel_shape(facts, shape.batch), generator=shape.generator("pixel_values"))


def input_points(facts: Facts, shape: Shape) -> Tensor:
    """Two prompts of two points each, in pixels; (batch, prompts, points, 2)."""
    return _inside(facts, torch.rand(shape.batch, 2, 2, 2, generator=shape.generator("input_points")))


def input_boxes(facts: Facts, shape: Shape) -> Tensor | None:
    """One box per prompt as (left, top, right, bottom) in pixels, (batch, prompts, 4); in odd seeds only.

    Models that take words too (SAM 3) cut boxes out with torchvision, so they get words alone.
    """
    if shape.seed % 2 == 0 or "input_boxes_labels" in facts.accepts:
        return None
    corners = torch.rand(shape.batch, 2, 2, 2, generator=shape.generator("input_boxes")).sort(dim=2).values
    return _inside(facts, corners).flatten(2)


def _inside(facts: Facts, fractions: Tensor) -> Tensor:
    height, width = facts.image_size
    return fractions * torch.tensor([width, height])


def pixel_values_videos(facts: Facts, shape: Shape) -> Tensor:
    """Videos, (batch, frames, channels, height, width), or the patches of one frame each, in a row."""
    if "target_sizes_videos" in facts.accepts:
        size = pixel_shape(facts, shape.batch)
        return torch.randn(*size, generator=shape.generator("pixel_values_videos"))
    frames = lookup(facts.config, "frames_per_clip", "num_frames") or 4
    height, width = pair(lookup(facts.config, "crop_size", "image_size") or 64)
    size = (shape.batch, int(frames), facts.channels, height, width)
    return torch.randn(*size, generator=shape.generator("pixel_values_videos"))


Maker = Callable[[Facts, Shape], Any]

MAKERS: dict[str, Maker] = {
    "input_ids": input_ids,
    "attention_mask": attention_mask,
    "token_type_ids": token_type_ids,
    "mm_token_type_ids": mm_token_type_ids,
    "moe_mm_token_type_ids": moe_mm_token_type_ids,
    "decoder_input_ids": decoder_input_ids,
    "pixel_values": pixel_values,
    "input_points": input_points,
    "input_boxes": input_boxes,
    "pixel_values_videos": pixel_values_videos,
}
