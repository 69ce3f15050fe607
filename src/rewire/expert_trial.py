"""Experts of a class that nothing is known of, tried on random tensors of the same shapes.

Two things are asked. How does the forward use a slice, as `[out, in]` or as `[in, out]`? The experts are taken apart
under every assumption; a wrong one raises, for it is the operation that shows, not the shape. And which rows of a
tensor twice as high as the next one is wide are gate, which up? The output is affine in the rows of up, and in no
others. Whatever is left open is refused.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rewire.modules import StackedWeight, UnstackedExperts

_LARGEST = 2**26
"""Elements of the slices of one expert: no more are made for a trial."""

_TOKENS = 6


def find(module: nn.Module) -> tuple[int, tuple[StackedWeight, ...]] | str:
    """How many experts `module` has and what its stacked tensors hold; or why that cannot be found.

    >>> class Moe(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up, self.down = nn.Parameter(torch.empty(3, 8, 4)), nn.Parameter(torch.empty(3, 4, 8))
    ...
    ...     def forward(self, x):
    ...         return torch.bmm(torch.bmm(x.view(3, -1, 4), self.up.mT).relu(), self.down.mT).flatten(0, 1)
    >>> count, weights = find(Moe())
    >>> count, [(weight.name, weight.sizes, weight.transposed) for weight in weights]
    (3, [('up', (8,), False), ('down', (4,), False)])
    """
    names = [name for name, p in module._parameters.items() if p is not None and p.ndim == 3]
    shapes = {name: tuple(module.get_parameter(name).shape) for name in names}
    if len({shape[0] for shape in shapes.values()}) != 1 or len(shapes) > 3:
        return "its tensors do not agree in the number of experts"
    if sum(rows * columns for _, rows, columns in shapes.values()) > _LARGEST:
        return "it is too large to be tried"
    if next(module.buffers(), None) is not None:
        return "it holds buffers, whose values a trial would need"
    count = shapes[names[0]][0]
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            torch.manual_seed(0)
            return _find(_random(module), count, names)
    except Exception as error:  # any code may stand in that class
        return f"a trial fails ({type(error).__name__}: {error})"


def _find(module: nn.Module, count: int, names: Sequence[str]) -> tuple[int, tuple[StackedWeight, ...]] | str:
    found = list(_orientations(module, count, names))
    if len(found) != 1:
        return "a trial does not show how it uses them" if found else "it does not use them in a way that is understood"
    weights, inputs = found[0]
    gated = _gate_and_up(module, weights, inputs)
    if isinstance(gated, str):
        return gated
    return (count, gated) if _same(module, gated, count, inputs) else "its experts apart give another result"


def _random(module: nn.Module) -> nn.Module:
    """A copy on the CPU in double precision; the stacked tensors are views of a short row of random numbers."""
    twin = copy.copy(module)
    twin.__dict__.update(_parameters={}, _modules={})
    for name, parameter in module._parameters.items():
        twin._parameters[name] = None if parameter is None else nn.Parameter(_values(parameter), requires_grad=False)
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _filled(child)
    return twin.eval()


def _values(like: Tensor) -> Tensor:
    if like.ndim != 3:
        return torch.randn(like.shape, dtype=torch.float64) * 0.3
    experts, rows, columns = like.shape
    strides = (101, 17, 1)  # no slice and no row is like another
    length = sum(size * stride for size, stride in zip(like.shape, strides, strict=True))
    numbers = torch.randn(length, dtype=torch.float64) / min(rows, columns) ** 0.5
    values: Tensor = numbers.as_strided((experts, rows, columns), strides)
    return values


def _filled(child: nn.Module) -> nn.Module:
    twin = copy.deepcopy(child).to_empty(device="cpu").double()
    for parameter in twin.parameters():
        parameter.normal_().mul_(0.3)
    return twin


def _orientations(
    module: nn.Module, count: int, names: Sequence[str]
) -> Iterator[tuple[tuple[StackedWeight, ...], tuple[Tensor, ...]]]:
    """Every assumption about the orientations under which the experts apart give the same, with inputs."""
    for transposed in itertools.product((False, True), repeat=len(names)):
        weights = tuple(_weight(module, name, t) for name, t in zip(names, transposed, strict=True))
        inputs = _inputs(module, count, weights[0].in_features)
        if inputs is not None and _same(module, weights, count, inputs):
            yield weights, inputs


def _weight(module: nn.Module, name: str, transposed: bool) -> StackedWeight:
    _, rows, columns = module.get_parameter(name).shape
    out, width = (columns, rows) if transposed else (rows, columns)
    bias = f"{name}_bias"
    return StackedWeight(
        name, (name,), (out,), width, transposed=transposed, bias=bias if bias in module._parameters else None
    )


def _inputs(module: nn.Module, count: int, width: int) -> tuple[Tensor, ...] | None:
    """Tokens, and if these are asked for, each token's experts and their weights."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(needed) == 1:
        return (torch.randn(count * _TOKENS, width, dtype=torch.float64),)
    if len(needed) != 3:
        return None
    chosen = torch.stack([torch.randperm(count)[: min(2, count)] for _ in range(_TOKENS)])
    shares = torch.rand(chosen.shape, dtype=torch.float64)
    return torch.randn(_TOKENS, width, dtype=torch.float64), chosen, shares


def _same(module: nn.Module, weights: Sequence[StackedWeight], count: int, inputs: Sequence[Tensor]) -> bool:
    """Whether taking the experts apart as `weights` says changes nothing."""
    try:
        want = _run(module, inputs)
        apart = UnstackedExperts(module, weights, count)
        for weight in weights:
            _fill(apart, module, weight, count)
        return torch.allclose(_run(apart, inputs), want, rtol=1e-9, atol=1e-12)
    except Exception:  # an assumption that the code does not bear out
        return False


def _run(module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    output: Any = module(*(x.clone() for x in inputs))
    if not isinstance(output, Tensor) or not output.isfinite().all():
        raise TypeError("the output is not a tensor of numbers")
    return output


def _fill(apart: UnstackedExperts, module: nn.Module, weight: StackedWeight, count: int) -> None:
    """Gives the linear layers the rows that they would get."""
    whole = module.get_parameter(weight.name)
    stacked = whole.mT if weight.transposed else whole
    for number in range(count):
        for part, rows in zip(weight.parts, _rows(weight), strict=True):
            layer = apart.get_submodule(f"{number}.{part}")
            layer._parameters["weight"] = nn.Parameter(stacked[number][rows], requires_grad=False)
            if weight.bias is not None:
                bias = module.get_parameter(weight.bias)[number][rows]
                layer._parameters["bias"] = nn.Parameter(bias, requires_grad=False)


def _rows(weight: StackedWeight) -> list[slice]:
    """Which rows each part has."""
    if len(weight.parts) == 1:
        return [slice(None)]
    if weight.groups == 1:
        return [slice(0, weight.sizes[0]), slice(weight.sizes[0], None)]
    return [slice(0, None, 2), slice(1, None, 2)]


def _gate_and_up(
    module: nn.Module, weights: tuple[StackedWeight, ...], inputs: Sequence[Tensor]
) -> tuple[StackedWeight, ...] | str:
    """`weights`, with gate and up told apart where one tensor holds both."""
    if len(weights) != 2 or weights[0].out_features != 2 * weights[1].in_features:
        return weights
    fused = weights[0]
    half = fused.out_features // 2
    found = [
        replace(fused, parts=parts, sizes=(half, half), groups=groups)
        for groups, parts in itertools.product((1, half), (("gate_proj", "up_proj"), ("up_proj", "gate_proj")))
    ]
    fitting = [weight for weight in found if _is_affine_in_up(module, weight, inputs)]
    if len(fitting) != 1:
        return f"a trial does not show which rows of {fused.name} are gate and which up"
    return fitting[0], replace(weights[1], parts=("down_proj",))


def _is_affine_in_up(module: nn.Module, weight: StackedWeight, inputs: Sequence[Tensor]) -> bool:
    """Whether the output moves by equal steps when the rows of up do."""
    whole = module.get_parameter(weight.name)
    step = torch.zeros_like(whole, memory_format=torch.contiguous_format)
    rows = _rows(weight)[weight.parts.index("up_proj")]
    out_first = step.mT if weight.transposed else step
    out_first[:, rows] = torch.randn_like(out_first[:, rows]) * whole.std()
    first, second, third = (_with(module, weight.name, whole + n * step, inputs) for n in range(3))
    moved = (second - first).abs().max()
    return bool(moved > 1e-6 and (third - 2 * second + first).abs().max() < 1e-9 * moved)


def _with(module: nn.Module, name: str, tensor: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    kept = module._parameters[name]
    module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    try:
        return _run(module, inputs)
    finally:
        module._parameters[name] = kept
