"""Linear layers with everything around them in one step, on weights made ready beforehand.

`prepare` turns a weight into a function of packed tokens: product, bias, activation and residual together. Which way
it works is measured once per machine, type and class of shapes, among those that give what `torch.nn.functional.linear`
gives on a sample:

- "linear": torch's own, on the dense weight;
- "onednn": oneDNN on a weight in its own layout (private operators of torch, those that its compiler emits);
- "native": the compiled kernels (`rewire.modules.packed.native`).

With `int8` the weight has one scale per output and each token is quantised with a scale and a zero point of its own:
"int8 native" where the CPU has instructions for it, else "int8 torch".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rewire.modules.packed import measured, native
from rewire.modules.packed.calls import needs_torch
from rewire.modules.packed.product import ONEDNN_ACTIVATIONS, multiply, multiply_onednn

SAMPLE_ROWS = 256
SMALLEST_COSINE = 0.999


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": functional.relu,
    "silu": functional.silu,
}


@dataclass(frozen=True, eq=False)
class Prepared:
    """`activation(x @ weight.T + bias) (+ residual)`, without gradients; made by `prepare`.

    Attributes:
        how: which way it works, for a receipt.
        outputs: size of the last dimension of what it gives.
        activation: its name, or None.
        dtype: the type of the weight given.
        lossy: whether the weight given is no longer here in full.
    """

    how: str
    outputs: int
    activation: str | None
    dtype: torch.dtype
    lossy: bool

    def __call__(self, x: Tensor, *, residual: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """`[tokens, inputs]` (or more leading dimensions) to `[tokens, outputs]`.

        Args:
            x: the tokens.
            residual: added after the activation; the shape of the result.
            dtype: the type of the result; that of the residual unless given, and that of x where there is none. With
                products of bfloat16 or int8, what goes on to attention or to the next product loses nothing that
                counts in bfloat16, and takes half the time to write and read.

        Raises:
            RuntimeError: gradients are wanted of x; the weight here has none to give.
        """
        if needs_torch(x, residual):
            raise RuntimeError("a prepared weight gives no gradients; use the layer's own weight, or torch.no_grad()")
        rows = x if x.ndim == 2 else x.flatten(0, -2)
        if residual is not None and residual.ndim != 2:
            residual = residual.flatten(0, -2)
        if dtype is None:
            dtype = x.dtype if residual is None else residual.dtype
        out = self._run(rows, residual, dtype)
        return out if x.ndim == 2 else out.unflatten(0, x.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Memory of the weight as it is held here; "linear" holds the one given, if that has the type wanted."""
        raise NotImplementedError

    def to_dense(self) -> Tensor:
        """The weight `[outputs, inputs]` as it was given, bit by bit.

        Raises:
            RuntimeError: it was rounded to another type when it was prepared.
        """
        if self.lossy:
            raise RuntimeError(f"the weight was rounded when it was prepared ({self.how}); it cannot be given back")
        return self._dense().to(self.dtype)

    def _run(self, x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def _dense(self) -> Tensor:
        raise NotImplementedError


def prepare(
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None = None,
    dtype: torch.dtype | None = None,
    int8: bool = False,
) -> Prepared:
    """The layer with this weight in the way that is fastest here.

    Args:
        weight: `[outputs, inputs]`; shared where the way needs no layout of its own, else copied.
        bias: `[outputs]`, or None.
        activation: None, "gelu", "gelu_tanh", "quick_gelu", "relu" or "silu".
        dtype: the type of the products, that of the weight unless given; what goes in and comes out keeps its own.
        int8: products of int8, whatever `dtype` says.

    Raises:
        ValueError: the activation is not one of these.

    >>> layer = prepare(torch.eye(3), torch.ones(3), activation="relu")
    >>> layer(torch.tensor([[-2.0, 0.0, 2.0]]), residual=torch.ones(1, 3))
    tensor([[1., 2., 4.]])
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known are {', '.join(map(repr, ACTIVATIONS))}")
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    request = _Request(weight, bias, activation, dtype or weight.dtype)
    if int8:
        return _trusted(_Int8Native.make, request, SMALLEST_COSINE) or _Int8Torch.make(request)
    plain = _Linear.make(request)
    if not _has_choice(weight, request.dtype):
        return plain
    others = (_trusted(way.make, request) for way in (_Native, _OneDnn))
    ways = {one.how: one for one in (plain, *others) if one is not None}
    x = torch.randn(SAMPLE_ROWS, weight.shape[1]).to(request.dtype)
    with torch.inference_mode():
        calls = {how: (lambda way=way: way(x)) for how, way in ways.items()}
        return ways[measured.fastest(_case(request), calls)]


def _has_choice(weight: Tensor, dtype: torch.dtype) -> bool:
    return weight.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and 0 not in weight.shape


@dataclass(frozen=True, eq=False)
class _Request:
    weight: Tensor
    bias: Tensor | None
    activation: str | None
    dtype: torch.dtype

    def facts(self, how: str, dtype: torch.dtype) -> dict[str, Any]:
        """The fields of every way: `how` it works, in which type."""
        given = self.weight.dtype
        lossy = dtype == torch.int8 or torch.promote_types(given, dtype) != dtype
        outputs = self.weight.shape[0]
        return {"how": how, "outputs": outputs, "activation": self.activation, "dtype": given, "lossy": lossy}


def _case(request: _Request) -> str:
    """Class of the shape (powers of two), activation and type: what the fastest way depends on."""
    outputs, inputs = (size.bit_length() for size in request.weight.shape)
    return f"linear 2^{inputs} to 2^{outputs} {request.activation} {str(request.dtype).removeprefix('torch.')}"


def _trusted(
    make: Callable[[_Request], Prepared | None], request: _Request, smallest_cosine: float | None = None
) -> Prepared | None:
    """What `make` gives if it is there and agrees with torch on a few strong rows, residual included."""
    try:
        made = make(request)
        if made is None:
            return None
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, request.weight.shape[1], generator=generator).to(request.dtype)
        residual = torch.randn(3, request.weight.shape[0], generator=generator).to(request.dtype)
        with torch.inference_mode():
            got = made(x, residual=residual).float()
            expected = _Linear.make(request)(x, residual=residual).float()
    except (RuntimeError, ValueError, AttributeError, NotImplementedError):
        return None
    if smallest_cosine is not None:
        return made if functional.cosine_similarity(got, expected).min() >= smallest_cosine else None
    bound = 1e-5 if request.dtype == torch.float32 else 3e-2
    largest = max(1.0, float(expected.abs().max()))
    return made if float((got - expected).abs().max()) <= bound * largest else None


# ---------------------------------------------------------------- the ways


@dataclass(frozen=True, eq=False)
class _Linear(Prepared):
    """torch's own product on the dense weight."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def make(cls, request: _Request) -> _Linear:
        bias = None if request.bias is None else request.bias.to(request.dtype)
        return cls(**request.facts("linear", request.dtype), weight=request.weight.to(request.dtype), bias=bias)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def _run(self, x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        out = functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
        return _around(out, self.activation, residual, dtype)

    def _dense(self) -> Tensor:
        return self.weight


def _around(product: Tensor, activation: str | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Activation and residual by torch, one after the other, in the type wanted."""
    out = product if activation is None else ACTIVATIONS[activation](product)
    out = out.to(dtype)
    return out if residual is None else out + residual.to(dtype)


@dataclass(frozen=True, eq=False)
class _OneDnn(Prepared):
    """oneDNN's product on a weight in the layout that it likes best."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def make(cls, request: _Request) -> _OneDnn | None:
        if not torch.backends.mkldnn.is_available():
            return None
        dense = request.weight.to(request.dtype).contiguous()
        packed = torch.ops.mkldnn._reorder_linear_weight(dense, None)
        bias = None if request.bias is None else request.bias.to(request.dtype)
        return cls(**request.facts("onednn", request.dtype), weight=packed, bias=bias)

    @property
    def nbytes(self) -> int:
        return int(torch.ops.mkldnn._nbytes(self.weight))

    def _run(self, x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        rows = x.to(self.weight.dtype)
        fused = residual is not None and self.activation is None and residual.dtype == rows.dtype == dtype
        if self.activation in ONEDNN_ACTIVATIONS:
            out = multiply_onednn(rows, self.weight, self.bias, self.activation, residual if fused else None)
            return _around(out, None, None if fused else residual, dtype)
        out = multiply_onednn(rows, self.weight, self.bias, None, None)
        return _around(out, self.activation, residual, dtype)

    def _dense(self) -> Tensor:
        return self.weight.to_dense()


@dataclass(frozen=True, eq=False)
class _Native(Prepared):
    """The compiled kernels: one pass, whatever stands around the product."""

    weight: native.PackedWeight
    bias: Tensor | None

    @classmethod
    def make(cls, request: _Request) -> _Native | None:
        kernels = native.library()
        if kernels is None or not kernels.is_fast(request.dtype):
            return None
        return cls._packed(kernels, request, "native", request.dtype)

    @classmethod
    def _packed(cls, kernels: native.Library, request: _Request, how: str, dtype: torch.dtype) -> _Native:
        bias = None if request.bias is None else request.bias.to("cpu", torch.float32).contiguous()
        facts = request.facts(f"{how} {kernels.isas[0]}", dtype)
        return cls(**facts, weight=kernels.pack(request.weight, dtype), bias=bias)

    @property
    def nbytes(self) -> int:
        return self.weight.data.nbytes

    def _run(self, x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        return multiply(x, self.weight, self.bias, self.activation, residual, dtype)

    def _dense(self) -> Tensor:
        return self.weight.to_dense()


@dataclass(frozen=True, eq=False)
class _Int8Native(_Native):
    """The compiled kernels on an int8 weight; rows are quantised on the way in."""

    @classmethod
    def make(cls, request: _Request) -> _Native | None:
        kernels = native.library()
        if kernels is None or not kernels.is_fast(torch.int8) or not _has_choice(request.weight, torch.float32):
            return None
        return cls._packed(kernels, request, "int8 native", torch.int8)


@dataclass(frozen=True, eq=False)
class _Int8Torch(Prepared):
    """torch's product of int8 matrices between a quantising and a rescaling pass."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    @classmethod
    def make(cls, request: _Request) -> _Int8Torch:
        codes, scales = _quantised(request.weight.float())
        bias = None if request.bias is None else request.bias.float()
        return cls(**request.facts("int8 torch", torch.int8), weight=codes.t(), scales=scales[:, 0], bias=bias)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def _run(self, x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        codes, scales = _quantised(x.float())
        out = torch._int_mm(codes, self.weight).float() * scales * self.scales
        if self.bias is not None:
            out += self.bias
        return _around(out, self.activation, residual, dtype)


def _quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as int8 and the scale of each, `[rows, 1]`."""
    scales = rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127.0
    return (rows / scales).round().to(torch.int8), scales
