"""Products with a weight in a layout of its own: by the compiled kernels, and by oneDNN inside torch.

While a model is compiled or traced each stands behind an operator, `torch.ops.rewire.packed_product` and
`torch.ops.rewire.onednn_product`, since a tracer can look into neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewire.modules.packed import native
from rewire.modules.packed.calls import is_traced

FLOATS = (torch.float32, torch.bfloat16)


def multiply(
    x: Tensor,
    weight: native.PackedWeight,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`activation(x @ weight.T + bias) + residual`, `[rows, outputs]` in `dtype`; see `native.Library.product`.

    Raises:
        ValueError: x or the residual has not the shape or the type that the weight asks for.
    """
    if x.shape[-1] != weight.inputs:
        raise ValueError(f"{weight.inputs} inputs expected, x has the shape {tuple(x.shape)}")
    if residual is not None and residual.shape != (x.shape[0], weight.outputs):
        raise ValueError(f"a residual of shape {tuple(residual.shape)} for {x.shape[0]} rows of {weight.outputs}")
    if x.dtype not in FLOATS or dtype not in FLOATS or x.device.type not in ("cpu", "meta"):
        raise ValueError(f"float32 or bfloat16 on the CPU expected, got {x.dtype} to {dtype} on {x.device}")
    if is_traced(x):
        parts = (weight.data, weight.scales, bias, residual, activation)
        numbers = (weight.outputs, weight.inputs, native.TYPES[weight.dtype], weight.isa)
        traced: Tensor = packed_product(x, *parts, *numbers, dtype)
        return traced
    kernels = native.library()
    if kernels is None:
        raise RuntimeError(f"a weight packed for the compiled kernels, which are gone: {native.absence()}")
    residual = None if residual is None else _even(residual.to(dtype))
    return kernels.product(_even(x), weight, bias, activation, residual, dtype=dtype)


def _even(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@torch.library.custom_op("rewire::packed_product", mutates_args=())
def packed_product(
    x: Tensor,
    data: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    outputs: int,
    inputs: int,
    kind: int,
    isa: int,
    dtype: torch.dtype,
) -> Tensor:
    """`multiply` with the weight in its parts."""
    held = next(dtype for dtype, code in native.TYPES.items() if code == kind)
    packed = native.PackedWeight(data, scales, outputs, inputs, held, isa)
    return multiply(x, packed, bias, activation, residual, dtype)


@packed_product.register_fake
def _(
    x: Tensor,
    data: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    outputs: int,
    inputs: int,
    kind: int,
    isa: int,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape[0], outputs, dtype=dtype)


# ---------------------------------------------------------------- oneDNN

# Name and algorithm by which oneDNN knows an activation.
ONEDNN_ACTIVATIONS = {
    None: ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}


def multiply_onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    """`activation(x @ weight.T + bias)`, or without activation `+ residual`; all of one type.

    Args:
        x: `[rows, inputs]`.
        weight: from `torch.ops.mkldnn._reorder_linear_weight`.
        bias: `[outputs]`, or None.
        activation: a key of `ONEDNN_ACTIVATIONS`.
        residual: `[rows, outputs]`, only without activation.
    """
    if is_traced(x):
        traced: Tensor = onednn_product(x, weight, bias, activation, residual)
        return traced
    product = torch.ops.mkldnn._linear_pointwise
    if residual is not None:
        out: Tensor = product.binary(x, residual, weight, bias, "add")
    else:
        name, algorithm = ONEDNN_ACTIVATIONS[activation]
        out = product(x, weight, bias, name, [], algorithm)
    return out


@torch.library.custom_op("rewire::onednn_product", mutates_args=())
def onednn_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    """`multiply_onednn` behind the dispatcher."""
    return multiply_onednn(x, weight, bias, activation, residual)


@onednn_product.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
