"""The compiled kernels: found, checked once, and called through ctypes.

The library is built by `pip install` where a C++ compiler is at hand (see `hatch_build.py`) and lies in
`rewire/native`. It is optional: `library()` is None where it is missing, was built from other sources, or does not
give what torch gives, and `absence()` says which. Nothing here is differentiable.

Each kernel works on the rows of packed tokens, float32 or bfloat16, shared out over torch's own threads:

- `Library.attention`: attention within sequences of any lengths (used by `rewire.modules.packed.attention`),
- `Library.pack` and `Library.product`: `activation(x @ weight.T + bias) + residual` in one pass, the weight float32,
  bfloat16 or int8 (used by `rewire.modules.packed.linear`).

A kernel for layer normalisation was tried and left out: torch's own is as fast, and the sums before it are already
part of the products.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

ABI = 1
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "quick_gelu": 3, "relu": 4, "silu": 5}
WIDEST_HEAD = 256
FAILURES = {
    1: "unknown instruction set",
    2: "starts must rise from 0 to the number of tokens",
    3: "sizes out of range",
    4: "no memory",
}

_POINTER, _SIZE, _CODE, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


# The structures of native/interface.h, field by field.
class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("q", "k", "v", "out", "bias", "starts")),
        *((name, _SIZE) for name in ("sequences", "tokens", "heads", "kv_heads", "width")),
        *((f"{name}_{stride}", _SIZE) for name in ("q", "k", "v", "out") for stride in ("row", "head")),
        *((f"bias_{stride}", _SIZE) for stride in ("head", "query", "key")),
        ("scale", _REAL),
        *((name, _CODE) for name in ("type", "threads", "isa")),
    )


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("x", "weight", "scales", "bias", "residual", "out")),
        *((name, _SIZE) for name in ("rows", "inputs", "outputs", "x_row", "residual_row", "out_row")),
        *((name, _CODE) for name in ("type", "weight_type", "out_type", "activation", "threads", "isa")),
    )


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight `[outputs, inputs]` in the kernels' own layout; int8 with one scale per output."""

    data: Tensor
    scales: Tensor | None
    outputs: int
    inputs: int
    dtype: torch.dtype
    isa: int

    def to_dense(self) -> Tensor:
        """The weight `[outputs, inputs]` in its type, bit by bit.

        Raises:
            ValueError: it is int8, and what it was rounded from is gone.
        """
        if self.dtype == torch.int8:
            raise ValueError("an int8 weight cannot be given back as it was")
        per_unit = 4 // self.dtype.itemsize
        units = -(-self.inputs // per_unit)
        lanes = self.data.numel() // 4 // units  # all panels beside each other, each [units, outputs of the panel]
        panel = _panel(self.isa)
        blocks = self.data.view(self.dtype).view(lanes // panel, units, panel, per_unit)
        return blocks.transpose(1, 2).reshape(lanes, units * per_unit)[: self.outputs, : self.inputs].contiguous()


@dataclass(frozen=True, eq=False)
class Library:
    """The loaded library and the instruction sets that both it and this CPU have, the best first."""

    handle: ctypes.CDLL
    isas: tuple[str, ...] = field(init=False)
    fast_types: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        count = self.handle.rewire_isa_count()
        names = tuple(self.handle.rewire_isa_name(isa).decode() for isa in range(count))
        object.__setattr__(self, "isas", names)
        object.__setattr__(self, "fast_types", tuple(self.handle.rewire_fast_types(isa) for isa in range(count)))

    def is_fast(self, dtype: torch.dtype, isa: int = 0) -> bool:
        """Whether the instruction set has instructions for products of this type."""
        return bool(self.fast_types[isa] >> TYPES[dtype] & 1)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: Tensor,
        scale: float,
        bias: Tensor | None = None,
        *,
        isa: int = 0,
        threads: int | None = None,
    ) -> Tensor:
        """`[tokens, heads, width]` from q, k and v of that shape (k and v with as many heads or a divisor of them).

        Args:
            q, k, v: on the CPU, of one type (float32 or bfloat16), with unit stride in the width.
            starts: int64 `[sequences + 1]`, contiguous.
            scale: what the products of queries and keys are multiplied with.
            bias: float32 `[heads, longest, longest]`, any strides; fastest with unit stride among the queries.
            isa: which of `isas`.
            threads: as many as torch uses unless given.
        """
        tokens, heads, width = q.shape
        out = torch.empty(q.shape, dtype=q.dtype)
        job = _Attention(
            *(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), None if bias is None else bias.data_ptr()),
            *(starts.data_ptr(), starts.numel() - 1, tokens, heads, k.shape[1], width),
            *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], heads * width, width),
            *((0, 0, 0) if bias is None else bias.stride()),
            *(scale, TYPES[q.dtype], threads or torch.get_num_threads(), isa),
        )
        check(self.handle.rewire_attention(ctypes.byref(job)))
        return out

    def pack(self, weight: Tensor, dtype: torch.dtype, *, isa: int = 0) -> PackedWeight:
        """A weight `[outputs, inputs]` made ready for `product`, in float32, bfloat16 or int8."""
        dense = weight.detach().to("cpu", torch.float32).contiguous()
        outputs, inputs = dense.shape
        size = self.handle.rewire_packed_bytes(isa, outputs, inputs, TYPES[dtype])
        data = torch.empty(size + 64, dtype=torch.uint8)  # starts where a cache line starts
        data = data[-data.data_ptr() % 64 :][:size]
        scales = torch.empty(outputs) if dtype == torch.int8 else None
        into = (data.data_ptr(), None if scales is None else scales.data_ptr())
        check(self.handle.rewire_pack(isa, dense.data_ptr(), outputs, inputs, TYPES[dtype], *into))
        return PackedWeight(data, scales, outputs, inputs, dtype, isa)

    def product(
        self,
        x: Tensor,
        weight: PackedWeight,
        bias: Tensor | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        threads: int | None = None,
    ) -> Tensor:
        """`activation(x @ weight.T + bias) + residual`, `[rows, outputs]`.

        Args:
            x: `[rows, inputs]`, float32 or bfloat16, unit stride in the last dimension.
            weight: from `pack`.
            bias: float32 `[outputs]`, contiguous.
            activation: a key of `ACTIVATIONS`.
            residual: `[rows, outputs]` in the type of the result, unit stride in the last dimension.
            dtype: the type of the result, float32 or bfloat16; that of x unless given.
            threads: as many as torch uses unless given.
        """
        rows, inputs = x.shape
        dtype = dtype or x.dtype
        out = torch.empty((rows, weight.outputs), dtype=dtype)
        job = _Product(
            *(x.data_ptr(), weight.data.data_ptr(), None if weight.scales is None else weight.scales.data_ptr()),
            *(None if bias is None else bias.data_ptr(), None if residual is None else residual.data_ptr()),
            *(out.data_ptr(), rows, inputs, weight.outputs),
            *(x.stride(0), 0 if residual is None else residual.stride(0), weight.outputs),
            *(TYPES[x.dtype], TYPES[weight.dtype], TYPES[dtype], ACTIVATIONS[activation]),
            *(threads or torch.get_num_threads(), weight.isa),
        )
        check(self.handle.rewire_product(ctypes.byref(job)))
        return out


def check(status: int) -> None:
    """The kernels' answer as an exception.

    Raises:
        ValueError: the kernels refused; nothing was written.
    """
    if status:
        raise ValueError(f"the compiled kernels refused: {FAILURES.get(status, f'status {status}')}")


def _panel(isa: int) -> int:
    """Outputs in one panel of a packed weight: what a single one takes up, in floats."""
    kernels = library()
    return 0 if kernels is None else kernels.handle.rewire_packed_bytes(isa, 1, 1, TYPES[torch.float32]) // 4


# ---------------------------------------------------------------- finding, loading, trusting


@functools.cache
def library() -> Library | None:
    """The kernels of this machine, or None; looked for once per process."""
    return _outcome(default_path())[0]


def absence() -> str:
    """Why there are no kernels; empty where there are."""
    return _outcome(default_path())[1]


def default_path() -> Path:
    """Where the build leaves the library."""
    suffix = {"Windows": ".dll", "Darwin": ".dylib"}.get(platform.system(), ".so")
    return Path(__file__).parents[2] / "native" / f"librewire{suffix}"


@functools.cache
def _outcome(path: Path) -> tuple[Library | None, str]:
    if not path.is_file():
        return None, "not built (no C++ compiler when Rewire was installed)"
    try:
        loaded = load(path)
    except (OSError, AttributeError, ValueError) as error:
        return None, f"cannot be used: {error}"
    problem = distrust(loaded)
    return (None, problem) if problem else (loaded, "")


def load(path: Path) -> Library:
    """The library at `path`, working on torch's threads.

    Raises:
        OSError: it cannot be loaded.
        AttributeError: it lacks a function.
        ValueError: it was built from sources of another version.
    """
    handle = ctypes.CDLL(str(path))
    if handle.rewire_abi() != ABI:
        raise ValueError(f"built for interface {handle.rewire_abi()}, needed {ABI}; install Rewire again")
    handle.rewire_isa_name.restype = ctypes.c_char_p
    handle.rewire_packed_bytes.restype = ctypes.c_int64
    handle.rewire_packed_bytes.argtypes = (_CODE, _SIZE, _SIZE, _CODE)
    handle.rewire_pack.argtypes = (_CODE, _POINTER, _SIZE, _SIZE, _CODE, _POINTER, _POINTER)
    handle.rewire_set_parallel.argtypes = (_POINTER,)
    handle.rewire_set_parallel(torch_threads())
    return Library(handle)


def torch_threads() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP library that torch has loaded; None where it works without.

    One pool for both: two pools of as many threads as cores would fight for them.
    """
    folder = Path(torch.__file__).parent / "lib"
    bundled = [path for pattern in ("libgomp*", "libiomp*", "libomp*") for path in sorted(folder.glob(pattern))]
    for name in (None, *map(str, bundled)):
        try:
            handle = ctypes.CDLL(name)  # one that is loaded already is not loaded again
            return ctypes.cast(handle.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError, TypeError):
            continue
    return None


def distrust(loaded: Library) -> str:
    """What the best instruction set gets wrong beside torch, on small inputs; empty when nothing."""
    generator = torch.Generator().manual_seed(0)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        q, k, v = torch.randn(3, 21, 2, 24, generator=generator).to(dtype)
        got = loaded.attention(q, k, v, torch.tensor([0, 1, 21]), 0.2)
        scores = torch.einsum("qhw,khw->hqk", q[1:].float(), k[1:].float()) * 0.2
        expected = torch.einsum("hqk,khw->qhw", scores.softmax(-1), v[1:].float())
        difference = max(_largest(got[:1], v[:1]), _largest(got[1:], expected))
        if not difference <= bound:
            return f"differs from torch by {difference:.1e} in {str(dtype).removeprefix('torch.')}"
    return ""


def _largest(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max())
