"""Small models in stages: lists with a number for each stage."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

from rewire.zoo.values import LAYERS, Config, is_int, is_list, is_numbers

NARROW, NARROW_ENOUGH = 16, 64
"""The least width of a stage, and the greatest of stages that stay as they are."""

_DEPTHS = re.compile(
    r"depths?|\w*_depths|blocks_per_stage|stage_num_blocks|stage_numb_of_layers|num_block_repeats|block_sizes"
)
_WIDTHS = re.compile(
    r"(\w+_)?hidden_sizes|\w+_channels|in_channels|out_channels|(\w+_)?embed_dims?(_per_stage)?|conv_dim|tdnn_dim"
    r"|backbone_channel_list|(\w+_)?feature_dims|base_attn_unit_dims"
)
_HEADS = re.compile(r"num_(attention_)?heads(_per_stage)?")
_BLOCKS = "global_attention_blocks"


def stage_count(config: Config) -> int:
    """How many stages a configuration has; 1 where it has none.

    >>> from types import SimpleNamespace
    >>> stage_count(SimpleNamespace(depths=[2, 2, 6, 2])), stage_count(SimpleNamespace(depth=12))
    (4, 1)
    """
    return max((len(value) for value in _lists(config, _DEPTHS).values()), default=1)


def stage_widths(config: Config) -> frozenset[int]:
    """The widths of stages that grow or shrink from one to the next.

    >>> from types import SimpleNamespace
    >>> sorted(stage_widths(SimpleNamespace(hidden_sizes=[64, 128], decoder_in_channels=[256, 256])))
    [64, 128]
    """
    if hasattr(config, "width_coefficient"):
        return frozenset({config.hidden_dim})
    widths = {one for value in _lists(config, _WIDTHS).values() if _is_rising(value) for one in value}
    first = getattr(config, "embed_dim", None)
    return frozenset(widths | ({first} if is_int(first) and stage_count(config) > 1 else set()))


def narrow_stages(config: Config, hidden: Mapping[int, int]) -> None:
    """Makes the stages of a configuration small, in place: two layers at most, an eighth of the width.

    Stages that are all as wide as some hidden size become as wide as that does (`hidden`).

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(depths=[3, 4, 6, 3], hidden_sizes=[256, 512, 1024, 2048])
    >>> narrow_stages(config, {})
    >>> config.depths, config.hidden_sizes
    ([2, 2, 2, 2], [32, 64, 128, 256])
    """
    _few_blocks(config)
    if hasattr(config, "width_coefficient"):  # EfficientNet's factors for all lists
        config.width_coefficient, config.depth_coefficient = config.width_coefficient / 8, 1.0
        config.num_hidden_layers = 4 * sum(config.num_block_repeats)  # as the configuration counts them itself
        return
    widths = _lists(config, _WIDTHS)
    is_narrow = all(one <= NARROW_ENOUGH for value in widths.values() for one in value)
    heads = next(iter(_lists(config, _HEADS).values()), ())
    for name, value in () if is_narrow else widths.items():
        small = [eighth(one) if _is_rising(value) else hidden.get(one, eighth(one)) for one in value]
        if len(small) == len(heads):
            small = [-(-one // number) * number for one, number in zip(small, heads, strict=True)]
        setattr(config, name, type(value)(small))
    if heads and is_int(getattr(config, "embed_dim", None)):
        config.embed_dim = heads[0] * 8
        if is_int(getattr(config, "hidden_size", None)):  # Swin's: the width of the last stage
            config.hidden_size = config.embed_dim * heads[-1] // heads[0]


def eighth(width: int) -> int:
    """The small width for the original one of a stage: a multiple of 8, for heads to divide it.

    >>> eighth(96), eighth(240), eighth(768)
    (16, 32, 96)
    """
    return width if width <= NARROW else max(NARROW, -(-width // 64) * 8)


def _few_blocks(config: Config) -> None:
    """Two layers a stage at most; of layers that are told by number, the last of their stage."""
    for name, value in _lists(config, _DEPTHS).items():
        few = type(value)(min(one, LAYERS) for one in value)
        blocks = getattr(config, _BLOCKS, None)
        if is_list(blocks) and name == "blocks_per_stage":
            ends, small_ends = list(accumulate(value)), list(accumulate(few))
            stages = sorted({bisect_right(ends, block) for block in blocks})
            setattr(config, _BLOCKS, type(blocks)(small_ends[stage] - 1 for stage in stages))
        setattr(config, name, few)


def _lists(config: Config, names: re.Pattern[str]) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if names.fullmatch(name) and is_numbers(value)}


def _is_rising(widths: Any) -> bool:
    steps = {(after > before) - (after < before) for before, after in pairwise(widths)}
    return 1 in steps or -1 in steps
