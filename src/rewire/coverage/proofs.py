"""The proofs of one edit on one tiny model: of the whole model, and of the parts that its outputs say nothing about.

A composite model hides some of its parts: a pooling head that nobody reads, a codec that only generation calls, a
quantiser after which nothing has a gradient. Such a part is a model itself, with inputs of its own, and is proven
by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from rewire import hf_seam
from rewire.errors import ProofError
from rewire.proof import Case, Check, Proof, cases_for, prove
from rewire.proof.execution import forward
from rewire.proof.gradients import gradients_of
from rewire.proof.guard import untouched
from rewire.receipts import receipt_of
from rewire.tensor_rules import Rule, Step, with_names


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
    for path in _parts_with(before, missing):
        if any(_is_below(module, path) for module in missing):
            proof, reached = _prove_part(before, after, path, sorted(missing))
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


def _parts_with(model: nn.Module, missing: set[str]) -> Iterator[str]:
    """The models inside `model` that hold some of `missing`, the largest first."""
    for path, module in model.named_modules():
        if path and isinstance(module, hf_seam.PreTrainedModel) and any(_is_below(one, path) for one in missing):
            yield path


def _is_below(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}.")


def _prove_part(
    before: nn.Module, after: nn.Module, path: str, missing: Sequence[str]
) -> tuple[Proof | None, set[str]]:
    """The proof of the model at `path` by itself, and which of `missing` it makes felt; None where it has no inputs."""
    first, second = before.get_submodule(path), after.get_submodule(path)
    inside = [module.removeprefix(f"{path}.") for module in missing if module.startswith(f"{path}.")]
    try:
        with untouched(first):
            cases = cases_for(first, (0,))[:1]
            reached = felt(first, cases, inside)
    except Exception:  # no inputs are known, or these are not enough
        return None, set()
    if not reached:
        return None, set()
    receipt = receipt_of(after)
    rules = _rules_below(receipt.rules if receipt else (), path)
    try:
        proof = prove(first, second, rules=rules, promise=receipt.promise if receipt else "exact", inputs=cases)
    except ProofError:
        return None, set()
    return proof, {f"{path}.{module}" for module in reached}


def _rules_below(rules: Rule, path: str) -> Rule:
    """The steps on tensors of the module at `path`, by their names in it."""
    prefix = f"{path}."

    def inside(step: Step) -> bool:
        return all(name.startswith(prefix) for name in (*step.inputs, *step.outputs))

    return tuple(with_names(step, lambda name: name.removeprefix(prefix)) for step in rules if inside(step))
