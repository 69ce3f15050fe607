"""Makes the configuration of any model type small, without knowing the type.

Few layers, few heads, narrow widths, small vocabularies and images; every divisibility that the original has (heads
into widths, key-value heads into heads, groups into experts) holds in the small one too, because the same original
number becomes the same small number wherever it stands, and multiples stay multiples.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from rewire.zoo.heads import HEAD, HEADS, HeadSizes, few_heads, fill_state_spaces, is_head_size, split_rotation
from rewire.zoo.images import Images, small_images
from rewire.zoo.layers import as_configs, few_layers, put_overrides, take_overrides
from rewire.zoo.stages import eighth, narrow_stages, stage_widths
from rewire.zoo.values import Config, configs_within, is_int, is_numbers, listed, numbers

EXPERTS = 4

HIDDEN = HEADS * HEAD
MOST_TIMES = 16
"""How many times another width a width may be by design; beyond that it is by accident."""

VOCABULARY = 128
POSITIONS = 128


def shrink(config: Config) -> None:
    """Makes `config`, and every configuration inside it, small. In place."""
    found = list(configs_within(config))
    widths, tokens, images = _Widths.of(found), _Tokens.of(found), Images.of(found)
    for one in found:
        overrides = few_layers(one, take_overrides(one))
        layers = as_configs(one, overrides)
        sizes = HeadSizes.of([one, *layers.values()])
        for part in (one, *layers.values()):
            _few_of_everything(part)
            _low_token_ids(part, tokens)
            few_heads(part)
            sizes.apply(part)
            _narrow(part, widths)
            fill_state_spaces(part, HIDDEN)
            split_rotation(part)
            narrow_stages(part, widths.hidden)
            small_images(part, images)
            _narrow_sounds(part)
        put_overrides(one, overrides, layers)


# ---------------------------------------------------------------- plain upper limits

_LIMITS: tuple[tuple[str, int], ...] = (
    (r"(\w+_)?vocab_size(_\w+)?|(\w+_)?vocabulary_size|encoder_hash_byte_group_vocab", VOCABULARY),
    (r"num_embeddings|codebook_size", VOCABULARY),
    (r"(\w+_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|max_length", POSITIONS),
    (r"max_(source|target|text|speech|encoder|decoder|2d)_position(s|_embeddings)|model_max_length", POSITIONS),
    (r"original_max_position_embeddings", POSITIONS),
    (r"(n|num)_(\w+_)?experts|(\w+_)?num_experts|moe_num_experts", EXPERTS),
    (r"num_experts_per_tok(en)?|top_k_experts|moe_top_?k|top_k|moe_k", 2),
    (r"n_group|topk_group|num_expert_group|(mamba_)?n_groups|mamba_ngroups", 2),
    (r"num_sparse_(en|de)coder_layers", 1),
    (r"zero_expert_num", 2),
    (r"mamba_d_state|state_size|ssm_state_size|mamba_chunk_size", 16),
    (r"num_hash_buckets|position_bias_num_buckets|max_xpath_(tag|subs)_unit_embeddings", VOCABULARY),
    (r"max_ep_len|context_length|horizon_length", 64),
    (r"(prompt|segment)_types|prompt_length|local_transformer_stride|resampler_num_latents", 8),
    (r"index_kpool|aligner_num_add_layers", 2),
    (r"num_queries|two_stage_num_proposals|num_query_tokens|max_num_objects", 12),
    (r"index_topk|(sliding|attention)_window(_size)?|local_attention(_window_len)?|attention_chunk_size", 8),
    (r"num_frames|frames_per_clip", 4),
    (r"num_denoising", 4),
    (r"pos_emb_(height|width)|posemb_grid_size", 8),
    (r"position_embedding_size|num_(character|bpe|wordpiece)_labels", POSITIONS),
)  # fmt: skip


def _few_of_everything(config: Config) -> None:
    for name, value in numbers(config).items():
        limit = next((limit for pattern, limit in _LIMITS if re.fullmatch(pattern, name)), None)
        if limit is not None and value > limit:
            setattr(config, name, limit)


# ---------------------------------------------------------------- token ids

_TOKEN = re.compile(r"\w*(token|bos|eos|pad|start|end|newline|patch)_(ids?|index)|(suppress|begin_suppress)_tokens")


@dataclass(frozen=True)
class _Tokens:
    """Which original token id becomes which small one: distinct ids stay distinct, in every configuration alike."""

    small: dict[int, int]

    @classmethod
    def of(cls, configs: list[Config]) -> _Tokens:
        """Ids that do not fit a small vocabulary are counted down from its end."""
        found = sorted({one for config in configs for ids in _token_ids(config).values() for one in listed(ids)})
        taken = {one for one in found if one < VOCABULARY // 2}
        free = (number for number in range(VOCABULARY - 2, 0, -1) if number not in taken)
        return cls({one: one if one in taken else next(free) for one in found})


def _token_ids(config: Config) -> dict[str, Any]:
    """The values of a configuration that are token ids, or lists of them."""
    return {
        name: value
        for name, value in vars(config).items()
        if _TOKEN.fullmatch(name) and value and all(is_int(one) and one >= 0 for one in listed(value))
    }


def _low_token_ids(config: Config, tokens: _Tokens) -> None:
    for name, value in _token_ids(config).items():
        small = [tokens.small[one] for one in listed(value)]
        setattr(config, name, type(value)(small) if isinstance(value, list | tuple) else small[0])


# ---------------------------------------------------------------- widths

_HIDDEN_NAMES = (
    "hidden_size", "n_embd", "d_model", "embed_dim", "embedding_dim", "hidden_dim", "dim", "emb_dim", "d_latents",
    "decoder_hidden_size", "encoder_hidden_size", "text_hidden_size",
)  # fmt: skip
_WIDTH = re.compile(
    r"(\w+_)?(size|dims?|dimensions?|upsample_groups|embd|d_model|d_kv|d_ff|dim_ff|dff|n_inner|d_inner|channels|rank|units|width|features|mlp_dim|planes"
    r"|filters|feats|per_layer_input|d_latents|d_head|dim_head|size_per_head|ffn_hidden_size|dim_feedforward)(_[12]d|_mlp|_global)?"
)
_NOT_WIDTH = re.compile(
    r"(?!codebook_dim|conv_dim)(\w+_)?(vocab|patch|image|input|window|kernel|batch|crop|spec|img|merge|block|chunk|cache|pool|grid|beam|group"
    r"|vocabulary|codebook|stride|tile|context|grid|type_vocab|frame|conv|position|pos_emb|posemb|buffer|segment|tubelet|roi|index_block)"
    r"_?(size|dim|width|channels)?(_\w+)?"
    r"|num_channels|in_channels|in_chans|model_in_dim|(audio|mask_input|input|image)_channels|num_channels_out|\w*_kernel_dim|mamba_d_conv|keypoint_decoder_dim|memory_encoder_output_channels"
)


@dataclass(frozen=True)
class _Widths:
    """Which original width becomes which small one, the same everywhere in a tree of configurations."""

    hidden: dict[int, int] = field(default_factory=dict)
    heads: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, configs: list[Config]) -> _Widths:
        """Every hidden size becomes `HIDDEN`, every size of a head `HEAD`."""
        hidden: dict[int, int] = {}
        heads: dict[int, int] = {}
        for config in configs:
            found = numbers(config)
            for name in _HIDDEN_NAMES:
                if found.get(name, 0) > HIDDEN:
                    hidden[found[name]] = eighth(found[name]) if found[name] in stage_widths(config) else HIDDEN
            if found.get("head_dim", 0) > HEAD:
                heads[found["head_dim"]] = HEAD
        for width in (numbers(config).get("out_hidden_size", 0) for config in configs):
            # What a tower hands to the text: the text's hidden size, whatever the defaults say, or merged patches.
            if width > HIDDEN and all(width % known for known in hidden):
                hidden[width] = HIDDEN
        return cls(hidden, heads)

    def small(self, value: int) -> int:
        """The small width for an original one."""
        if value in self.hidden:
            return self.hidden[value]
        if value in self.heads:
            return self.heads[value]
        for width in sorted(self.hidden, reverse=True):
            if value % width == 0 and value <= MOST_TIMES * width:
                return value // width * self.hidden[width]
            if width % value == 0 and value >= width // 4:
                return max(8, -(-self.hidden[width] * value // width // 8) * 8)
        largest = max(self.hidden, default=256)
        return max(8, -(-value * HIDDEN // largest // 16) * 16)


def _is_width(name: str) -> bool:
    return _WIDTH.fullmatch(name) is not None and _NOT_WIDTH.fullmatch(name) is None and not is_head_size(name)


def _narrow(config: Config, widths: _Widths) -> None:
    for name, value in numbers(config).items():
        if value > HEAD and _is_width(name):
            setattr(config, name, widths.small(value))
    for name, value in vars(config).items():
        if is_numbers(value) and name.endswith("intermediate_size"):
            setattr(config, name, type(value)(map(widths.small, value)))


# ---------------------------------------------------------------- sounds

_RATIOS = ("upsampling_ratios", "downsampling_ratios")
_DOUBLED, _HALVED = ("num_filters", "encoder_hidden_size"), "upsample_initial_channel"
FILTERS = 2


def _narrow_sounds(config: Config) -> None:
    """Codecs, whose widths double with every ratio, and vocoders, whose widths are halved with every rate."""
    for name in _DOUBLED if any(is_numbers(vars(config).get(ratios)) for ratios in _RATIOS) else ():
        if vars(config).get(name) is not None:
            setattr(config, name, min(getattr(config, name), FILTERS))
    if vars(config).get(_HALVED) is not None:
        setattr(config, _HALVED, min(getattr(config, _HALVED), HIDDEN))
