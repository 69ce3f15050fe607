"""The proofs of one edit on one tiny model: of the whole model, and of the parts that its outputs say nothing about.

A composite model hides some of its parts: a pooling head that nobody reads, a codec that only generation calls, a
quantiser after which nothing has a gradient. Such a part is a model itself, with inputs of its own, and is proven
by itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rewire import hf_seam
from rewire.module_tree import under
from rewire.proof import Case, Check, Proof, cases_for, prove
from rewire.proof.execution import forward
from rewire.proof.gradients import gradients_of
from rewire.proof.guard import untouched
from rewire.receipts import receipt_of
from rewire.tensor_rules import Rule, Step, with_names

TOKENS, SIDE = 5, 4
"""Size of the input of a module that is proven by itself: so many tokens, or an image of this height and width."""

_OTHER_TOKENS = ("encoder_hidden_states", "key_value_states")


@dataclass(frozen=True)
class Verdict:
    """What the proofs of an edit came to.

    Attributes:
        difference: the largest relative difference of an output.
        wrong: what differs; empty if nothing does.
        left: what could not be compared.
    """

    difference: float
    wrong: tuple[str, ...]
    left: tuple[str, ...]


def prove_everywhere(before: nn.Module, after: nn.Module, cases: Sequence[Case], modules: Sequence[str]) -> Verdict:
    """Proves `after` against `before`, so that every one of `modules` (paths in `before`) is felt by some output."""
    proofs = [prove(before, after, inputs=cases)]
    missing = set(modules) - felt(before, cases, modules)
    for path, inputs in _parts(before, missing):
        inside = sorted(module for module in missing if _is_below(module, path))
        proof, reached = _prove_part(before, after, path, inside, inputs) if inside else (None, set())
        proofs += [proof] if proof is not None else []
        missing -= reached
    wrong = [f"{check.name}: {check.detail}" for proof in proofs for check in proof.checks if _is_wrong(check)]
    left = [_told(missing, modules)] if missing else []
    left += [check.detail for proof in proofs for check in proof.checks if _is_open(check)]
    return Verdict(max(proof.max_difference for proof in proofs), tuple(wrong), tuple(dict.fromkeys(left)))


def _is_wrong(check: Check) -> bool:
    """Whether a check found a difference. That outputs react is seen to place by place, not for the whole."""
    return not check.passed and not check.name.endswith("sensitivity") and not _is_open(check)


def _is_open(check: Check) -> bool:
    """Whether there is nothing to compare with."""
    return not check.passed and "the untouched model has no backward pass here" in check.detail


def _told(missing: set[str], modules: Sequence[str]) -> str:
    return f"no output depends on {len(missing)} of {len(modules)} projections ({min(missing)}, …)"


# ---------------------------------------------------------------- what outputs depend on


def felt(model: nn.Module, cases: Sequence[Case], modules: Sequence[str]) -> set[str]:
    """Those of `modules` that some output of some case depends on: by its gradient, or where there is none at all,
    by having been called.
    """
    found: set[str] = set()
    for case in cases:
        used = _with_gradient(model, case)
        if used is None:
            found |= _called(model, case).intersection(modules)
        else:
            found |= {path for path in modules if _owns(model.get_submodule(path), used)}
    return found


def _with_gradient(model: nn.Module, case: Case) -> frozenset[int] | None:
    """The parameters that some output depends on, by identity; None where there is no backward pass."""
    try:
        with untouched(model):
            gradients, _ = gradients_of(model, case, None, None)
    except Exception:  # whatever foreign code raises
        return None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return frozenset(id(parameters[n]) for n, gradient in gradients.items() if gradient is not None and gradient.any())


def _owns(module: nn.Module, parameters: frozenset[int]) -> bool:
    return any(id(parameter) in parameters for parameter in module.parameters())


def _called(model: nn.Module, case: Case) -> set[str]:
    ran: set[int] = set()
    with untouched(model):
        for module in model.modules():
            module.register_forward_pre_hook(lambda module, args: ran.add(id(module)))
        forward(model, case)
    return {path for path, module in model.named_modules(remove_duplicate=False) if id(module) in ran}


# ---------------------------------------------------------------- parts

Inputs = Callable[[nn.Module], Sequence[Case]]
"""Makes inputs for a part; may raise anything where it knows none."""


def _parts(model: nn.Module, missing: set[str]) -> Iterator[tuple[str, Inputs]]:
    """The parts of `model` that hold some of `missing`, and how to make inputs for them.

    First the models inside it, the largest first; then the modules that own the projections, with tokens of the
    width that these take.
    """
    for path, module in model.named_modules():
        if path and isinstance(module, hf_seam.PreTrainedModel) and any(_is_below(one, path) for one in missing):
            yield path, lambda part: cases_for(part, (0,))[:1]
    for path in sorted(missing):
        for owner in _owners(path):
            for shape in _input_shapes(model.get_submodule(path)):
                yield owner, functools.partial(_tokens, shape)


def _is_below(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}.")


def _owners(path: str) -> list[str]:
    """The module that holds a projection and the one around that."""
    parts = path.split(".")
    return [".".join(parts[:-depth]) for depth in (1, 2) if len(parts) > depth]


def _input_shapes(projection: nn.Module) -> list[tuple[int, ...]]:
    """What tokens, and pixels, that a projection takes look like."""
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        return []
    width = weight.shape[1]
    if weight.ndim == 4:
        return [(1, width, SIDE, SIDE)]
    return [(1, TOKENS, width), (1, 1, TOKENS, width)]  # SAM has a dimension for prompts


def _tokens(shape: tuple[int, ...], module: nn.Module) -> Sequence[Case]:
    """A forward that takes nothing but tokens, by whatever names, and others for a cross-attention."""
    parameters = inspect.signature(module.forward).parameters
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [name for name, one in parameters.items() if one.kind in kinds and one.default is one.empty]
    names += [name for name in _OTHER_TOKENS if name in parameters and name not in names]
    generator = torch.Generator().manual_seed(0)
    return [Case("tokens", {name: torch.randn(shape, generator=generator) for name in names})]


def _prove_part(
    before: nn.Module, after: nn.Module, path: str, inside: Sequence[str], inputs: Inputs
) -> tuple[Proof | None, set[str]]:
    """The proof of the module at `path` by itself, and which of `inside` it makes felt; None where it has no inputs."""
    first, second = before.get_submodule(path), after.get_submodule(path)
    local = [module.removeprefix(path).removeprefix(".") for module in inside]
    receipt = receipt_of(after)
    assert receipt is not None
    rules = _rules_below(receipt.rules, path)
    try:
        with untouched(first):
            cases = inputs(first)
            reached = felt(first, cases, local)
        if not reached:
            return None, set()
        proof = prove(first, second, rules=rules, promise=receipt.promise, inputs=cases)
    except Exception:  # no inputs are known for this part, or these are not enough
        return None, set()
    return proof, {under(path, module) if module else path for module in reached}


def _rules_below(rules: Rule, path: str) -> Rule:
    """The steps on tensors of the module at `path`, by their names in it."""
    prefix = f"{path}."

    def inside(step: Step) -> bool:
        return all(name.startswith(prefix) for name in (*step.inputs, *step.outputs))

    return tuple(with_names(step, lambda name: name.removeprefix(prefix)) for step in rules if inside(step))
