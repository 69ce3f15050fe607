"""The tensors that forward functions of models for several modalities take, one maker per argument name.

Images, their companions (sizes, positions, masks of what counts), videos, prompts of bridges.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rewire.proof import fields, fields_vision
from rewire.proof.facts import Facts, lookup, pair, vision_config
from rewire.proof.fields import Maker, Shape, kinds
from rewire.proof.patches import PACKED, PADDED, grid_side, patch_numbers, pixel_shape
from rewire.proof.placeholders import IMAGE, IMAGE_KIND, VIDEO, frames_of_video, is_required, token_of
from rewire.proof.sound import frames_of

PARTS = 2
"""Pieces that an image comes in besides its small copy, or images of one text, where a model takes several."""

STEPS = 4
"""Steps of a robot, or frames of a sound."""

CUTTING = (nn.Conv2d, nn.Conv3d, nn.Unfold)
"""Layers that cut an image into patches."""

WIDE = frozenset({"perceiver_embeddings", "pixel_attention_mask"})
"""Arguments of models that take several images, or several pieces of one, in a dimension of their own."""


# ---------------------------------------------------------------- images


def pixel_values(facts: Facts, shape: Shape) -> Tensor:
    """Images as `fields.pixel_values` gives them, in pieces (batch, pieces, channels, height, width), or in patches."""
    size = image_shape(facts, shape.batch)
    return torch.randn(*size, generator=shape.generator("pixel_values"))


def image_shape(facts: Facts, batch: int) -> tuple[int, ...]:
    """The shape of `pixel_values` for `batch` images."""
    if "image_token_pooling" in facts.accepts:
        return batch * PARTS, math.prod(_patches(facts)), patch_numbers(facts)
    if not cuts_patches(facts):
        return _bare_patches(facts, batch)
    size = pixel_shape(facts, batch)
    if len(size) != 4 or size[0] != batch or "target_sizes" in facts.accepts:
        return size
    if lookup(facts.config, "image_grid_pinpoints") and "image_sizes" in facts.accepts:
        return batch, _pieces(facts) + 1, *size[1:]
    if "aspect_ratio_ids" in facts.accepts:
        return batch, 1, int(lookup(facts.config, "max_num_tiles")), *size[1:]
    if "qformer_input_ids" in facts.accepts and token_of(facts, VIDEO) is not None:
        return batch, frames_of_video(facts), *size[1:]
    if hasattr(facts.config, "vision_use_cls_token"):
        return batch, PARTS, *size[1:]
    if WIDE & facts.accepts and "spatial_shapes" not in facts.accepts:
        return batch, PARTS, *size[1:]
    return size


def cuts_patches(facts: Facts) -> bool:
    """Whether the model cuts images into patches itself, by a convolution or the like, or is told of their places."""
    listed = (PACKED | PADDED | {"target_sizes", "image_grid_hw"}) & facts.accepts
    return bool(listed) or any(isinstance(module, CUTTING) for module in facts.model.modules())


def _bare_patches(facts: Facts, batch: int) -> tuple[int, ...]:
    """Patches without places: flat, or (patches, frames, height, width, channels) where they span frames."""
    patches, side = batch * grid_side(facts) ** 2, facts.patch_size
    frames = lookup(vision_config(facts.config), "temporal_patch_size")
    return (patches, frames, side, side, facts.channels) if isinstance(frames, int) else (patches, patch_numbers(facts))


def _patches(facts: Facts) -> tuple[int, int]:
    """Rows and columns of patches of a whole image."""
    height, width = facts.image_size
    return height // facts.patch_size, width // facts.patch_size


def _pieces(facts: Facts) -> int:
    """How many pieces make the smallest image of several pieces."""
    height, width = image_size(facts)
    side, across = facts.image_size
    return (height // side) * (width // across)


def image_size(facts: Facts) -> tuple[int, int]:
    """Height and width of an image: of the smallest that is cut into pieces, or the model's full size."""
    pinpoints = lookup(facts.config, "image_grid_pinpoints")
    return min(map(pair, pinpoints), key=lambda size: size[0] * size[1]) if pinpoints else facts.image_size


def image_sizes(facts: Facts, shape: Shape) -> Tensor | None:
    """Height and width of each image in pixels, (batch, 2); where the model cannot do without."""
    if not is_required(facts, IMAGE, "image_sizes"):
        return None
    return torch.tensor([image_size(facts)] * shape.batch)


def pixel_attention_mask(facts: Facts, shape: Shape) -> Tensor | None:
    """What counts of images in pieces: every pixel, (batch, pieces, height, width), or every piece, (batch, pieces)."""
    if "spatial_shapes" in facts.accepts:
        return fields_vision.pixel_attention_mask(facts, shape)
    size = image_shape(facts, shape.batch)
    if len(size) != 5:
        return None
    takes_pieces = "tile_fine_mask" in facts.accepts or "action_embeds" in facts.accepts
    return torch.ones(size[:2] if takes_pieces else (*size[:2], *size[3:]), dtype=torch.bool)


def high_res_pixel_values(facts: Facts, shape: Shape) -> Tensor | None:
    """The same images for a second encoder with a size of its own, (batch, channels, height, width)."""
    found = getattr(facts.config, "high_res_vision_config", None)
    if found is None:
        return None
    height, width = pair(found.image_size)
    generator = shape.generator("high_res_pixel_values")
    return torch.randn(shape.batch, facts.channels, height, width, generator=generator)


def pixel_values_local(facts: Facts, shape: Shape) -> Tensor:
    """Pieces of the images, (pieces of all images, channels, height, width)."""
    size = (shape.batch * PARTS, facts.channels, *facts.image_size)
    return torch.randn(*size, generator=shape.generator("pixel_values_local"))


def num_local_patches(facts: Facts, shape: Shape) -> list[int]:
    """Pieces of each image."""
    return [PARTS] * shape.batch


def patches_grid(facts: Facts, shape: Shape) -> list[list[int]]:
    """Columns and rows of the pieces of each image."""
    return [[PARTS, 1]] * shape.batch


def image_merge_sizes(facts: Facts, shape: Shape) -> Tensor:
    """How many patches in a row become one token, for each image; (batch,)."""
    return torch.ones(shape.batch, dtype=torch.long)


def image_grid_thw(facts: Facts, shape: Shape) -> Tensor:
    """Frames, rows and columns of patches of each image, (batch, 3); a second for one that is yet to be drawn."""
    side = grid_side(facts)
    return torch.tensor([[1, side, side]] * shape.batch * _grids(facts))


def images_per_sample(facts: Facts, shape: Shape) -> Tensor:
    """Images of each text with the one that is yet to be drawn, (batch,)."""
    return torch.full((shape.batch,), _grids(facts))


def _grids(facts: Facts) -> int:
    return 2 if "images_per_sample" in facts.accepts else 1


def image_position_ids(facts: Facts, shape: Shape) -> Tensor:
    """Column and row of each patch, (batch, patches, 2)."""
    return patch_positions(facts, shape.batch)


def patch_positions(facts: Facts, batch: int) -> Tensor:
    """Column and row of each patch of a small image, (batch, patches, 2)."""
    side = torch.arange(grid_side(facts))
    return torch.cartesian_prod(side, side).flip(1).expand(batch, -1, -1).clone()


def image_token_pooling(facts: Facts, shape: Shape) -> Tensor:
    """Which patches make each token, two by two in every piece; (tokens of all images, 4)."""
    rows, columns = _patches(facts)
    grid = torch.arange(rows * columns).view(rows, columns)[: rows // 2 * 2, : columns // 2 * 2]
    squares = grid.unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4)
    return torch.cat([squares + piece * rows * columns for piece in range(shape.batch * PARTS)])


def image_grids(facts: Facts, shape: Shape) -> Tensor:
    """Rows and columns of tokens of the small copy of each image and of its pieces, (batch, 4)."""
    rows, columns = (side // 2 for side in _patches(facts))
    return torch.tensor([[rows, columns, rows * (PARTS - 1), columns]] * shape.batch)


# ---------------------------------------------------------------- images looked at from the text


def image_embeds_position_mask(facts: Facts, shape: Shape) -> Tensor | None:
    """True where a text has features of an image, (batch, length)."""
    count = lookup(facts.config, "latent_query_num")
    if not isinstance(count, int):
        return None
    found = torch.zeros(shape.batch, shape.length, dtype=torch.bool)
    found[:, 1 : 1 + count] = True
    return found


def image_attention_mask(facts: Facts, shape: Shape) -> Tensor | None:
    """Which tokens look at which image: all at the first, the later half at all; (batch, length, images)."""
    if "pixel_values" not in facts.accepts or "perceiver_embeddings" not in facts.accepts:
        return None
    found = torch.zeros(shape.batch, shape.length, PARTS, dtype=torch.long)
    found[:, :, 0] = 1
    found[:, shape.length // 2 :] = 1
    return found


def aspect_ratio_ids(facts: Facts, shape: Shape) -> Tensor:
    """Which arrangement of pieces each image has, (batch, 1)."""
    return torch.ones(shape.batch, 1, dtype=torch.long)


def aspect_ratio_mask(facts: Facts, shape: Shape) -> Tensor:
    """Ones at the pieces that count, (batch, 1, pieces)."""
    return torch.ones(shape.batch, 1, int(lookup(facts.config, "max_num_tiles")), dtype=torch.long)


def cross_attention_mask(facts: Facts, shape: Shape) -> Tensor:
    """Ones where a token looks at a piece of an image, (batch, length, 1, pieces)."""
    return torch.ones(shape.batch, shape.length, 1, int(lookup(facts.config, "max_num_tiles")), dtype=torch.long)


def qformer_input_ids(facts: Facts, shape: Shape) -> Tensor | None:
    """The instruction that a bridge between image and text reads, (batch, length)."""
    found = getattr(getattr(facts.config, "qformer_config", None), "vocab_size", None)
    if not isinstance(found, int):
        return None
    return torch.randint(1, found, (shape.batch, 5), generator=shape.generator("qformer_input_ids"))


def token_type_ids(facts: Facts, shape: Shape) -> Tensor | None:
    """Segment numbers; ones at the places of images, where the model has no segments of its own."""
    found = fields.token_type_ids(facts, shape)
    if found is None and shape.placeholders and token_of(facts, IMAGE) is not None:
        return kinds(shape).eq(IMAGE_KIND).long()
    return found


# ---------------------------------------------------------------- sound


def audio_input_ids(facts: Facts, shape: Shape) -> Tensor | None:
    """Sound as whole numbers for each frame and bin, (batch, frames, bins)."""
    bins, sizes = lookup(facts.config, "n_mel_bins"), lookup(facts.config, "mel_vocab_size")
    if not isinstance(bins, int) or not isinstance(sizes, int):
        return None
    return torch.randint(sizes, (shape.batch, STEPS, bins), generator=shape.generator("audio_input_ids"))


def chunk_sample_lengths(facts: Facts, shape: Shape) -> Tensor | None:
    """How many samples each spectrogram was made from, (batch,)."""
    hop = lookup(facts.config, "hop_length")
    return torch.full((shape.batch,), hop * frames_of(facts)) if isinstance(hop, int) else None


# ---------------------------------------------------------------- videos


def pixel_values_videos(facts: Facts, shape: Shape) -> Tensor:
    """Videos: frames, (batch, frames, channels, height, width), or patches like those of images."""
    if "video_token_pooling" in facts.accepts:
        return torch.randn(*image_shape(facts, shape.batch), generator=shape.generator("pixel_values_videos"))
    if "video_grid_thw" in facts.accepts:
        patches, *size = pixel_shape(facts, shape.batch)
        return torch.randn(patches * _depth(facts), *size, generator=shape.generator("pixel_values_videos"))
    if "video_position_ids" in facts.accepts:
        frames = (shape.batch * PARTS, grid_side(facts) ** 2, patch_numbers(facts))
        return torch.randn(*frames, generator=shape.generator("pixel_values_videos"))
    return fields.pixel_values_videos(facts, shape)


def video_grid_thw(facts: Facts, shape: Shape) -> Tensor:
    """Frames, rows and columns of patches of each video, (batch, 3)."""
    side = grid_side(facts)
    return torch.tensor([[_depth(facts), side, side]] * shape.batch)


def _depth(facts: Facts) -> int:
    """Frames of a video that is given as a list of patches: as few as can be."""
    return int(lookup(facts.config, "temporal_merge_size") or 1)


def video_grids(facts: Facts, shape: Shape) -> Tensor:
    """Frames, rows and columns of tokens of each video, (batch, 3)."""
    rows, columns = (side // 2 for side in _patches(facts))
    return torch.tensor([[PARTS, rows, columns]] * shape.batch)


def video_position_ids(facts: Facts, shape: Shape) -> Tensor:
    """Column and row of each patch of each frame, (frames of all videos, patches, 2)."""
    return patch_positions(facts, shape.batch * PARTS)


def num_frames_per_video(facts: Facts, shape: Shape) -> Tensor:
    """Frames of each video, (batch,)."""
    return torch.full((shape.batch,), PARTS)


MAKERS: dict[str, Maker] = {
    "token_type_ids": token_type_ids,
    "pixel_values": pixel_values,
    "pixel_attention_mask": pixel_attention_mask,
    "image_sizes": image_sizes,
    "high_res_pixel_values": high_res_pixel_values,
    "pixel_values_local": pixel_values_local,
    "num_local_patches": num_local_patches,
    "patches_grid": patches_grid,
    "image_token_pooling": image_token_pooling,
    "image_grids": image_grids,
    "image_grid_thw": image_grid_thw,
    "images_per_sample": images_per_sample,
    "image_merge_sizes": image_merge_sizes,
    "image_position_ids": image_position_ids,
    "image_embeds_position_mask": image_embeds_position_mask,
    "image_attention_mask": image_attention_mask,
    "aspect_ratio_ids": aspect_ratio_ids,
    "aspect_ratio_mask": aspect_ratio_mask,
    "cross_attention_mask": cross_attention_mask,
    "qformer_input_ids": qformer_input_ids,
    "audio_input_ids": audio_input_ids,
    "chunk_sample_lengths": chunk_sample_lengths,
    "pixel_values_videos": pixel_values_videos,
    "video_grid_thw": video_grid_thw,
    "video_merge_sizes": image_merge_sizes,
    "video_token_pooling": image_token_pooling,
    "video_grids": video_grids,
    "video_position_ids": video_position_ids,
    "num_frames_per_video": num_frames_per_video,
}
