"""What was measured, turned into checks: limits applied, and said in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from rewire.proof.cases import Case
from rewire.proof.facts import Facts
from rewire.proof.gradients import GradientReport, compare_gradients, compare_in_double
from rewire.proof.inputs import BUDGET, cost
from rewire.proof.names import align, count_by_kind, shorten
from rewire.proof.outputs import titled
from rewire.proof.pair import Pair
from rewire.proof.report import Check, show
from rewire.proof.strength import Reaction, insensitive, weakest
from rewire.proof.weights import WeightReport, check_forward, check_round_trip, parameters_of, touched

COSTLY = 1e11
"""Multiplications and additions of a forward above which fewer of them are run."""


def weight_checks(pair: Pair, by_name: bool, round_trip: bool) -> list[Check]:
    """The weights against what the rules say, and the way back. `by_name`: nobody stated rules, so tensors
    that one side lacks are reported, not held against the edit.
    """
    checks = [_weight_check(pair, "weights", check_forward(pair.before, pair.after, pair.rules), by_name)]
    if round_trip and pair.rules:
        checks.append(_weight_check(pair, "round trip", check_round_trip(pair.before, pair.after, pair.rules), False))
    return checks


def _weight_check(pair: Pair, name: str, report: WeightReport, by_name: bool) -> Check:
    promise = pair.limits.promise
    limit = pair.limits.outputs if promise in ("rounding", "lossy") else 0.0
    is_complete = not report.error and (by_name or not report.missing)
    is_near = not report.differing if limit == 0 else report.value <= limit
    return Check(name, is_complete and is_near, report.value, limit, report.describe())


def gradient_cases(pair: Pair, cases: Sequence[Case]) -> tuple[Case, ...]:
    """One case without padding and one with, but none that starts with padding: nothing is attended to there,
    and some models give gradients that are not numbers. One case alone where a forward is costly.
    """
    plain = [case for case in cases if not case.is_padded]
    padded = [case for case in cases if case.is_padded and case.mask is not None and bool(case.mask[:, 0].all())]
    chosen = (*plain[:1], *padded[:1]) or tuple(cases[:1])
    return chosen[:1] if is_costly(pair, chosen[0]) else chosen


def is_costly(pair: Pair, case: Case) -> bool:
    """Whether one forward on `case` takes seconds rather than a fraction of one."""
    return case_cost(pair, case) > COSTLY


def case_cost(pair: Pair, case: Case) -> float:
    """Multiplications and additions of one forward of the untouched model, roughly."""
    tensors = {name: value for name, value in case.kwargs.items() if isinstance(value, Tensor)}
    return cost(Facts.of(pair.before), Case(case.name, tensors))


def gradient_check(pair: Pair, case: Case) -> Check:
    """Gradients for one case, in float64 as well where the model's type is not enough."""
    name = titled(pair, f"gradients · {case.name}")
    limit = pair.limits.gradients
    report = compare_gradients(pair, case)
    if report.error:
        return Check(name, math.isinf(limit), math.inf, limit, report.error)
    if report.largest <= limit:
        return Check(name, True, report.largest, limit, _describe_gradients(report))
    wrong = report.beyond(limit)
    double = compare_in_double(pair, case)
    detail = f"{len(wrong)} differ: {shorten(wrong)}; {_describe_gradients(report)}"
    if double is None:
        return Check(name, False, report.largest, limit, detail)
    is_rounding = pair.limits.is_rounding(report.largest, double.largest, limit)
    verdict = "rounding" if is_rounding else "no rounding"
    return Check(name, is_rounding, report.largest, limit, f"{show(double.largest)} in float64, so {verdict}; {detail}")


def _describe_gradients(report: GradientReport) -> str:
    texts = [f"{len(report.differences)} gradients compared"]
    if report.unused:
        texts.append(f"{report.unused} parameters unused in both models")
    if report.missing:
        texts.append(f"{len(report.missing)} without counterpart: {shorten(report.missing)}")
    if report.extra:
        texts.append(f"{len(report.extra)} additional parameters not compared: {shorten(report.extra)}")
    return ", ".join(texts)


def edited_names(pair: Pair) -> list[str]:
    """The floating parameters of the edited model that the rules made, or else those that the untouched one
    lacks.
    """
    present = [name for name, one in parameters_of(pair.after).items() if one.is_floating_point()]
    by_rule = list(align(touched(pair.rules), present).values())
    if by_rule or pair.limits.promise == "additive":
        return by_rule
    known = set(align(parameters_of(pair.before), present).values())
    return [name for name in present if name not in known]


def all_names(pair: Pair, case: Case) -> list[str]:
    """Every floating parameter that both models have, or none where trying them kind by kind would take too
    long.
    """
    present = [name for name, one in parameters_of(pair.after).items() if one.is_floating_point()]
    names = list(align(parameters_of(pair.before), present).values())
    return names if len(count_by_kind(names)) * case_cost(pair, case) <= BUDGET else []


def sensitivity_check(pair: Pair, reactions: Sequence[Reaction], is_required: bool, why: str = "") -> Check:
    """Whether the outputs react to every kind of edited tensor.

    With `is_required` False (no tensor is known to have been edited) kinds without reaction are only named.
    """
    limit = pair.limits.reaction
    dead = insensitive(reactions, limit)
    idle = [one.kind for one in reactions if one.is_idle]
    texts = [f"outputs react to {len(reactions) - len(dead) - len(idle)} of {len(reactions)} kinds of tensors"]
    if dead:
        texts.append(f"not to {listed(dead)}")
    if idle:
        texts.append(f"{shorten(idle)} without influence on any output, whatever the values")
    if dead and is_required:
        texts.append("so this proof is inconclusive: pass inputs= that reach these tensors")
    return Check(
        titled(pair, "sensitivity"),
        not (dead and is_required),
        weakest(reactions),
        limit,
        "; ".join(texts) + why,
        True,
    )


def listed(reactions: Iterable[Reaction]) -> str:
    """Kinds and movements, as `q.weight (1.0e-09), k.weight (0)`."""
    return shorten(f"{one.kind} ({show(one.movement)})" for one in reactions)
