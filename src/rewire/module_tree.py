"""The module tree of a model by dotted paths: finding, reading and placing modules and tensors, and a copy on meta.

`torch.nn.Module` has such methods too; those here are ten times as fast, which counts where thousands of places
are looked at, and know buffers and stand-ins.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewire.modules import RenamedModule


def split_path(path: str) -> tuple[str, str]:
    """The parent's path and the leaf of a dotted path.

    >>> split_path("encoder.layer.0"), split_path("encoder")
    (('encoder.layer', '0'), ('', 'encoder'))
    """
    parent, _, leaf = path.rpartition(".")
    return parent, leaf


def under(path: str, name: str) -> str:
    """`name` below module `path`.

    >>> under("a.b", "weight"), under("", "weight")
    ('a.b.weight', 'weight')
    """
    return f"{path}.{name}" if path else name


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`. Raises `KeyError`. (`get_submodule` costs ten times as much.)"""
    current: nn.Module | None = model
    for leaf in path.split(".") if path else ():
        current = current._modules[leaf]  # type: ignore[union-attr]
    if current is None:
        raise KeyError(path)
    return current


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer called `name`. Raises `KeyError`."""
    parent, leaf = split_path(name)
    owner = submodule(model, parent)
    tensor: Tensor | None = owner._parameters.get(leaf)
    if tensor is None:
        tensor = owner._buffers.get(leaf)
    if tensor is None:
        raise KeyError(f"no tensor {name}")
    return tensor


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts `tensor` where the parameter or buffer called `name` is."""
    parent, leaf = split_path(name)
    owner = submodule(model, parent)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    elif isinstance(tensor, nn.Parameter):
        owner._parameters[leaf] = tensor
    else:
        flag = owner._parameters[leaf].requires_grad  # type: ignore[union-attr]
        owner._parameters[leaf] = nn.Parameter(
            tensor, requires_grad=flag and (tensor.is_floating_point() or tensor.is_complex())
        )


def place(model: nn.Module, path: str, module: nn.Module | None) -> None:
    """Puts `module` at `path`, keeping its place among its siblings; None removes what is there."""
    parent, leaf = split_path(path)
    children = submodule(model, parent)._modules
    if module is None:
        children.pop(leaf, None)
    else:
        children[leaf] = module


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the module tree with every tensor on meta, sharing and ties kept; nothing else is copied.

    Edits may be rehearsed on it: modules of the copy can be replaced without the original noticing.
    """
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}
    copy = _skeleton(model, modules, tensors)
    for module in modules.values():
        for name, value in module.__dict__.items():
            if isinstance(value, nn.Module) and id(value) in modules:
                module.__dict__[name] = modules[id(value)]
            elif isinstance(value, RenamedModule):
                module.__dict__[name] = RenamedModule(module, value.__dict__["name"])
    return copy


def _skeleton(module: nn.Module, modules: dict[int, nn.Module], tensors: dict[int, Tensor]) -> nn.Module:
    if id(module) in modules:
        return modules[id(module)]
    copy = modules[id(module)] = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    copy.__dict__["_parameters"] = {k: _to_meta(v, tensors) for k, v in module._parameters.items()}
    copy.__dict__["_buffers"] = {k: _to_meta(v, tensors) for k, v in module._buffers.items()}
    copy.__dict__["_modules"] = {
        name: child if child is None else _skeleton(child, modules, tensors) for name, child in module._modules.items()
    }
    return copy


def meta_like(tensor: Tensor) -> Tensor:
    """A tensor on meta of the shape, type and flag of `tensor`."""
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _to_meta(tensor: Tensor | None, tensors: dict[int, Tensor]) -> Tensor | None:
    if tensor is None:
        return None
    if id(tensor) not in tensors:
        tensors[id(tensor)] = meta_like(tensor)
    return tensors[id(tensor)]
