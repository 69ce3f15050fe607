"""Strong random weights: values under which every tensor of a model matters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from rewire.errors import ProofError, RuleError
from rewire.proof.cases import Case
from rewire.proof.execution import forward
from rewire.proof.names import align, shorten
from rewire.proof.pair import Pair, deep_copy, in_single
from rewire.proof.weights import derived_names, parameters_of, state_of
from rewire.tensor_rules import run, visible

GAINS = (2.0, 1.0, 0.5)
"""Tried in turn until the outputs are finite: with 2, attention scores have a standard deviation of 4."""

BIAS = 0.3
"""Standard deviation of biases."""

SPREAD = 0.2
"""Standard deviation of norm weights about 1, and relative one of other vectors about their values."""

LABEL = "strong weights"


def strong_pair(pair: Pair, case: Case, seed: int = 0) -> Pair:
    """Deep copies of both models, with strong random weights led through the rules.

    Models of half precision are compared in float32 here, where a mistake is easier to tell from rounding,
    unless the rules cast. Buffers keep their values; so do parameters that only the edited model has (LoRA),
    but for DoRA's magnitudes, which follow from the weights. Raises `ProofError` when the rules do not lead
    to every tensor of the edited model, or every gain gives outputs that are not numbers.
    """
    copies = in_single(pair) or replace(pair, before=deep_copy(pair.before), after=deep_copy(pair.after))
    for gain in GAINS:
        draw_strong(copies.before, gain, seed)
        if _gives_numbers(copies.before, case):
            transfer(copies)
            return replace(copies, label=LABEL)
    raise ProofError(f"with no strong weights does {type(pair.before).__name__} give numbers for “{case.name}”")


def _gives_numbers(model: nn.Module, case: Case) -> bool:
    try:
        return not any(bool(tensor.isnan().any()) for tensor in forward(model, case).values())
    except Exception:  # a model may refuse such weights in any way it likes
        return False


@torch.no_grad()
def draw_strong(model: nn.Module, gain: float, seed: int = 0) -> None:
    """Writes strong random values into every floating parameter of `model`.

    >>> layer = nn.Linear(100, 100)
    >>> draw_strong(layer, gain=2.0)
    >>> 0.19 < layer.weight.std().item() < 0.21
    True
    """
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and id(parameter) not in done:
                done.add(id(parameter))
                values = strong_values(module, name, parameter.detach(), gain, generator)
                parameter.copy_(values.to(parameter.device, parameter.dtype))


def strong_values(module: nn.Module, name: str, tensor: Tensor, gain: float, generator: torch.Generator) -> Tensor:
    """Strong values for the parameter `name` of `module`, float32 on the CPU."""
    noise = torch.randn(tensor.shape, generator=generator)
    old = tensor.float().cpu()
    if tensor.ndim >= 2:
        return noise if isinstance(module, nn.Embedding) else noise * gain / math.sqrt(fan_in(module, tensor))
    if name.endswith("bias"):
        return noise * BIAS
    if tensor.numel() > 1 and bool((old == old.flatten()[0]).all()):  # norm weights, layer scales
        return 1 + noise * SPREAD
    return old + noise * SPREAD * old.abs().mean()


def fan_in(module: nn.Module, tensor: Tensor) -> int:
    """How many inputs add up in one output, for weights of two dimensions and more."""
    if hasattr(module, "kernel_size"):
        return max(1, tensor[0].numel())
    is_transposed = type(module).__name__ == "Conv1D"  # weights [inputs, outputs], as in GPT-2
    return max(1, tensor.shape[0 if is_transposed else -1])


@torch.no_grad()
def transfer(pair: Pair) -> None:
    """Writes into the edited model what the rules make of the tensors of the untouched one.

    Raises `ProofError` where they lead nowhere.
    """
    before, after = pair.before, pair.after
    try:
        mapped = visible(run(pair.rules, state_of(before), torch))
    except RuleError as error:
        raise ProofError(f"the rules do not fit: {error}") from error
    parameters = parameters_of(after)
    names = align(mapped, parameters)
    present = align(mapped, state_of(after))
    lost = [name for name in mapped if name not in present and name not in derived_names(before)]
    if lost:
        raise ProofError(f"no tensor of the edited model takes {shorten(lost)}; pass rules= that say which does")
    for name, other in names.items():
        parameters[other].copy_(mapped[name])
    _set_magnitudes(after, parameters)


def _set_magnitudes(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """DoRA is without effect at initialisation because its magnitudes are the norms of the rows of the
    weight.
    """
    for name, magnitude in parameters.items():
        path, marker, _ = name.partition(".lora_magnitude_vector.")
        weight = parameters.get(f"{path}.base_layer.weight")
        if marker and weight is not None:
            is_transposed = bool(getattr(model.get_submodule(path), "fan_in_fan_out", False))
            norms = torch.linalg.vector_norm(weight, dim=0 if is_transposed else 1)
            magnitude.copy_(norms.reshape(magnitude.shape))
