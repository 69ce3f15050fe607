"""Where two models part ways: the outputs of every module that both have, in the order they are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rewire.proof.compare import at_positions, flatten, largest, relative_difference
from rewire.proof.names import align

SAMPLE = 1 << 16
"""Elements kept of one module output; larger ones are sampled at even steps."""


@dataclass(frozen=True)
class ModuleDifference:
    """Largest relative difference of a module's outputs over all cases and calls.

    `path` and `kind` (the class) are those of the untouched model; `order` counts first completions in it.
    """

    path: str
    kind: str
    difference: float
    order: int


@dataclass(frozen=True)
class Divergence:
    """The first module whose output differs beyond the tolerance.

    `kind` is its class in the untouched model, `kind_after` the class that stands there now.
    """

    path: str
    kind: str
    kind_after: str
    difference: float
    tolerance: float
    case: str

    def __str__(self) -> str:
        kinds = self.kind if self.kind == self.kind_after else f"{self.kind}, now {self.kind_after}"
        return f"{self.path or '(the model)'} ({kinds}) differs by {self.difference:.1e} in “{self.case}”"


@dataclass(frozen=True)
class Observation:
    """What one tensor of one module output was: at most `SAMPLE` elements, its shape and its scale."""

    values: Tensor
    shape: tuple[int, ...]
    scale: float


Calls = list[dict[str, Observation]]
"""The observations of each call of a module, by the name of the tensor in its output."""


@dataclass(frozen=True)
class Recording:
    """Module outputs of one forward, by path, in the order of first completion."""

    calls: Mapping[str, Calls]


@contextmanager
def recorded(model: nn.Module, mask: Tensor | None = None) -> Iterator[Recording]:
    """Records the floating outputs of every module of `model` while inside.

    With `mask` (batch, length) only real positions are kept. Copies are taken, since later modules may write
    into the outputs of earlier ones.

    >>> import torch
    >>> with recorded(nn.Sequential(nn.ReLU())) as seen:
    ...     _ = seen
    """
    calls: dict[str, Calls] = {}
    handles = [
        module.register_forward_hook(_recorder(calls.setdefault, path, mask)) for path, module in model.named_modules()
    ]
    try:
        yield Recording(calls)
    finally:
        for handle in handles:
            handle.remove()


Hook = Callable[[nn.Module, Any, Any], None]


def _recorder(entry: Callable[[str, Calls], Calls], path: str, mask: Tensor | None) -> Hook:
    def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
        tensors = {name: tensor for name, tensor in flatten(output).items() if tensor.is_floating_point()}
        entry(path, []).append({name: _observe(name, tensor, mask) for name, tensor in tensors.items()})

    return hook


def _observe(name: str, tensor: Tensor, mask: Tensor | None) -> Observation:
    found = at_positions(name, tensor.detach(), mask, real=True)
    chosen = tensor.detach() if found is None else found
    flat = chosen.reshape(-1)
    step = -(-flat.numel() // SAMPLE) | 1 if flat.numel() > SAMPLE else 1
    return Observation(flat[::step].clone(), tuple(chosen.shape), largest(chosen))


def compare_recordings(before: Recording, after: Recording, same_shapes: bool = True) -> dict[str, float]:
    """Largest relative difference per path of `before`, in its order; paths without counterpart are left out.

    Modules called a different number of times have no counterpart. Where shapes differ the difference is
    infinite, unless `same_shapes` is False: then such a module is left out.
    """
    counterparts = align(before.calls, after.calls)
    found = {
        path: _compare_calls(calls, after.calls[counterparts[path]])
        for path, calls in before.calls.items()
        if path in counterparts and len(after.calls[counterparts[path]]) == len(calls)
    }
    return {
        path: value for path, value in found.items() if value is not None and (same_shapes or value != float("inf"))
    }


def _compare_calls(before: Calls, after: Calls) -> float | None:
    pairs = [
        (left[name], right[name]) for left, right in zip(before, after, strict=True) for name in left if name in right
    ]
    return max((_compare_observations(left, right) for left, right in pairs), default=None)


def _compare_observations(before: Observation, after: Observation) -> float:
    if before.shape != after.shape:
        return float("inf")
    return relative_difference(before.values, after.values, before.scale)


def first_divergence(
    differences: Mapping[str, float], tolerance: float, case: str, before: nn.Module, after: nn.Module
) -> Divergence | None:
    """The first module, in order of completion, that differs by more than `tolerance`."""
    for path, difference in differences.items():
        if difference > tolerance:
            kind, kind_after = (_kinds(model, [path])[path] for model in (before, after))
            return Divergence(path, kind, kind_after, difference, tolerance, case)
    return None


def summarise(rounds: Sequence[Mapping[str, float]], before: nn.Module) -> tuple[ModuleDifference, ...]:
    """The largest difference per module over several comparisons."""
    worst: dict[str, float] = {}
    for differences in rounds:
        for path, difference in differences.items():
            worst[path] = max(worst.get(path, 0.0), difference)
    kinds = _kinds(before, worst)
    return tuple(
        ModuleDifference(path, kinds[path], difference, order) for order, (path, difference) in enumerate(worst.items())
    )


def _kinds(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    modules = dict(model.named_modules())
    found = align(paths, modules)
    return {path: type(modules[found[path]]).__name__ if path in found else "absent" for path in paths}
