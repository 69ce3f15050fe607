"""Whether two models agree within the promise of the plan: asked before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rewire.errors import MeasureError
from rewire.measure.bench.bench import Bench
from rewire.measure.bench.records import AFTER, BEFORE, checked
from rewire.proof.cases import Case
from rewire.proof.execution import forward
from rewire.proof.guard import untouched
from rewire.proof.outputs import judge_case
from rewire.proof.pair import Pair
from rewire.proof.tolerances import Tolerances, check_promise, coarsest_dtype

_MAIN = ("logits", "last_hidden_state", "pooler_output", "output")
"""Outputs by which a model is used; the first that it has is looked at for numbers that are not finite."""


def limits_of(bench: Bench) -> Tolerances:
    """How far the models may lie apart."""
    models = [bench.model(side) for side in bench.sides]
    return Tolerances(check_promise(bench.promise), coarsest_dtype(models))


def check_outputs(bench: Bench, suite: str, cases: Iterable[Case]) -> dict[str, Any]:
    """The record of a check of all outputs over these inputs.

    Raises `MeasureError` where they differ by more than the plan promises, are not finite, or a model does not run.
    """
    models = [bench.model(side) for side in bench.sides]
    limits, worst = limits_of(bench), 0.0
    with untouched(*models):
        for case in cases:
            for side in bench.sides:
                _check_finite(bench, side, case)
            if AFTER in bench.sides:
                worst = max(worst, _difference(Pair(bench.model(BEFORE), bench.model(AFTER), (), limits), case))
    if AFTER not in bench.sides:
        return checked(suite, "outputs are finite", "none", None, None)
    limit = limits.outputs if math.isfinite(limits.outputs) else None
    return checked(suite, "outputs", limits.promise, worst if math.isfinite(worst) else None, limit)


def _difference(pair: Pair, case: Case) -> float:
    verdict = judge_case(pair, case)
    if verdict.result.error:
        raise MeasureError(f"{case.name}: a model does not run: {verdict.result.error}")
    wrong = next((check for check in verdict.checks if not check.passed), None)
    if wrong is not None:
        where = f", first in {verdict.divergence.path or 'the model itself'}" if verdict.divergence is not None else ""
        raise MeasureError(
            f"the outputs of the two models differ by {wrong.value:.1e}, and {pair.limits.promise} edits may differ by "
            f"{wrong.tolerance:.1e} ({case.name}; {wrong.detail}{where}). Nothing was timed; rewire prove says more"
        )
    return verdict.result.real


def _check_finite(bench: Bench, side: str, case: Case) -> None:
    try:
        outputs = forward(bench.model(side), case)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise MeasureError(f"{case.name}: the model {side} the plan does not run: {error}") from error
    name = next((one for one in _MAIN if one in outputs), None)
    if name is not None and not _is_finite(outputs[name], case.mask):
        raise MeasureError(
            f"the {name} of the model {side} the plan are not finite ({case.name}): its weights are broken, or its "
            "type too narrow. Nothing was timed"
        )


def _is_finite(tensor: Tensor, mask: Tensor | None) -> bool:
    """Whether all numbers at real positions are finite."""
    if mask is not None and tensor.shape[:2] == mask.shape:
        tensor = tensor[mask.to(tensor.device)]
    return bool(torch.isfinite(tensor).all())
