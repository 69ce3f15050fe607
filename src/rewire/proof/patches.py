"""Sizes of images as models take them: whole images, pairs of images, videos, or lists of patches."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from rewire.proof.facts import Facts, lookup, pair, vision_config

GRID_SIDE = 2
"""Side, in merged patches, of the small image given to models that take images as lists of patches."""

MERGE_KEYS = ("spatial_merge_size", "merge_size", "merge_kernel_size", "pooling_kernel_size")
"""Config values that say how many patches in a row become one token."""

MATCHING_KEYS = ("keypoint_detector_config", "coarse_matching_threshold")
"""Config values of models that match two images."""

PACKED = frozenset({"grid_thw", "image_grid_thw"})
"""Arguments of models that take the patches of all images as one list."""

PADDED = frozenset({"spatial_shapes", "pixel_position_ids", "image_position_ids"})
"""Arguments of models that take a list of patches per image, filled up with patches that do not count."""

FLAT_KEYS = ("img_max_token_num",)
"""Config values of models that take patches as rows of numbers and make images of them before they convolve them."""

SINGLE = PADDED | {"target_sizes"}
"""Arguments of models that know of no merged patches, or merge them later."""


def pixel_shape(facts: Facts, batch: int) -> tuple[int, ...]:
    """The shape of `pixel_values` for `batch` images."""
    if PACKED & facts.accepts:
        return _packed(facts, batch * grid_side(facts) ** 2)
    if PADDED & facts.accepts:
        return batch, grid_side(facts) ** 2, patch_numbers(facts)
    height, width = _image_size(facts)
    if "target_sizes" in facts.accepts:  # all patches of all images side by side, in one row
        side = facts.patch_size
        return 1, facts.channels, side, batch * grid_side(facts) ** 2 * side
    if "prompt_pixel_values" in facts.accepts:  # the config counts the prompt's image on top of it
        return batch, facts.channels, height // 2, width
    return batch, *_images(facts), facts.channels, height, width


def _image_size(facts: Facts) -> tuple[int, int]:
    """Height and width of an image; where a model looks at it in several sizes, the least is one of its patches."""
    ratios = getattr(facts.config, "scaled_images_ratios", None)
    if not ratios:
        return facts.image_size
    height, width = pair(facts.config.patch_size)
    return math.ceil(height / min(ratios)), math.ceil(width / min(ratios))


def _images(facts: Facts) -> tuple[int, ...]:
    """How many images belong to one row of a batch: frames, or the two that are to be matched."""
    if any(hasattr(facts.config, name) for name in MATCHING_KEYS):
        return (2,)
    frames = lookup(facts.config, "num_frames")
    return (frames,) if isinstance(frames, int) else ()


def _packed(facts: Facts, patches: int) -> tuple[int, ...]:
    side, layer = facts.patch_size, next(_embedding(facts.model), None)
    if lookup(facts.config, "posemb_grid_size") is not None:  # squares of merged patches, colours last
        return patches, merge(facts) * side, merge(facts) * side, facts.channels
    is_flat = any(lookup(facts.config, name) is not None for name in FLAT_KEYS)
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (side, side) and not is_flat:  # each an image of its own
        return patches, facts.channels, side, side
    return patches, patch_numbers(facts)


def merge(facts: Facts) -> int:
    """How many patches in a row, and in a column, become one token."""
    found = lookup(vision_config(facts.config), *MERGE_KEYS)
    return pair(found)[0] if found is not None else 1


def grid_side(facts: Facts) -> int:
    """Rows and columns of patches of an image that is given as a list of patches."""
    return GRID_SIDE * max(merge(facts), 2 if SINGLE & facts.accepts else 1)


def patch_numbers(facts: Facts) -> int:
    """How many numbers a patch has: what the layer that embeds patches takes, or what the config says."""
    layer = next(_embedding(facts.model), None)
    if isinstance(layer, nn.Conv2d | nn.Conv3d):
        return layer.in_channels * math.prod(layer.kernel_size)
    depth = int(lookup(vision_config(facts.config), "temporal_patch_size") or 1)
    return layer.in_features if isinstance(layer, nn.Linear) else facts.channels * depth * facts.patch_size**2


def _embedding(model: nn.Module) -> Iterator[nn.Module]:
    """The layers that embed patches."""
    for path, module in model.named_modules():
        if "patch" in path and "merger" not in path and isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            yield module
