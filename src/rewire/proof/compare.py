"""Two nested outputs, tensor by tensor, relative to the scale of each tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MAX_DEPTH = 8
ATTRIBUTE_NAMES = {"keys": "key", "values": "value"}
"""Attributes of cache layers, in the words of this project."""


def flatten(output: Any) -> dict[str, Tensor]:
    """Every tensor in a nested output, by a name that says where it lies.

    Mappings, sequences and plain objects (caches, dataclasses) are entered; the rest is passed over.

    >>> sorted(flatten({"logits": torch.zeros(1), "hidden_states": (torch.zeros(1), None, torch.zeros(1))}))
    ['hidden_states[0]', 'hidden_states[2]', 'logits']
    """
    return {"output": output} if isinstance(output, Tensor) else dict(_walk(output, "", ()))


def _walk(value: Any, name: str, above: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """Tensors below `value`; `above` holds the ids of what contains it, so that a circle ends."""
    if isinstance(value, Tensor):
        yield name, value
    elif len(above) < MAX_DEPTH and id(value) not in above:
        for key, child in _children(value, name):
            yield from _walk(child, key, (*above, id(value)))


def _children(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((_dotted(name, str(key)), child) for key, child in value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        yield from ((f"{name}[{index}]", child) for index, child in enumerate(value))
    elif isinstance(getattr(value, "layers", None), Sequence):  # a cache
        yield from ((_dotted(name, str(index)), layer) for index, layer in enumerate(value.layers))
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        for key, child in vars(value).items():
            yield _dotted(name, ATTRIBUTE_NAMES.get(key, key)), child


def _dotted(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def largest(tensor: Tensor) -> float:
    """Largest absolute value that is a measurement: neither infinite nor a filler such as the type's minimum.

    >>> largest(torch.tensor([1.0, -3.0, float("inf"), torch.finfo(torch.float32).min]))
    3.0
    """
    if tensor.numel() == 0:
        return 0.0
    values = widened(tensor).abs()
    limit = torch.finfo(tensor.dtype).max / 2 if tensor.dtype.is_floating_point else math.inf
    highest = values.max().item()
    if highest <= limit:
        return float(highest)
    return float(torch.where(values <= limit, values, torch.zeros_like(values)).max().item())


def widened(tensor: Tensor) -> Tensor:
    """`tensor` in a type that subtracts and compares without loss."""
    if tensor.dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        return tensor
    return tensor.to(torch.float32 if tensor.dtype.is_floating_point else torch.float64)


def relative_difference(before: Tensor, after: Tensor, scale: float | None = None) -> float:
    """Largest absolute difference over `scale` (the largest absolute value of `before` unless given).

    Equal infinities and NaN in the same places agree. Infinite when shapes differ, when one side alone is not
    finite, or when tensors that are not floating differ at all.

    >>> relative_difference(torch.tensor([0.0, 4.0]), torch.tensor([0.0, 4.5]))
    0.125
    """
    if before.shape != after.shape:
        return math.inf
    left, right = _common(widened(before), widened(after.to(before.device)))
    if torch.equal(left, right):
        return 0.0
    if not (before.is_floating_point() or before.is_complex()):
        return math.inf
    gap = (left - right).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    same = (left == right) | (left.isnan() & right.isnan())
    worst = float(torch.where(same, torch.zeros_like(gap), gap).max().item())
    scale = largest(before) if scale is None else scale
    return 0.0 if worst == 0 else worst / scale if scale > 0 else math.inf


def _common(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(left.dtype, right.dtype)
    return left.to(dtype), right.to(dtype)


def position_dim(name: str, tensor: Tensor, mask: Tensor) -> int | None:
    """The dimension of `tensor` that runs over the positions of `mask` (batch, length), if there is one.

    Cache tensors are (batch, heads, length, size); everything else has its length as early as possible.
    """
    batch, length = mask.shape
    if tensor.ndim < 2 or tensor.shape[0] != batch:
        return None
    if name.endswith((".key", ".value")) and tensor.ndim == 4:
        return 2 if tensor.shape[2] == length else None
    return next((dim for dim in range(1, tensor.ndim) if tensor.shape[dim] == length), None)


def at_positions(name: str, tensor: Tensor, mask: Tensor | None, real: bool) -> Tensor | None:
    """The part of `tensor` at real (or padded) positions; None where there are none of the latter.

    Rows without a dimension for positions may be pooled from the first one, so they count as padded where that is
    padding.
    """
    if mask is None or tensor.ndim == 0 or tensor.shape[0] != mask.shape[0]:
        return tensor if real else None
    dim = position_dim(name, tensor, mask)
    place = mask if dim is not None else mask[:, 0]
    chosen = (place if real else ~place).to(tensor.device)
    part = tensor[chosen] if dim is None else tensor.movedim(dim, 1)[chosen]
    return part if real or part.numel() > 0 else None


@dataclass(frozen=True)
class Difference:
    """How far one output tensor of the edited model lies from the untouched one, relative to its scale.

    `padded` is None where the tensor has no padded positions.
    """

    name: str
    real: float
    padded: float | None
    bit_equal: bool


def compare_outputs(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], mask: Tensor | None = None
) -> tuple[Difference, ...]:
    """One difference per tensor on either side; a tensor that one side lacks is infinitely far away.

    >>> [d.real for d in compare_outputs({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(1)})]
    [0.0, inf]
    """
    missing = [name for name in (*before, *after) if name not in before or name not in after]
    common = [name for name in before if name in after]
    found = [_compare_one(name, before[name], after[name], mask) for name in common]
    return (*found, *(Difference(name, math.inf, None, False) for name in missing))


def _compare_one(name: str, before: Tensor, after: Tensor, mask: Tensor | None) -> Difference:
    after = after.to(before.device)
    if before.dtype == after.dtype and torch.equal(before, after):
        padded = at_positions(name, before, mask, real=False)
        return Difference(name, 0.0, None if padded is None else 0.0, True)
    if before.shape != after.shape:
        return Difference(name, math.inf, None, False)
    real = _compare_part(name, before, after, mask, real=True)
    return Difference(name, real or 0.0, _compare_part(name, before, after, mask, real=False), False)


def _compare_part(name: str, before: Tensor, after: Tensor, mask: Tensor | None, real: bool) -> float | None:
    left = at_positions(name, before, mask, real)
    right = at_positions(name, after, mask, real)
    if left is None or right is None or left.numel() == 0:
        return None
    return relative_difference(left, right)
