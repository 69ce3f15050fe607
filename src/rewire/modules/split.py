"""A fused projection that has become its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewire.modules.rows import together


class SplitProjection(nn.Module):
    """Stands where a fused linear stood; its children are the parts, each an `nn.Linear` of its own.

    The output has the shape and the row order of the fused projection's, so the surrounding forward needs
    no change: along the last dimension there are `groups` equal groups, each holding the rows of every part
    in turn.

    Args:
        in_features: size of the last input dimension.
        parts: names of the parts, in the order in which their rows occur.
        sizes: rows of each part over all groups.
        groups: 1 for stacked parts, the number of heads for per-head rows, and so on.
        bias: whether the parts have a bias.
        device: where to create the parameters (`"meta"` to create none yet).
        dtype: their type.

    >>> split = SplitProjection(4, ("q", "k", "v"), (4, 2, 2), groups=2)
    >>> split(torch.zeros(3, 4)).shape, split.q.weight.shape
    (torch.Size([3, 8]), torch.Size([4, 4]))
    """

    def __init__(
        self,
        in_features: int,
        parts: Sequence[str],
        sizes: Sequence[int],
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = sum(sizes)
        self.parts = tuple(parts)
        self.sizes = tuple(sizes)
        self.groups = groups
        for name, size in zip(self.parts, self.sizes, strict=True):
            self.add_module(name, _linear(in_features, size, bias, device, dtype))

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        parts = self._parts()
        if self._plain(input, parts):
            return self._into_one(input, parts)
        return together([part(input) for part in parts], self.groups, dim=-1)

    def _plain(self, x: Tensor, parts: list[Any]) -> bool:
        """Whether nobody can tell if the parts are called: inference, no adapters, hooks or casts around."""
        if torch.compiler.is_compiling() or torch._C._is_tracing() or type(x) is not Tensor:
            return False
        if torch.is_grad_enabled() or self.groups != 1 or torch.is_autocast_enabled(x.device.type):
            return False
        return all(_is_plain_linear(part) and part.weight.dtype == x.dtype for part in parts)

    def _into_one(self, x: Tensor, parts: list[Any]) -> Tensor:
        """Each part writes its product straight into its columns: no concatenation, the same numbers."""
        rows = x.reshape(-1, self.in_features)
        out = rows.new_empty(rows.shape[0], self.out_features)
        for part, columns in zip(parts, out.split(self.sizes, dim=-1), strict=True):
            if part.bias is None:
                torch.mm(rows, part.weight.t(), out=columns)
            else:
                torch.addmm(part.bias, rows, part.weight.t(), out=columns)
        return out.view(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:
        """The fused weight `[out_features, in_features]`, put together anew at every access."""
        return self._fused([part.weight for part in self._parts()])

    @property
    def bias(self) -> Tensor | None:
        """The fused bias `[out_features]`, put together anew at every access."""
        biases = [part.bias for part in self._parts()]
        return None if biases[0] is None else self._fused(biases)

    def _parts(self) -> list[Any]:
        """The parts as they are now: linears, or whatever adapters and quantisers put in their place."""
        return [self._modules[name] for name in self.parts]

    def _fused(self, tensors: list[Tensor]) -> Tensor:
        return together(tensors, self.groups)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, groups={self.groups}"


class SplitLayer(nn.Module):
    """Stands where another fused layer stood: a pointwise convolution, or a matrix for each place.

    Its children are the parts, layers of the same class with fewer rows, each called as the fused one was.

    Args:
        parts: by name, in the order in which their rows occur.
        groups: equal groups of rows, each holding some of every part in turn.
        row_dim: the dimension of the tensors that counts the rows.
        axis: the dimension of the output that the rows become.

    >>> split = SplitLayer({"k": nn.Conv1d(4, 2, 1), "v": nn.Conv1d(4, 6, 1)}, axis=-2)
    >>> split(torch.zeros(1, 4, 5)).shape, split.weight.shape
    (torch.Size([1, 8, 5]), torch.Size([8, 4, 1]))
    """

    def __init__(self, parts: Mapping[str, nn.Module], groups: int = 1, row_dim: int = 0, axis: int = -1) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.groups, self.row_dim, self.axis = groups, row_dim, axis
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the fused layer would give."""
        return together([part(*args, **kwargs) for part in self._parts()], self.groups, self.axis)

    @property
    def weight(self) -> Tensor:
        """The fused weight, put together anew at every access."""
        return together([part.weight for part in self._parts()], self.groups, self.row_dim)

    @property
    def bias(self) -> Tensor | None:
        """The fused bias, put together anew at every access."""
        biases = [part.bias for part in self._parts() if getattr(part, "bias", None) is not None]
        return together(biases, self.groups, self.row_dim) if biases else None

    def _parts(self) -> list[Any]:
        return [self._modules[name] for name in self.parts]

    def extra_repr(self) -> str:
        return f"groups={self.groups}"


def _linear(
    in_features: int,
    out_features: int,
    bias: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Linear:
    """An `nn.Linear`, made at once where it holds no values."""
    if device != "meta":
        return nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
    # There are no values to initialise on meta, and that is what takes nn.Linear its time.
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = in_features, out_features
    linear.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
    linear.register_parameter(
        "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
    )
    return linear


def _is_plain_linear(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
    )
