"""The two models of a proof with everything that comparing them needs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import FunctionType

import torch
from torch import nn

from rewire.errors import ProofError
from rewire.proof.cases import Case
from rewire.proof.compare import Difference, compare_outputs
from rewire.proof.divergence import compare_recordings, recorded
from rewire.proof.execution import Outputs, accepted_flags, forward
from rewire.proof.tolerances import Tolerances
from rewire.tensor_rules import Cast, CastBack, Rule

LARGEST_COPY = 500_000_000
"""Parameters up to which a half-precision model is compared in float32 too: two copies of 2 GB each."""


@dataclass(frozen=True, eq=False)
class Pair:
    """An untouched and an edited model. `label` says whose weights they hold: empty for their own."""

    before: nn.Module
    after: nn.Module
    rules: Rule
    limits: Tolerances
    label: str = ""

    @cached_property
    def in_double(self) -> Pair:
        """Deep copies of both with every floating tensor in float64, made when first asked for."""
        before, after = (_in_double(deep_copy(model)) for model in (self.before, self.after))
        limits = Tolerances(self.limits.promise, torch.float64, self.limits.overrides)
        return Pair(before, after, self.rules, limits, self.label)


def deep_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` that shares nothing with it. Raises `ProofError` where there can be none.

    A function that was put in place of a module's forward stays bound to the original's tensors when copied.
    """
    try:
        copied = copy.deepcopy(model)
    except Exception as error:  # whatever a module keeps in its attributes
        raise ProofError(f"{type(model).__name__} cannot be copied: {describe_error(error)}") from error
    for path, module in model.named_modules():
        own = vars(module).get("forward")
        if isinstance(own, FunctionType) and vars(copied.get_submodule(path)).get("forward") is own:
            raise ProofError(f"the forward of {path or 'the model'} was replaced by a function, which cannot be copied")
    return copied


def _in_double(model: nn.Module) -> nn.Module:
    """`model` in float64, for which there is no grouped matrix product: its experts run one after the other."""
    choose = getattr(model, "set_experts_implementation", None)
    if callable(choose):
        with contextlib.suppress(ValueError):  # what this model has are no such experts
            choose("eager")
    return model.double()


def in_single(pair: Pair) -> Pair | None:
    """Deep copies of two half-precision models in float32, where a small mistake is told from rounding.

    None for other types, for models of more than `LARGEST_COPY` parameters, and where the rules cast: then the two
    models do not hold the same values. Raises `ProofError` where a model cannot be copied.
    """
    is_half = pair.limits.dtype in (torch.float16, torch.bfloat16)
    is_small = sum(parameter.numel() for parameter in pair.before.parameters()) <= LARGEST_COPY
    if not is_half or not is_small or any(isinstance(step, Cast | CastBack) for step in pair.rules):
        return None
    before, after = (deep_copy(model).float() for model in (pair.before, pair.after))
    limits = Tolerances(pair.limits.promise, torch.float32, pair.limits.overrides)
    return Pair(before, after, pair.rules, limits, "float32")


@dataclass(frozen=True)
class CaseResult:
    """How one case came out.

    `real` and `padded` are the largest relative differences of any output tensor at real and padded positions
    (`padded` is None without any), `worst` the name of the tensor that differs most, `tensors` and
    `bit_equal` how many were compared and how many agree bit for bit. `modules` are the differences per
    module path. `error` says why a model did not run; `skipped` is set when it was the untouched one.
    """

    case: Case
    real: float = 0.0
    padded: float | None = None
    worst: str = ""
    tensors: int = 0
    bit_equal: int = 0
    modules: dict[str, float] = field(default_factory=dict)
    error: str = ""
    skipped: bool = False

    @property
    def largest(self) -> float:
        """The larger of both differences."""
        return max(self.real, self.padded or 0.0)


def compare_case(pair: Pair, case: Case) -> CaseResult:
    """Runs both models on `case` and compares outputs and modules.

    A case that the untouched model does not take is skipped; an exception of the edited one is a difference.
    """
    mask = None if pair.limits.judges_padding else case.mask
    try:
        with recorded(pair.before, mask) as seen_before:
            before = forward(pair.before, case)
    except Exception as error:
        return CaseResult(case, error=describe_error(error), skipped=True)
    try:
        with recorded(pair.after, mask) as seen_after:
            after = forward(pair.after, case)
        unwatched = _compare_unwatched(pair, case, before)
    except Exception as error:
        return CaseResult(case, float("inf"), error=describe_error(error))
    found = [*compare_outputs(before, after, case.mask), *unwatched]
    worst = max(found, key=lambda one: max(one.real, one.padded or 0.0), default=None)
    return CaseResult(
        case=case,
        real=max((one.real for one in found), default=0.0),
        padded=max((one.padded for one in found if one.padded is not None), default=None),
        worst=worst.name if worst is not None else "",
        tensors=len(found),
        bit_equal=sum(one.bit_equal for one in found),
        modules=compare_recordings(seen_before, seen_after, same_shapes=pair.limits.judges_padding),
    )


def _compare_unwatched(pair: Pair, case: Case, before: Outputs) -> Sequence[Difference]:
    """The outputs once more, with nobody listening to modules and no hidden states asked for.

    A forward that was put in place of a module's own may run in another way then (a packed encoder does).
    """
    if not any("forward" in vars(module) for module in pair.after.modules()):
        return []
    if "output_hidden_states" in accepted_flags(pair.after):
        case = replace(case, kwargs={"output_hidden_states": False, **case.kwargs})
    outputs = forward(pair.after, case)
    return compare_outputs({name: before[name] for name in before if name in outputs}, outputs, case.mask)


def in_double(pair: Pair, case: Case) -> CaseResult | None:
    """The same comparison in float64; None when a model does not run there."""
    if pair.limits.dtype == torch.float64:
        return None
    try:
        result = compare_case(pair.in_double, case)
    except Exception:  # copying or converting may fail in any way that a module likes
        return None
    return None if result.error else result


def describe_error(error: BaseException) -> str:
    """The kind and the first line of an exception."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"


def largest_difference(results: Iterable[CaseResult]) -> float:
    """The largest difference at real positions."""
    return max((result.real for result in results if not result.skipped), default=0.0)
