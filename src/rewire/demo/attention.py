"""An attention for SAM with separate q, k and v, written the way a user of the guide would write it.

It does what the guide's class does, brought up to date with the installed Transformers: `rewire.demo.recipes`
shows what becomes of it by the published recipes, `rewire.demo.sam` what a `Replace` plan makes of it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.sam.modeling_sam import SamVisionAttention

PARTS = ("q", "k", "v")


class SplitSamAttention(SamVisionAttention):
    """SAM's vision attention with three projections in place of the fused one.

    Args:
        config: the vision encoder's configuration.
        window_size: side of the window that is attended to; 0 means the whole image.
    """

    hook_calls: ClassVar[int] = 0
    """How often the hook that splits fused tensors has run, over all instances of the class."""

    def __init__(self, config: Any, window_size: int) -> None:
        super().__init__(config, window_size)  # type: ignore[no-untyped-call]
        del self.qkv
        for part in PARTS:
            self.add_module(part, nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias))
        self.register_load_state_dict_pre_hook(_split_fused)  # type: ignore[no-untyped-call]

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> Any:
        """`[batch, height, width, channels]` to the same shape, and the attention weights if asked for."""
        batch, height, width, _ = hidden_states.shape
        query, key, value = (self._heads(self.get_submodule(part)(hidden_states)) for part in PARTS)
        scores = (query * self.scale) @ key.transpose(-2, -1)
        if self.use_rel_pos:
            size = (height, width)
            positions = self.get_decomposed_rel_pos(query, self.rel_pos_h, self.rel_pos_w, size, size)
            scores = scores + positions.reshape_as(scores)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        dropped = F.dropout(weights, self.dropout, training=self.training)
        mixed = (dropped @ value).unflatten(0, (batch, -1)).transpose(1, 2).reshape(hidden_states.shape)
        return self.proj(mixed), weights if output_attentions else None

    def _heads(self, rows: Tensor) -> Tensor:
        """`[batch, height, width, channels]` to `[batch * heads, height * width, channels of a head]`."""
        heads = rows.flatten(1, 2).unflatten(-1, (self.num_attention_heads, -1))
        by_head: Tensor = heads.transpose(1, 2).flatten(0, 1)
        return by_head


def _split_fused(module: SplitSamAttention, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before torch loads a state dict: the fused tensors of this module (and of no other) become three."""
    type(module).hook_calls += 1
    fused = f"{prefix}qkv."
    for name in [name for name in state_dict if name.startswith(fused)]:
        leaf = name.removeprefix(fused)
        thirds = state_dict.pop(name).chunk(len(PARTS), dim=0)
        state_dict |= {f"{prefix}{part}.{leaf}": third for part, third in zip(PARTS, thirds, strict=True)}
