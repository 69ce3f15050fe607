"""Linear layers of separate experts whose weights have become slices of one tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StackedPart(nn.Module):
    """Stands where a linear layer of one expert stood; owns no parameters.

    It reads its slice of the stacked weight, and of the stacked bias if there is one, at every call.

    Args:
        holder: the module whose parameters the stacked tensors are.
        weight: name of the stacked weight `[experts, out, in]` there.
        bias: name of the stacked bias `[experts, out]` there; None without one.
        index: which slice.

    >>> holder = nn.Module()
    >>> holder.wi = nn.Parameter(torch.zeros(4, 6, 3))
    >>> StackedPart(holder, "wi", None, 2)(torch.zeros(5, 3)).shape
    torch.Size([5, 6])
    """

    holder: nn.Module
    weight_name: str
    bias_name: str | None
    index: int

    def __init__(self, holder: nn.Module, weight: str, bias: str | None, index: int) -> None:
        super().__init__()
        # In __dict__: the holder is registered above this module, and a tree must not become a ring.
        self.__dict__.update(holder=holder, weight_name=weight, bias_name=bias, index=index)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return F.linear(input, self.weight, self.bias)

    @property
    def weight(self) -> Tensor:
        """This expert's slice of the stacked weight, as a view `[out_features, in_features]`."""
        return self._slice(self.weight_name)

    @property
    def bias(self) -> Tensor | None:
        """This expert's slice of the stacked bias, as a view `[out_features]`; None without one."""
        return None if self.bias_name is None else self._slice(self.bias_name)

    @property
    def in_features(self) -> int:
        """Size of the last input dimension."""
        return int(self._whole(self.weight_name).shape[2])

    @property
    def out_features(self) -> int:
        """Size of the last output dimension."""
        return int(self._whole(self.weight_name).shape[1])

    def _whole(self, name: str) -> Any:
        return getattr(self.holder, name)  # not its `_parameters`: an adapter on the parameter must count

    def _slice(self, name: str) -> Tensor:
        """A view that says of itself what the whole says: loaders mark tensors that hold values already."""
        whole = self._whole(name)
        view: Tensor = whole[self.index]
        view.__dict__.update(whole.__dict__)
        return view

    def extra_repr(self) -> str:
        return f"slice {self.index} of {self.weight_name!r}"


def with_stacked(container: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A copy of `container`, with the same children and further parameters on meta, one like each of `tensors`.

    >>> with_stacked(nn.ModuleList(), {"wi": torch.zeros(4, 6, 3)}).wi.device
    device(type='meta')
    """
    copy = container.__class__.__new__(container.__class__)
    copy.__dict__.update(vars(container))
    copy.__dict__.update(_modules=dict(container._modules), _parameters=dict(container._parameters))
    for name, like in tensors.items():
        empty = torch.empty(like.shape, dtype=like.dtype, device="meta")
        copy._parameters[name] = nn.Parameter(empty, requires_grad=like.requires_grad)
    return copy
