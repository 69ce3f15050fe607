"""Layers that act by rows, but are no `nn.Linear`: some of their rows as a layer of the same class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_COUNTS = ("out_features", "out_channels", "output_size", "output_dim")
"""Under these names a layer may remember how many rows it has."""


def with_rows(layer: nn.Module, rows: int, dim: int = 0) -> nn.Module:
    """A layer of the class of `layer` with another number of rows, its tensors on meta.

    Args:
        layer: its only tensors are a weight and perhaps a bias.
        rows: how many.
        dim: the dimension of the tensors that counts them.

    >>> with_rows(nn.Conv1d(4, 6, kernel_size=1), 2)
    Conv1d(4, 2, kernel_size=(1,), stride=(1,))
    """
    new = layer.__class__.__new__(layer.__class__)
    nn.Module.__init__(new)  # hooks of its own
    for name, value in layer.__dict__.items():
        if name not in new.__dict__:
            new.__dict__[name] = rows if name in _COUNTS else value
    for name, tensor in layer._parameters.items():
        new.register_parameter(name, None if tensor is None else _resized(tensor, rows, dim))
    return new.train(layer.training)


def _resized(tensor: Tensor, rows: int, dim: int) -> nn.Parameter:
    shape = list(tensor.shape)
    shape[dim] = rows
    empty = torch.empty(shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad)


def rows_of(tensor: Tensor, start: int, stop: int, groups: int = 1, dim: int = 0) -> Tensor:
    """The rows `start` to `stop`, a view where they lie together; `groups` share them out equally.

    >>> rows_of(torch.arange(8), 0, 4, groups=2)
    tensor([0, 1, 4, 5])
    """
    if groups == 1:
        return tensor.narrow(dim, start, stop - start)
    before, after = (dim, dim + 1) if dim >= 0 else (dim - 1, dim)
    grouped: Tensor = tensor.unflatten(dim, (groups, -1))
    return grouped.narrow(after, start // groups, (stop - start) // groups).flatten(before, after)


def together(parts: list[Tensor], groups: int = 1, dim: int = 0) -> Tensor:
    """The rows of all `parts`: within each of `groups` equal groups those of every part in turn.

    >>> together([torch.tensor([0, 1]), torch.tensor([5, 6])], groups=2)
    tensor([0, 5, 1, 6])
    """
    if groups == 1:
        return torch.cat(parts, dim)
    before, after = (dim, dim + 1) if dim >= 0 else (dim - 1, dim)
    return torch.cat([part.unflatten(dim, (groups, -1)) for part in parts], after).flatten(before, after)
