"""Small images: as few pixels as give four patches by four, or two by two in the last of several stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rewire.zoo.stages import stage_count
from rewire.zoo.values import Config, is_int, is_list

PATCHES = 4
"""Patches in a row of a small image."""

PIXELS = 64
"""Side of a small image of a model that tells no patch."""

WINDOW, SINGLE_WINDOW = 2, 3
"""Side of a small attention window in patches: in stages, and where the last windows are to be filled up."""

_SIZES = ("image_size", "input_size", "img_size", "pretrain_image_size", "crop_size")
_FEATURE_SIZES = ("backbone_feature_sizes", "image_embedding_size", "memory_attention_rope_feat_sizes")


@dataclass(frozen=True)
class Images:
    """Which original side of an image, in pixels, becomes which small one, the same everywhere in a tree."""

    small: dict[int, int]

    @classmethod
    def of(cls, configs: list[Config]) -> Images:
        """The small sizes for a configuration and those inside it, before anything of it is made small.

        >>> from types import SimpleNamespace
        >>> images = Images.of([SimpleNamespace(image_size=[1024, 768], patch_size=16)])
        >>> images.of_size({"height": 1024, "width": 768})
        {'height': 80, 'width': 64}
        """
        small: dict[int, int] = {}
        for config in configs:
            side = patch_side(config)
            if side is None:
                continue
            for size in _sizes_of(config):
                for edge, wanted in _wanted(size, _least(config, side), side).items():
                    small[edge] = max(wanted, small.get(edge, 0))
        for edges in (_edges(getattr(config, "image_size", None)) for config in configs):
            small = {**_wanted(edges, PIXELS, 1), **small}
        return cls(small)

    def of_size(self, size: Any) -> Any:
        """The small size for a number, list or mapping."""
        return _mapped(size, lambda edge: self.small.get(edge, edge))


def _sizes_of(config: Config) -> Iterator[list[int]]:
    return filter(None, (_edges(getattr(config, name, None)) for name in _SIZES))


def _least(config: Config, side: int) -> int:
    """The shorter edge of a small image of a model with patches of this side."""
    stages, stride = stage_count(config), getattr(config, "output_stride", None)
    return max(side * (PATCHES if stages == 1 else 2**stages), 2 * stride if is_int(stride) else 0)


def _wanted(edges: list[int], least: int, side: int) -> dict[int, int]:
    """Images of more than `least` pixels get `least` for their shorter edge, and keep their proportions."""
    shorter = min(edges, default=0)
    return {edge: round(edge * least / shorter / side) * side for edge in edges} if shorter > least else {}


def patch_side(config: Config) -> int | None:
    """Side of a patch in pixels, or how far patches are apart where they overlap.

    >>> from types import SimpleNamespace
    >>> patch_side(SimpleNamespace(patch_size=[7, 7], patch_stride=[4, 4])), patch_side(SimpleNamespace())
    (4, None)
    """
    found = (getattr(config, name, None) for name in ("patch_stride", "patch_size"))
    patch = next((one for one in found if one is not None), None)
    if is_list(patch) and len(patch) == 2 and all(map(is_int, patch)):
        return int(max(patch))
    return patch if is_int(patch) and patch > 0 else None


def small_images(config: Config, images: Images) -> None:
    """Makes images, and the windows on them, small, in place."""
    _small_windows(config)
    _small_pinpoints(config, images)
    values = config.__dict__  # not through setters: some pass a size on to other configurations
    for name in _SIZES:
        if values.get(name) is not None:
            values[name] = images.of_size(values[name])
    largest = max(images.small, default=0)
    for name in _FEATURE_SIZES if largest else ():
        if values.get(name) is not None:
            values[name] = _mapped(values[name], lambda edge: max(1, edge * images.small[largest] // largest))


def _small_pinpoints(config: Config, images: Images) -> None:
    """Sizes of images in several pieces: as many pieces as before, of the small size."""
    pinpoints, piece = getattr(config, "image_grid_pinpoints", None), getattr(config, "vision_config", None)
    if is_list(pinpoints) and is_int(side := getattr(piece, "image_size", None)):
        small = images.of_size(side)
        config.image_grid_pinpoints = [[edge // side * small for edge in size] for size in pinpoints]


def _small_windows(config: Config) -> None:
    window, side = getattr(config, "window_size", None), patch_side(config)
    if not is_int(window) or window <= WINDOW:
        return
    merge = getattr(config, "spatial_merge_size", None)
    if side is not None and is_int(merge) and window % (side * merge) == 0:  # in pixels
        config.window_size = side * merge
    elif getattr(config, "image_size", None) is not None:
        config.window_size = WINDOW if stage_count(config) > 1 else SINGLE_WINDOW


def _edges(size: Any) -> list[int]:
    if isinstance(size, Mapping):
        return [value for value in size.values() if is_int(value)]
    return [value for value in (size if is_list(size) else [size]) if is_int(value) and value > 0]


def _mapped(size: Any, function: Any) -> Any:
    if is_int(size):
        return function(size)
    if isinstance(size, Mapping):
        return {key: _mapped(value, function) for key, value in size.items()}
    if is_list(size):
        return type(size)(_mapped(value, function) for value in size)
    return size
