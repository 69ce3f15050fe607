"""An `nn.MultiheadAttention` whose queries, keys and values have become linear layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewire.modules.split import _linear


class SplitMultiheadAttention(nn.Module):
    """Stands where an `nn.MultiheadAttention` stood and is called like it; the parts are called as modules.

    Args:
        attention: the original, whose settings are taken over, and whose `out_proj` is.
        parts: names of the linear layers of queries, keys and values.

    >>> attention = SplitMultiheadAttention(nn.MultiheadAttention(8, 2), ("q", "k", "v"))
    >>> attention.q
    Linear(in_features=8, out_features=8, bias=True)
    """

    out_proj: nn.Module
    bias_k: Tensor | None
    bias_v: Tensor | None

    # Fast paths of torch that read the fused weight would pass the parts (and what is adapted there) by.
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention, parts: Sequence[str]) -> None:
        super().__init__()
        self.embed_dim = self.kdim = self.vdim = attention.embed_dim
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        self.add_zero_attn = attention.add_zero_attn
        self.parts = tuple(parts)
        bias, weight = attention.in_proj_bias is not None, attention.in_proj_weight
        for name in self.parts:
            self.add_module(name, _linear(self.embed_dim, self.embed_dim, bias, "meta", weight.dtype))
        self.out_proj = attention.out_proj
        for name in ("bias_k", "bias_v"):
            self.register_parameter(name, getattr(attention, name))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`: the output and, if `need_weights`, the attention weights."""
        batched = query.dim() == 3
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal says what attn_mask holds; give attn_mask too")
        lone_hint = is_causal and key_padding_mask is None and not need_weights
        q, k, v = self._projected(query, key, value)
        mask = None if lone_hint else self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            out, weights = self._with_weights(q, k, v, mask, dropout)
        else:
            out, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout, lone_hint), None
        out = self.out_proj(self._as_given(out, batched))
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return out, weights

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        """Queries, keys and values as `[batch, heads, length, head_dim]`."""
        rows: list[Tensor] = []
        for name, x in zip(self.parts, inputs, strict=True):
            out = getattr(self, name)(x)
            rows.append(out.unsqueeze(0) if x.dim() == 2 else out if self.batch_first else out.transpose(0, 1))
        if self.bias_k is not None and self.bias_v is not None:
            for index, bias in ((1, self.bias_k), (2, self.bias_v)):
                rows[index] = torch.cat([rows[index], bias.expand(rows[index].shape[0], 1, -1)], dim=1)
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in rows]
        if self.add_zero_attn:
            heads[1:] = [F.pad(x, (0, 0, 0, 1)) for x in heads[1:]]
        return heads

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores, `[batch or 1, heads or 1, queries or 1, keys]`."""
        masks = []
        if attn_mask is not None:
            by_head = (-1, self.num_heads) if attn_mask.dim() == 3 else (1, 1)
            masks.append(_added(attn_mask, q).view(*by_head, *attn_mask.shape[-2:]))
        if key_padding_mask is not None:
            masks.append(_added(key_padding_mask, q)[:, None, None, :])
        more = (self.bias_k is not None) + self.add_zero_attn  # keys that nobody can mask
        return F.pad(sum(masks[1:], masks[0]), (0, more)) if masks else None

    def _with_weights(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
    ) -> tuple[Tensor, Tensor]:
        scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(dim=-1)
        if dropout > 0:
            weights = F.dropout(weights, dropout)
        return weights @ v, weights

    def _as_given(self, out: Tensor, batched: bool) -> Tensor:
        """`[batch, heads, length, head_dim]` in the layout of the query that was given."""
        rows = out.transpose(1, 2).flatten(2)
        if not batched:
            return rows.squeeze(0)
        return rows if self.batch_first else rows.transpose(0, 1)

    @property
    def in_proj_weight(self) -> Tensor:
        """The fused weight `[3 · embed_dim, embed_dim]`, put together anew at every access."""
        return torch.cat([getattr(self, name).weight for name in self.parts])

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The fused bias `[3 · embed_dim]`, put together anew at every access."""
        biases = [getattr(self, name).bias for name in self.parts]
        return None if biases[0] is None else torch.cat(biases)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _added(mask: Tensor, q: Tensor) -> Tensor:
    """A mask as numbers to be added; a boolean one is true where nothing may be seen."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        raise TypeError(f"a mask holds booleans or floats, not {mask.dtype}")
    return mask.to(q.dtype)
