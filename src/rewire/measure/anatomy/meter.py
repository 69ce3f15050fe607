"""Counts the bytes of tensors as they come and go, and operations, by the module that runs."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    count: int = sdpa_flop_count(query.shape, key.shape, value.shape)
    return count


def _grouped(rows: Tensor, matrices: Tensor, *args: Any, **kwargs: Any) -> int:
    """Each row `[rows, in]` goes through one of the matrices `[experts, in, out]`."""
    return 2 * rows.numel() * matrices.shape[-1]


_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._grouped_mm: _grouped,
}
"""Floating-point operations of what torch's own table lacks; a multiplication and an addition are two."""


class Meter(TorchDispatchMode):
    """Meanwhile every new storage is counted until nothing refers to it any more, and every operation when it runs.

    `before` are tensors that are there already: neither they nor views of them count.

    Attributes:
        now: bytes that live.
        peak: the most bytes that lived at once.
        flops: floating-point operations by path of the innermost module.

    >>> with Meter([]) as meter:
    ...     ones = torch.ones(10)
    ...     more = ones.view(2, 5) + 1
    ...     del ones
    >>> meter.peak, meter.now
    (80, 40)
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.flops: Counter[str] = Counter()
        self._place = [""]
        self._living: dict[int, tuple[int, str]] = {}
        for tensor in before:
            self._living[_key(tensor)] = (0, "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and takes note of its outputs."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        self._count(func.overloadpacket, args, kwargs or {}, out)
        return out

    def _count(self, operation: Any, args: Any, kwargs: Any, out: Any) -> None:
        if operation in _FORMULAS:
            self.flops[self._place[-1]] += _FORMULAS[operation](*args, **kwargs)
        elif operation in flop_registry:
            self.flops[self._place[-1]] += int(flop_registry[operation](*args, **kwargs, out_val=out))

    def _see(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self._living:
            return
        storage = tensor.untyped_storage()
        self._living[key] = (storage.nbytes(), self._place[-1])
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        size, _ = self._living.pop(key, (0, ""))
        self.now -= size

    def kept(self) -> dict[str, int]:
        """Bytes that live, by the path of the module that made them."""
        found: Counter[str] = Counter()
        for size, place in self._living.values():
            found[place] += size
        return dict(found)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Meanwhile what happens inside a module of `model` is told apart by its path."""
        handles = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(path)))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: self._place.append(path)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._place.pop()


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
