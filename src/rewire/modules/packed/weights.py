"""Weights made ready for fast products, kept beside the parameters that they come from and never older than these.

Nothing here is a parameter or a buffer. What was made is made anew when a parameter is another one, was written to
or moved; copies and pickles of a model start without.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from torch import Tensor

Made = TypeVar("Made")

_SAMPLE = 64
"""Bytes in the middle of a matrix that are looked at, for writes that its version counter does not see (`.data`)."""


class Derived:
    """What was made of some tensors, by a key of the caller's.

    >>> import torch
    >>> derived, weight = Derived(), torch.ones(2)
    >>> derived.get("sum", (weight,), lambda: weight.sum().item()), derived.get("sum", (weight,), lambda: 0.0)
    (2.0, 2.0)
    >>> _ = weight.add_(1)
    >>> derived.get("sum", (weight,), lambda: weight.sum().item())
    4.0
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[tuple[Any, ...], Any]] = {}

    def get(self, key: Hashable, tensors: Sequence[Tensor | None], make: Callable[[], Made]) -> Made:
        """What `make` made of `tensors`, made now if it is not there or they have changed since."""
        found = self._made.get(key)
        if found is None or not _unchanged(found[0], tensors):
            # Two threads may both make it: the same twice, and the later one stays.
            found = self._made[key] = (tuple(map(_state, tensors)), make())
            self._forget_dead()
        made: Made = found[1]
        return made

    def _forget_dead(self) -> None:
        """Drops what was made of tensors that are no more."""
        for key, (states, _) in list(self._made.items()):
            if any(state is not None and state[0]() is None for state in states):
                self._made.pop(key, None)

    def clear(self) -> None:
        """Forgets everything."""
        self._made.clear()

    @property
    def nbytes(self) -> int:
        """How much memory the things made take, where they can say so."""
        return sum(int(getattr(made, "nbytes", 0)) for _, made in self._made.values())

    def __iter__(self) -> Any:
        return iter([made for _, made in self._made.values()])

    def __deepcopy__(self, memo: object) -> Derived:
        return Derived()

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()


State = tuple[weakref.ref[Tensor], int, int, int, bytes]
"""A tensor (which is not kept alive), its version, where its data lie, where a sample of it lies, and the sample."""


def _state(tensor: Tensor | None) -> State | None:
    if tensor is None:
        return None
    place = tensor.data_ptr()
    version = _NO_VERSION if tensor.is_inference() else tensor._version
    if not tensor.is_cpu or tensor.ndim < 2 or tensor.nbytes < _SAMPLE or not place:
        return weakref.ref(tensor), version, place, 0, b""
    middle = min(place + (tensor.nbytes // 2 & -_SAMPLE), place + tensor.nbytes - _SAMPLE)
    return weakref.ref(tensor), version, place, middle, ctypes.string_at(middle, _SAMPLE)


_NO_VERSION = -1


def _unchanged(before: Sequence[State | None], now: Sequence[Tensor | None]) -> bool:
    """Whether the tensors are still what they were. Written out: it runs for every layer at every call."""
    for old, tensor in zip(before, now, strict=True):
        if old is None or tensor is None:
            if old is not None or tensor is not None:
                return False
            continue
        known, version, place, middle, sample = old
        if known() is not tensor or tensor.data_ptr() != place:
            return False
        if version >= 0 and version != tensor._version:
            return False
        if middle and ctypes.string_at(middle, _SAMPLE) != sample:
            return False
    return True
