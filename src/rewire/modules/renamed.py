"""The old name of a module that has been renamed."""

from __future__ import annotations

from typing import Any

from torch import nn


class RenamedModule:
    """What a model's own forward finds under the old name: a stand-in for whatever has the new name *now*.

    It looks the module up at every use, so that an adapter or a quantiser that replaces the renamed module
    is never bypassed. It is not a module itself and is absent from the module tree and the state dict.

    >>> parent = nn.Module()
    >>> parent.q_proj = nn.Linear(2, 3)
    >>> RenamedModule(parent, "q_proj").out_features
    3
    """

    def __init__(self, parent: nn.Module, name: str) -> None:
        self.__dict__.update(parent=parent, name=name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["parent"]._modules[self.__dict__["name"]](*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__") or "parent" not in self.__dict__:
            # While being copied or unpickled the stand-in has no parent yet.
            raise AttributeError(attribute)
        return getattr(self.__dict__["parent"]._modules[self.__dict__["name"]], attribute)

    def __setattr__(self, attribute: str, value: Any) -> None:
        setattr(self.__dict__["parent"]._modules[self.__dict__["name"]], attribute, value)

    def __repr__(self) -> str:
        return f"RenamedModule(now {self.__dict__.get('name')!r})"
