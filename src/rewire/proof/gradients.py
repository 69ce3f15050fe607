"""Gradients of one scalar in both models, led through the rules: these are linear, so they map gradients too."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rewire.errors import RuleError
from rewire.proof.cases import Case
from rewire.proof.compare import largest, position_dim, relative_difference
from rewire.proof.execution import forward_with_graph
from rewire.proof.guard import gradients_required
from rewire.proof.names import align
from rewire.proof.pair import Pair, describe_error
from rewire.proof.weights import parameters_of, state_of
from rewire.tensor_rules import run, visible

Gradients = dict[str, Tensor | None]
Scales = dict[str, float]


NOISE_FLOOR = 1e-6
"""Gradients are measured against at least this share of the largest gradient in the model: the gradient of a
parameter without influence is rounding noise, and noise agrees with nothing."""


@dataclass(frozen=True)
class GradientReport:
    """How the gradients compare.

    `differences` are relative to the largest gradient in the same module, by name in the untouched model
    after the rules; `unused` counts parameters without gradient on both sides, `extra` names those that only
    the edited model has, `missing` those it lacks. `error` says why nothing could be compared.
    """

    differences: Mapping[str, float]
    unused: int = 0
    extra: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    error: str = ""

    @property
    def largest(self) -> float:
        """The largest difference; infinite after an error."""
        return math.inf if self.error else max(self.differences.values(), default=0.0)

    def beyond(self, limit: float) -> list[str]:
        """Names whose gradients differ by more than `limit`, the worst first."""
        names = [name for name, value in self.differences.items() if value > limit]
        return sorted(names, key=lambda name: -self.differences[name])


def compare_gradients(pair: Pair, case: Case) -> GradientReport:
    """Gradients of the same random projection of all outputs with respect to every parameter, compared.

    In evaluation mode; a model that has no backward pass there (Reformer's is for training alone) is compared in
    training mode, where the same seed gives both models the same dropout.
    """
    report = _compared(pair, case)
    if not report.error:
        return report
    with _training(pair.before), _training(pair.after):
        training = _compared(pair, case)
    return report if training.error else training


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Every module in training mode inside; afterwards as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _compared(pair: Pair, case: Case) -> GradientReport:
    mask = None if pair.limits.judges_padding else case.mask
    try:
        before, scales = gradients_of(pair.before, case, mask, None)
    except Exception as error:
        return GradientReport({}, error=f"the untouched model has no backward pass here: {describe_error(error)}")
    try:
        after, _ = gradients_of(pair.after, case, mask, scales)
    except Exception as error:
        return GradientReport({}, error=f"the edited model has no backward pass here: {describe_error(error)}")
    try:
        expected = visible(run(pair.rules, _complete(pair.before, before), torch))
    except RuleError as error:
        return GradientReport({}, error=f"the rules do not fit the gradients: {error}")
    return _report(expected, after)


def gradients_of(model: nn.Module, case: Case, mask: Tensor | None, scales: Scales | None) -> tuple[Gradients, Scales]:
    """The gradient of every floating parameter by name (None where unused), and the scales of the outputs.

    The scalar is the sum over outputs of <random numbers, output> / (scale · √elements), so that large
    outputs do not drown small ones. With `mask` only real positions count. `.grad` is neither read nor
    written.
    """
    named = {name: p for name, p in parameters_of(model).items() if p.is_floating_point()}
    unique = list({id(parameter): parameter for parameter in named.values()}.values())
    with torch.enable_grad(), gradients_required(model):
        outputs = forward_with_graph(model, case)
        usable = {name: tensor for name, tensor in outputs.items() if tensor.requires_grad}
        scales = scales or {name: largest(tensor.detach()) for name, tensor in usable.items()}
        loss = _projection(usable, scales, mask)
        found = torch.autograd.grad(loss, unique, allow_unused=True)
    by_id = {id(parameter): gradient for parameter, gradient in zip(unique, found, strict=True)}
    return {name: by_id[id(parameter)] for name, parameter in named.items()}, scales


def _projection(outputs: Mapping[str, Tensor], scales: Scales, mask: Tensor | None) -> Tensor:
    terms = [
        _project(name, tensor, mask) / (scales[name] * math.sqrt(tensor.numel()))
        for name, tensor in outputs.items()
        if scales.get(name)
    ]
    if not terms:
        raise ValueError("no output depends on a parameter; pass gradients=False where none are wanted")
    return torch.stack([term.to(terms[0].device, torch.float64) for term in terms]).sum()


def _project(name: str, tensor: Tensor, mask: Tensor | None) -> Tensor:
    """<random numbers, tensor>, the same numbers for every model; fillers and infinities do not count."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
    if mask is not None and tensor.ndim > 0 and tensor.shape[0] == mask.shape[0]:
        dim = position_dim(name, tensor, mask)
        weights.movedim(dim or 0, 1 if dim else 0)[~mask if dim else ~mask[:, 0]] = 0
    limit = torch.finfo(tensor.dtype).max / 2
    measured = torch.where(tensor.abs() <= limit, tensor, torch.zeros_like(tensor))
    wide = measured if measured.dtype == torch.float64 else measured.float()
    return (wide * weights.to(wide.device, wide.dtype)).sum()


def _complete(model: nn.Module, gradients: Gradients) -> dict[str, Tensor]:
    """A tensor for every name the rules may ask for: zeros where there is no gradient."""
    state = state_of(model)
    found = {name: gradients.get(name) for name in state}
    return {name: torch.zeros_like(state[name]) if value is None else value for name, value in found.items()}


def _report(expected: Mapping[str, Tensor], after: Gradients) -> GradientReport:
    if not all(bool(gradient.isfinite().all()) for gradient in expected.values() if gradient.is_floating_point()):
        return GradientReport({}, error="the gradients of the untouched model are not finite here")
    names = align(expected, after)
    scales = _module_scales(expected)
    differences = {
        name: _difference(expected[name], after[other], scales[_parent(name)]) for name, other in names.items()
    }
    unused = [name for name, other in names.items() if after[other] is None and not expected[name].any()]
    missing = tuple(name for name in expected if name not in names and expected[name].any())
    used = set(names.values())
    extra = tuple(name for name in after if name not in used)
    return GradientReport(differences, len(unused), extra, missing)


def _difference(expected: Tensor, found: Tensor | None, scale: float) -> float:
    return relative_difference(expected, torch.zeros_like(expected) if found is None else found, scale)


def _module_scales(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest gradient per module, and at least `NOISE_FLOOR` of the largest of all.

    The bias of a key projection has no gradient but noise, since softmax ignores it; its weight's gradient is
    the measure of that noise.
    """
    scales: dict[str, float] = {}
    for name, gradient in gradients.items():
        scales[_parent(name)] = max(scales.get(_parent(name), 0.0), largest(gradient))
    floor = NOISE_FLOOR * max(scales.values(), default=0.0)
    return {parent: max(scale, floor) for parent, scale in scales.items()}


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def compare_in_double(pair: Pair, case: Case) -> GradientReport | None:
    """The same comparison in float64; None when a model does not run there."""
    if pair.limits.dtype == torch.float64:
        return None
    try:
        report = compare_gradients(pair.in_double, case)
    except Exception:  # copying or converting may fail in any way that a module likes
        return None
    return None if report.error else report
