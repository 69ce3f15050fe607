"""A stacked tensor of experts that is no longer there, as the experts' own forward still sees it.

The forward of a mixture of experts reads `self.gate_up_proj[expert]` and multiplies by it. Here that
expression gives a stand-in, and the multiplication becomes a call of the expert's linear layers, so that
whatever has their place (an adapter, a quantised layer, a hook) is honoured. A use that is not understood
raises `UnsupportedUse`: nothing is ever computed with a wrong orientation or a bias added twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewire.modules.rows import together


class UnsupportedUse(RuntimeError):  # a TypeError would be taken for `NotImplemented`
    """The experts' forward does something with a stacked tensor that its linear layers cannot do."""


@dataclass(frozen=True)
class StackedWeight:
    """What one stacked tensor of experts holds.

    Attributes:
        name: its name in the experts module (dotted, if a child module owns it).
        parts: names of the linear layers whose rows it holds, in the order of the rows.
        sizes: rows (output features) of each part.
        in_features: columns, the size of their input.
        groups: 1 if the parts lie one after the other, the rows of a part if single rows alternate.
        transposed: whether a slice is `[in, out]` (the experts compute `x @ W[e]`) instead of `[out, in]`.
        bias: name of the stacked bias `[experts, out]`, if there is one.
        surplus: slices after the experts' own that nobody reads.
        folded: whether the slices lie below each other in a matrix instead of along a dimension of their own.
    """

    name: str
    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    in_features: int
    groups: int = 1
    transposed: bool = False
    bias: str | None = None
    surplus: int = 0
    folded: bool = False

    @property
    def out_features(self) -> int:
        """Rows of all parts together."""
        return sum(self.sizes)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the stacked tensors: the weight, and the bias if there is one."""
        return (self.name,) if self.bias is None else (self.name, self.bias)

    @property
    def slice_shape(self) -> tuple[int, int]:
        """Shape of the slice of one expert as it lies in the tensor."""
        shape = (self.out_features, self.in_features)
        return shape[::-1] if self.transposed else shape

    def shape(self, experts: int) -> tuple[int, ...]:
        """Shape of the tensor.

        >>> StackedWeight("down_proj", ("down_proj",), (8,), 16).shape(4)
        (4, 8, 16)
        """
        rows, columns = self.slice_shape
        slices = experts + self.surplus
        return (slices * rows, columns) if self.folded else (slices, rows, columns)


@dataclass
class Call:
    """One run of the experts' forward: who stands for which expert, and whose bias has yet to be asked for.

    A linear layer adds its bias itself. The forward's own `+ bias[expert]` must then follow, on that very
    product, and adds nothing; `waiting` remembers it until then.
    """

    experts: Sequence[Mapping[str, Any]]
    waiting: tuple[Tensor, str, int] | None = None

    def product(self, x: Tensor, weight: StackedWeight, expert: int, dtype: torch.dtype | None) -> Tensor:
        """`[..., in]` to `[..., out]`, rows in the order of the stacked tensor."""
        self.close()
        outputs = [_apply(self.experts[expert][part], x, dtype) for part in weight.parts]
        result = together(outputs, weight.groups, dim=-1)
        if weight.bias is not None:
            self.waiting = (result, weight.bias, expert)
        return result

    def add(self, x: Any, bias: str, expert: int) -> Tensor:
        """`x` unchanged, if it is the product that has this bias in it already."""
        if self.waiting is None or self.waiting[0] is not x or self.waiting[1:] != (bias, expert):
            raise UnsupportedUse(f"{bias}[{expert}] is added to something else than the product of its weight")
        product: Tensor = self.waiting[0]
        self.waiting = None
        return product

    def close(self) -> None:
        """Raises `UnsupportedUse` if a bias that a product has in it was not asked for."""
        if self.waiting is not None:
            _, bias, expert = self.waiting
            raise UnsupportedUse(f"{bias}[{expert}] is not added to the product of its weight")


def _apply(linear: Any, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The output of a linear layer, computed with its weight as `dtype` where that can be had."""
    own = linear.weight.dtype
    if dtype is None or own == dtype or not own.is_floating_point:
        result: Tensor = linear(x)
        return result
    if is_plain_linear(linear):
        return F.linear(x, linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype))
    narrow: Tensor = linear(x.to(own))  # an adapter knows its own types only
    return narrow.to(dtype)


def is_plain_linear(layer: Any) -> bool:
    """Whether nobody can tell if this layer is called or its weight is used instead."""
    return (
        type(layer) is nn.Linear
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and "forward" not in layer.__dict__
    )


@dataclass(frozen=True, eq=False)
class _StandIn:
    """Shared by the stand-ins: changes of type pass, everything else that is not provided for raises."""

    call: Call

    def to(self, dtype: torch.dtype) -> Any:
        """The same values in another type."""
        if not isinstance(dtype, torch.dtype):
            raise UnsupportedUse(f"{self}.to({dtype!r}): only a type may be given")
        return self._as(dtype)

    def float(self) -> Any:
        """The same values in single precision."""
        return self._as(torch.float32)

    def double(self) -> Any:
        """The same values in double precision."""
        return self._as(torch.float64)

    def contiguous(self) -> Any:
        """Itself."""
        return self

    def _as(self, dtype: torch.dtype) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedUse(f"{self}.{name}: the experts are separate linear layers, so this cannot be had")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        handler = _HANDLERS.get(name)
        if handler is None:
            raise UnsupportedUse(f"torch.{name} of a stacked tensor whose experts are separate linear layers")
        return handler(*args, **(kwargs or {}))


@dataclass(frozen=True, eq=False)
class TensorStandIn(_StandIn):
    """Stands for a stacked weight, or with `expert` for one slice of it.

    Attributes:
        weight: what the tensor holds.
        expert: which slice; None for the whole tensor.
        out_first: whether a slice, as seen now, is `[out, in]`.
        folded: whether the whole tensor, as seen now, is a matrix.
        dtype_asked: the type that the forward has turned it into.
    """

    weight: StackedWeight
    expert: int | None = None
    out_first: bool = True
    folded: bool = False
    dtype_asked: torch.dtype | None = None

    @property
    def shape(self) -> torch.Size:
        """As the tensor's."""
        experts = len(self.call.experts)
        if self.folded:
            return torch.Size(self.weight.shape(experts))
        rows, columns = self.weight.out_features, self.weight.in_features
        matrix = (rows, columns) if self.out_first else (columns, rows)
        return torch.Size(matrix if self.expert is not None else (experts + self.weight.surplus, *matrix))

    @property
    def ndim(self) -> int:
        """As the tensor's."""
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """As the tensor's."""
        linear = self.call.experts[0][self.weight.parts[0]]
        return self.dtype_asked or linear.weight.dtype

    @property
    def device(self) -> torch.device:
        """As the tensor's."""
        return self.call.experts[0][self.weight.parts[0]].weight.device  # type: ignore[no-any-return]

    def size(self, dim: int | None = None) -> Any:
        """As the tensor's."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As the tensor's."""
        return self.ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> TensorStandIn:
        expert = _number(index, self)
        if self.expert is not None or self.folded or not 0 <= expert < len(self.call.experts):
            raise UnsupportedUse(f"{self}[{index}]: there are {len(self.call.experts)} experts")
        return replace(self, expert=expert)

    def transpose(self, first: int, second: int) -> TensorStandIn:
        """With the last two dimensions exchanged."""
        last = {self.ndim - 2, self.ndim - 1}
        if self.folded or {first % self.ndim, second % self.ndim} != last:
            raise UnsupportedUse(f"{self}.transpose({first}, {second})")
        return replace(self, out_first=not self.out_first)

    @property
    def mT(self) -> TensorStandIn:
        """With the last two dimensions exchanged."""
        return self.transpose(-2, -1)

    @property
    def T(self) -> TensorStandIn:
        """A slice, transposed."""
        if self.expert is None:
            raise UnsupportedUse(f"{self}.T")
        return self.transpose(0, 1)

    def t(self) -> TensorStandIn:
        """A slice, transposed."""
        return self.T

    def permute(self, *dims: Any) -> TensorStandIn:
        """With the last two dimensions exchanged."""
        order = dims[0] if len(dims) == 1 else dims
        if tuple(order) != (*range(self.ndim - 2), self.ndim - 1, self.ndim - 2):
            raise UnsupportedUse(f"{self}.permute({dims})")
        return self.transpose(-2, -1)

    def view(self, *shape: Any) -> TensorStandIn:
        """A matrix as a stack of slices."""
        wanted = tuple(shape[0] if len(shape) == 1 else shape)
        unfolded = (len(self.call.experts), *self.weight.slice_shape)
        if self.weight.surplus or wanted not in (unfolded, (-1, *unfolded[1:])):
            raise UnsupportedUse(f"{self}.view({wanted})")
        return replace(self, folded=False)

    reshape = view

    def _as(self, dtype: torch.dtype) -> TensorStandIn:
        return replace(self, dtype_asked=dtype)

    def multiplied(self, x: Tensor, *, out_first: bool) -> Tensor:
        """`x` times the tensor, which the operation wants as `[…, out, in]` or as `[…, in, out]`."""
        if self.folded or out_first != self.out_first:
            raise UnsupportedUse(f"a product that takes {self} the other way round than it lies")
        if self.expert is not None:
            return self.call.product(x, self.weight, self.expert, self.dtype_asked)
        if x.ndim != 3 or x.shape[0] != len(self) or self.weight.surplus or self.weight.bias:
            raise UnsupportedUse(f"a product of {list(x.shape)} with all slices of {self}")
        slices = (self.call.product(x[n], self.weight, n, self.dtype_asked) for n in range(len(self)))
        return torch.stack(tuple(slices))

    def __repr__(self) -> str:
        return self.weight.name if self.expert is None else f"{self.weight.name}[{self.expert}]"


@dataclass(frozen=True, eq=False)
class BiasStandIn(_StandIn):
    """Stands for a stacked bias, or with `expert` for one slice of it: the linear layers have added it already."""

    name: str
    expert: int | None = None

    def __getitem__(self, index: Any) -> BiasStandIn:
        return replace(self, expert=_number(index, self))

    def __radd__(self, other: Any) -> Tensor:
        return self.added_to(other)

    def added_to(self, x: Any) -> Tensor:
        """`x`, which has this bias in it."""
        if self.expert is None:
            raise UnsupportedUse(f"{self.name} is added for all experts at once")
        return self.call.add(x, self.name, self.expert)

    def __repr__(self) -> str:
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"


def stand_ins(call: Call, weights: Sequence[StackedWeight]) -> dict[str, _StandIn]:
    """For every stacked tensor its stand-in, by name."""
    found: dict[str, _StandIn] = {}
    for weight in weights:
        found[weight.name] = TensorStandIn(call, weight, out_first=not weight.transposed, folded=weight.folded)
        if weight.bias is not None:
            found[weight.bias] = BiasStandIn(call, weight.bias)
    return found


def _number(index: Any, what: Any) -> int:
    """An index that selects one expert, as a plain number."""
    if (isinstance(index, Tensor) and index.numel() != 1) or isinstance(index, slice | tuple | list) or index is None:
        raise UnsupportedUse(f"{what}[{index}]: only one expert at a time can be selected")
    return int(index)


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    if not isinstance(weight, TensorStandIn) or not isinstance(input, Tensor):
        raise UnsupportedUse(f"a linear map of {input} with {bias}")
    product = weight.multiplied(input, out_first=True)
    if bias is None:
        return product
    if not isinstance(bias, BiasStandIn):
        raise UnsupportedUse(f"a linear map with {weight} and another bias")
    return bias.added_to(product)


def _matmul(input: Any, other: Any) -> Tensor:
    if not isinstance(other, TensorStandIn) or not isinstance(input, Tensor):
        raise UnsupportedUse(f"a product with {input} on the left")
    return other.multiplied(input, out_first=False)


def _add(input: Any, other: Any) -> Tensor:
    first, second = (other, input) if isinstance(input, BiasStandIn) else (input, other)
    if not isinstance(second, BiasStandIn):
        raise UnsupportedUse(f"a sum with {second}")
    return second.added_to(first)


_HANDLERS: Mapping[str, Callable[..., Tensor]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__", "bmm", "mm"), _matmul),
    **dict.fromkeys(("add", "__add__", "__radd__", "add_", "__iadd__"), _add),
}
