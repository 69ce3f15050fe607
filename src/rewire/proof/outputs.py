"""The verdict on outputs: within tolerance, or mere rounding, or different."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from rewire.proof.cases import Case
from rewire.proof.divergence import Divergence, first_divergence
from rewire.proof.pair import CaseResult, Pair, compare_case, in_double
from rewire.proof.report import Check, show
from rewire.proof.tolerances import DOUBLE


@dataclass(frozen=True)
class OutputVerdict:
    """One case: its checks, what was measured, and the first diverging module if a check failed."""

    checks: tuple[Check, ...]
    result: CaseResult
    divergence: Divergence | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def judge_cases(pair: Pair, cases: Iterable[Case]) -> Iterator[OutputVerdict]:
    """One verdict per case. Once float64 has shown a real difference, later ones are taken at their word."""
    recheck = True
    for case in cases:
        verdict = judge_case(pair, case, recheck)
        recheck = recheck and verdict.passed
        yield verdict


def judge_case(pair: Pair, case: Case, recheck: bool = True) -> OutputVerdict:
    """Compares the outputs of both models for one case.

    With `recheck`, a difference beyond the tolerance is looked at again in float64, to tell rounding from
    error.
    """
    result = compare_case(pair, case)
    if result.skipped:
        return OutputVerdict((), result)
    limit = pair.limits.outputs
    padding_limit = limit if pair.limits.judges_padding else math.inf
    is_beyond = result.real > limit or (result.padded or 0.0) > padding_limit
    double = in_double(pair, case) if is_beyond and recheck and not result.error else None
    checks = [_check(pair, "outputs", result.real, double.real if double else None, limit, result)]
    if result.padded is not None:
        in_padding = (double.padded or 0.0) if double else None
        checks.append(_check(pair, "padded positions", result.padded, in_padding, padding_limit, result))
    verdict = OutputVerdict(tuple(checks), result)
    if verdict.passed:
        return verdict
    where, least = (double, DOUBLE) if double else (result, limit)
    return replace(verdict, divergence=first_divergence(where.modules, least, case.name, pair.before, pair.after))


def _check(pair: Pair, subject: str, value: float, in_float64: float | None, limit: float, result: CaseResult) -> Check:
    name = titled(pair, f"{subject} · {result.case.name}")
    if value <= limit:
        return Check(name, True, value, limit, _agreement(result))
    if result.error:
        return Check(name, False, value, limit, f"the edited model does not run: {result.error}")
    detail = f"worst in {result.worst}; {_agreement(result)}"
    if in_float64 is None:
        return Check(name, False, value, limit, detail)
    is_rounding = pair.limits.is_rounding(value, in_float64, limit)
    verdict = "rounding" if is_rounding else "no rounding"
    return Check(name, is_rounding, value, limit, f"{show(in_float64)} in float64, so {verdict}; {detail}")


def _agreement(result: CaseResult) -> str:
    return f"{result.bit_equal} of {result.tensors} tensors bit-equal"


def titled(pair: Pair, name: str) -> str:
    """The name of a check, led by whose weights it was made with."""
    return f"{pair.label}: {name}" if pair.label else name
