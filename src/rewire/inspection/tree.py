"""The module tree with alike layers drawn together."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import nn

from rewire import linears
from rewire.inspection.record import Node


def tree(model: nn.Module, notes: Mapping[str, str]) -> Node:
    """The modules of `model`; siblings with all-digit names that are alike (notes included) become one node."""
    return _Trees(model, notes).node((), "", model)


class _Trees:
    """Alike subtrees are told by numbers, so that a thousand experts cost no more than reading them once."""

    def __init__(self, model: nn.Module, notes: Mapping[str, str]) -> None:
        self.notes = notes
        self.numbers: dict[Hashable, int] = {}
        self.looks: dict[str, int] = {}
        self._look("", model)

    def _look(self, path: str, module: nn.Module) -> int:
        """A number that modules alike in class, sizes, notes and children share."""
        children = tuple((name, self._look(_below(path, name), child)) for name, child in module.named_children())
        own = tuple(
            (name, tuple(value.shape), str(value.dtype))
            for name, value in module.named_parameters(recurse=False)
            if not isinstance(value, nn.UninitializedParameter)
        )
        key = (class_name(module), module.extra_repr(), self.notes.get(path), own, children)
        return self.looks.setdefault(path, self.numbers.setdefault(key, len(self.numbers)))

    def node(self, names: tuple[str, ...], path: str, module: nn.Module) -> Node:
        """The node of a module; `names` lists its alike siblings too."""
        return Node(
            names=names,
            module=class_name(module),
            parameters=sum(
                value.numel() for value in module.parameters() if not isinstance(value, nn.UninitializedParameter)
            ),
            detail=_detail(module),
            note=self.notes.get(path, ""),
            children=tuple(
                self.node(alike, _below(path, alike[0]), module.get_submodule(alike[0]))
                for alike in self._alike(path, module)
            ),
        )

    def _alike(self, path: str, module: nn.Module) -> list[tuple[str, ...]]:
        """Names of the children, those that are alike together."""
        groups: dict[Hashable, list[str]] = {}
        for name, _ in module.named_children():
            look = self.looks[_below(path, name)]
            groups.setdefault(look if name.isdigit() else name, []).append(name)
        return [tuple(names) for names in groups.values()]


def class_name(module: nn.Module) -> str:
    """The class, with its package where another package's could be meant (peft has a `Linear` too).

    >>> class_name(nn.Linear(1, 1))
    'Linear'
    """
    kind = type(module)
    package = kind.__module__.partition(".")[0]
    return f"{package}.{kind.__name__}" if package != "torch" and hasattr(nn, kind.__name__) else kind.__name__


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _detail(module: nn.Module) -> str:
    """Sizes of a module without children."""
    linear = linears.linear_facts(module)
    if not isinstance(linear, str):
        extra = "" if linear.has_bias else ", no bias"
        return f"{linear.in_features:,} → {linear.out_features:,}{extra}"
    has_children = next(module.children(), None) is not None
    return "" if has_children else module.extra_repr().replace("\n", " ")
