"""Attention within sequences of any lengths that lie one after the other, without padding.

Two ways to the same numbers: the compiled kernel (`rewire.modules.packed.native`) on the CPU where no gradients are
needed, else torch's own attention, one call for each run of equally long sequences. While a model is compiled or
traced both stand behind one operator, `torch.ops.rewire.packed_attention`, which knows its shape and its gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rewire.modules.packed import native
from rewire.modules.packed.calls import is_traced, needs_torch


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    longest: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`softmax(scale · q kᵀ + bias) v` within each sequence, `[tokens, heads, width]`.

    Args:
        q: `[tokens, heads, width]`; slices of a joined projection need no copy.
        k, v: the same, or with fewer heads: each then serves `heads / fewer` heads of q that follow each other.
        starts: int64 or int32 `[sequences + 1]`: where each sequence starts among the tokens, rising from 0 to their
            number. A sequence may be empty. On the CPU it is read without waiting for anything.
        scale: what the products of queries and keys are multiplied with.
        bias: added to the scaled products, `[heads or 1, longest, longest]`, by the positions of query and key within
            their sequence. Fastest as the transposed view of a contiguous tensor: unit stride among the queries.
        longest: the longest sequence's length; given, the bias is checked against it.
        dropout: share of the probabilities that are dropped.

    Raises:
        ValueError: `bias` is smaller than `longest`, or `starts` does not describe the tokens.

    >>> tokens = torch.randn(7, 3, 2, 4)  # 7 tokens; q, k and v; 2 heads of width 4
    >>> attention(*tokens.unbind(1), torch.tensor([0, 5, 7]), scale=0.5).shape
    torch.Size([7, 2, 4])
    """
    if bias is not None and longest is not None and min(bias.shape[-2:]) < longest:
        raise ValueError(f"a bias of shape {tuple(bias.shape)} for sequences of up to {longest} tokens")
    if is_traced(q):
        seed = torch.randint(2**31, (), dtype=torch.int64) if dropout else None
        traced: Tensor = packed_attention(q, k, v, starts, bias, scale, dropout, seed)
        return traced
    if dropout or needs_torch(q, k, v, bias):
        return torch_attention(q, k, v, starts, scale, bias, dropout)
    return run(q, k, v, starts, scale, bias)


def attention_path(dtype: torch.dtype, width: int, device: torch.device | str = "cpu") -> str:
    """What `attention` runs on without gradients: "native" with the instruction set, or "torch".

    >>> attention_path(torch.float64, 32)
    'torch'
    """
    kernels = native.library()
    if kernels is None or torch.device(device).type != "cpu" or not _is_native_type(dtype, width):
        return "torch"
    return f"native {kernels.isas[0]}"


# ---------------------------------------------------------------- the values alone


def _is_native_type(dtype: torch.dtype, width: int) -> bool:
    return dtype in (torch.float32, torch.bfloat16) and 0 < width <= native.WIDEST_HEAD


def run(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """The values alone, on the compiled kernel where it can."""
    kernels = native.library()
    if kernels is None or not _has_kernel(q, k, v, starts, bias):
        return torch_attention(q, k, v, starts, scale, bias, 0.0)
    if bias is not None:
        bias = bias.to(torch.float32).expand(q.shape[1], -1, -1)
    if starts.dtype != torch.int64 or not starts.is_contiguous():
        starts = starts.to(torch.int64).contiguous()
    return kernels.attention(q, k, v, starts, scale, bias)


def _has_kernel(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, bias: Tensor | None) -> bool:
    dtype = q.dtype
    return (
        _is_native_type(dtype, q.shape[-1])
        and k.dtype == dtype == v.dtype
        and q.is_cpu
        and k.is_cpu
        and v.is_cpu
        and starts.is_cpu
        and (bias is None or bias.is_cpu)
        and q.stride(-1) == 1 == k.stride(-1) == v.stride(-1)
    )


# ---------------------------------------------------------------- on torch alone


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, bias: Tensor | None, dropout: float
) -> Tensor:
    """The same from `scaled_dot_product_attention`, differentiable as often as that is."""
    parts = [
        _equally_long(q[start:stop], k[start:stop], v[start:stop], length, scale, bias, dropout)
        for start, stop, length in _runs(starts, q.shape[0])
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else q.new_empty(q.shape)


def _runs(starts: Tensor, tokens: int) -> Iterator[tuple[int, int, int]]:
    """Start, stop and length of the sequences in each run of neighbours of one length; empty ones left out."""
    places = starts.tolist()
    if places[0] != 0 or places[-1] != tokens or any(start > stop for start, stop in pairwise(places)):
        raise ValueError(f"starts must rise from 0 to the number of tokens, {tokens}")
    run: tuple[int, int, int] | None = None
    for start, stop in pairwise(places):
        if run is not None and stop - start == run[2]:
            run = (run[0], stop, run[2])
        elif stop > start:
            if run is not None:
                yield run
            run = (start, stop, stop - start)
    if run is not None:
        yield run


def _equally_long(
    q: Tensor, k: Tensor, v: Tensor, length: int, scale: float, bias: Tensor | None, dropout: float
) -> Tensor:
    """Attention of sequences of `length` tokens each, all in one call."""
    grouped = q.shape[1] != k.shape[1]
    if bias is not None:
        bias = bias[:, :length, :length].to(q.dtype)
    q, k, v = (tensor.unflatten(0, (-1, length)).transpose(1, 2) for tensor in (q, k, v))
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(0, 1)


# ---------------------------------------------------------------- as an operator, for compiled and traced models


@torch.library.custom_op("rewire::packed_attention", mutates_args=())
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """`attention` behind the dispatcher; `seed` says what is dropped, so that the backward pass drops the same."""
    if seed is None:
        return run(q, k, v, starts, scale, bias).contiguous()
    keep = _Keep(dropout, seed)
    out = q.new_zeros(q.shape)
    for start, stop, length in _runs(starts, q.shape[0]):
        parts = [_by_sequence(tensor[start:stop], length, q.shape[1]) for tensor in (q, k, v)]
        weights = _probabilities(parts[0], parts[1], scale, bias) * keep.factors(parts[0], length)
        out[start:stop] = _by_token(weights @ parts[2])
    return out


@packed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, bias: Tensor | None, *_: object) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("rewire::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias (empty without one); the probabilities are computed again instead of kept."""
    keep = None if seed is None else _Keep(dropout, seed)
    into = [tensor.new_zeros(tensor.shape) for tensor in (q, k, v)]
    into_bias = q.new_zeros(0 if bias is None else bias.shape)
    for start, stop, length in _runs(starts, q.shape[0]):
        queries, keys, values, of_out = (
            _by_sequence(tensor[start:stop], length, q.shape[1]) for tensor in (q, k, v, gradient)
        )
        factors = 1.0 if keep is None else keep.factors(queries, length)
        *grads, scores = _gradients(queries, keys, values, of_out, scale, bias, factors)
        for total, grad in zip(into, grads, strict=True):
            total[start:stop] = _by_token(grad).unflatten(1, (total.shape[1], -1)).sum(2)
        if bias is not None:
            into_bias[:, :length, :length] += scores.sum(0).sum_to_size(bias[:, :length, :length].shape)
    return into[0], into[1], into[2], into_bias


@packed_attention_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, bias: Tensor | None, *_: object
) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(0 if tensor is None else tensor.shape) for tensor in (q, k, v, bias))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, scale, dropout, seed = inputs
    ctx.options = (scale, dropout)
    ctx.save_for_backward(*tensors, seed)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    q, k, v, bias = packed_attention_backward(gradient, *tensors, *ctx.options, seed)
    return q, k, v, None, None if tensors[-1] is None else bias, None, None, None


packed_attention.register_autograd(_backward, setup_context=_save)


class _Keep:
    """What dropout multiplies the probabilities with, the same for each pass over the same runs."""

    def __init__(self, dropout: float, seed: Tensor) -> None:
        self.dropout = dropout
        self.generator = torch.Generator().manual_seed(int(seed))

    def factors(self, q: Tensor, length: int) -> Tensor:
        """0 or 1 / (1 - dropout), `[sequences, heads, length, length]` for q `[sequences, heads, length, width]`."""
        drawn = torch.rand((*q.shape[:2], length, length), generator=self.generator)
        factors: Tensor = (drawn >= self.dropout) / (1.0 - self.dropout)
        return factors.to(q)


def _by_sequence(tensor: Tensor, length: int, heads: int) -> Tensor:
    """`[tokens, heads or fewer, width]` as `[sequences, heads, length, width]`."""
    every = tensor.repeat_interleave(heads // tensor.shape[1], 1)
    return every.view(-1, length, *every.shape[1:]).transpose(1, 2)


def _by_token(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).flatten(0, 1)


def _probabilities(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    length = q.shape[2]
    scores = q @ k.transpose(2, 3) * scale
    if bias is not None:
        scores = scores + bias[:, :length, :length]
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, scale: float, bias: Tensor | None, factors: Tensor | float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the biased scores, each `[sequences, heads, length, …]`."""
    weights = _probabilities(q, k, scale, bias)
    of_weights = gradient @ v.transpose(2, 3) * factors
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
    of_v = (weights * factors).transpose(2, 3) @ gradient
    return of_scores @ k * scale, of_scores.transpose(2, 3) @ q * scale, of_v, of_scores
