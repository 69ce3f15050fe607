"""`prove`: everything put together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rewire.errors import ProofError
from rewire.proof.cases import Case, as_cases
from rewire.proof.checks import (
    all_names,
    edited_names,
    gradient_cases,
    gradient_check,
    is_costly,
    listed,
    sensitivity_check,
    weight_checks,
)
from rewire.proof.divergence import Divergence, summarise
from rewire.proof.execution import placement
from rewire.proof.guard import untouched
from rewire.proof.idle import with_idle
from rewire.proof.inputs import cases_for
from rewire.proof.meaning import meaning_check
from rewire.proof.outputs import judge_cases
from rewire.proof.pair import CaseResult, Pair, in_single, largest_difference
from rewire.proof.report import Check, Proof, environment_of
from rewire.proof.strength import Reaction, insensitive, measure_reactions
from rewire.proof.strong import strong_pair
from rewire.proof.tolerances import Promise, Tolerances, check_promise, coarsest_dtype
from rewire.receipts import receipt_of
from rewire.tensor_rules import Rule, Step

Progress = Callable[[str, int, int], None]
"""Called with what is about to be done, how many steps are done, and how many there are."""

OTHER_STEPS = 5
"""Steps of a proof besides its cases: weights, float32, gradients, sensitivity, strong weights."""

FEW = 4
"""Inputs used with strong weights, and with half-precision weights in float32."""


def prove(
    before: nn.Module,
    after: nn.Module,
    *,
    rules: Sequence[Step] | None = None,
    promise: str | None = None,
    inputs: Iterable[Case | Mapping[str, Any]] | Case | Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0, 1),
    gradients: bool = True,
    round_trip: bool = True,
    dtype_tolerances: Mapping[torch.dtype | str, float] | None = None,
    progress: Progress | None = None,
) -> Proof:
    """Compares an edited model with the untouched one and says whether the edit is right.

    Looked at are, in this order: the weights (what the rules make of them, and back again, bit for bit);
    every tensor of the outputs, over inputs of several lengths, batches and padding patterns; the gradients
    of every parameter, led through the rules; and whether the outputs react to the edited tensors at all, for
    otherwise their agreement would show nothing. If they do not, all of it is repeated with strong random
    weights.

    `rules` lead from the tensors of `before` to those of `after`. They and `promise` default to the receipt
    of `after`; without one, tensors are compared by name and the promise is `exact`. `inputs` are mappings of
    keyword arguments for forward; made from the model unless given. `dtype_tolerances` replaces the tolerance
    for outputs of models in a data type (`{"bfloat16": 0.1}`); differences are relative to the largest value
    of a tensor.

    Neither model is changed: both are in evaluation mode meanwhile, and every flag, hook, `.grad` and random
    state is as before when `prove` returns or raises. Time and memory: two forwards per input and two
    backwards, and deep copies of both models where float64 or strong weights are needed.

    A proof that fails is a result, not an error. Raises `ProofError` when no proof can be made: `before` and
    `after` are the same object, no input fits `before`, or an argument is malformed.

    >>> import copy
    >>> before = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> after = copy.deepcopy(before)
    >>> prove(before, after, inputs={"input": torch.randn(3, 4)}).passed
    True
    >>> with torch.no_grad():
    ...     _ = after[2].bias.add_(0.1)
    >>> proof = prove(before, after, inputs={"input": torch.randn(3, 4)})
    >>> proof.passed, proof.first_divergence.path
    (False, '2')
    """
    started = time.perf_counter()
    if before is after:
        raise ProofError("before and after are the same object; edit a copy: copy.deepcopy(model)")
    agreed = _agreement(after, rules, promise)
    limits = Tolerances(agreed.promise, coarsest_dtype([before, after]), dtype_tolerances or {})
    with untouched(before, after):
        cases = cases_for(before, seeds) if inputs is None else as_cases(inputs)
        work = _Work(Pair(before, after, agreed.rules, limits), cases, _Ticker(progress, len(cases) + OTHER_STEPS))
        work.judge_weights(agreed.by_name, round_trip)
        work.judge_names()
        work.judge_outputs()
        work.judge_in_single()
        if gradients:
            work.judge_gradients()
        if work.is_good and math.isfinite(limits.outputs):
            work.judge_sensitivity(gradients)
    return work.proof(time.perf_counter() - started)


@dataclass(frozen=True)
class _Agreement:
    """Rules and promise; `by_name` when nobody stated rules."""

    rules: Rule
    promise: Promise
    by_name: bool


def _agreement(after: nn.Module, rules: Sequence[Step] | None, promise: str | None) -> _Agreement:
    receipt = receipt_of(after) if rules is None or promise is None else None
    if rules is None and receipt is not None:
        rules = receipt.rules
    if promise is None:
        promise = receipt.promise if receipt is not None else "exact"
    return _Agreement(tuple(rules or ()), check_promise(promise), rules is None)


class _Ticker:
    """Counts the steps of a proof for whoever watches."""

    def __init__(self, callback: Progress | None, total: int) -> None:
        self.callback = callback
        self.total = total
        self.done = 0

    def __call__(self, text: str) -> None:
        if self.callback is not None:
            self.callback(text, self.done, self.total)
        self.done += 1


@dataclass
class _Work:
    """A proof in the making. Each `judge_…` adds checks."""

    pair: Pair
    cases: tuple[Case, ...]
    tick: _Ticker
    checks: list[Check] = field(default_factory=list)
    results: list[CaseResult] = field(default_factory=list)
    divergence: Divergence | None = None

    @property
    def is_good(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def usable(self) -> tuple[Case, ...]:
        """The cases that the untouched model takes."""
        return tuple(result.case for result in self.results if not result.skipped)

    def judge_weights(self, by_name: bool, round_trip: bool) -> None:
        self.tick("weights")
        self.checks += weight_checks(self.pair, by_name, round_trip)

    def judge_names(self) -> None:
        check = meaning_check(self.pair)
        self.checks += [check] if check else []

    def judge_outputs(self) -> None:
        self.results = self._compare(self.pair, self._announced(self.cases))
        if not self.usable:
            raise ProofError(_nothing_ran(self.pair, self.results))

    def judge_in_single(self) -> None:
        """Half precision hides what is smaller than its rounding; the same weights in float32 do not."""
        if not math.isfinite(self.pair.limits.outputs):
            return
        try:
            single = in_single(self.pair)
        except ProofError as error:
            self.checks.append(Check("float32", True, math.inf, math.inf, f"not compared: {error}"))
            return
        if single is not None:
            self.tick("float32")
            self._compare(single, self._few())

    def judge_gradients(self) -> None:
        self.tick("gradients")
        self.checks += [gradient_check(self.pair, case) for case in gradient_cases(self.pair, self.usable)]

    def judge_sensitivity(self, gradients: bool) -> None:
        self.tick("sensitivity")
        case = next((case for case in self.usable if not case.is_padded), self.usable[0])
        edited = edited_names(self.pair)
        names = edited or all_names(self.pair, case)
        if not names:
            reason = "not measured: no tensor is known to be edited, and disturbing every kind takes too long here"
            self.checks.append(Check("sensitivity", True, math.inf, math.inf, reason))
            return
        own = self._reactions(self.pair, names, case)
        weak = insensitive(own, self.pair.limits.reaction)
        if weak:
            self.tick("strong weights")
            self._judge_strong(case, names, weak, bool(edited), gradients)
        else:
            self.checks.append(sensitivity_check(self.pair, own, bool(edited)))

    def _judge_strong(
        self, case: Case, names: Sequence[str], weak: Sequence[Reaction], is_required: bool, gradients: bool
    ) -> None:
        """Everything again, with weights under which every tensor matters."""
        why = f"; the model's own weights hardly let them react to {listed(weak)}"
        try:
            strong = strong_pair(self.pair, case)
        except ProofError as error:
            self.checks.append(sensitivity_check(self.pair, weak, is_required, f"{why}; {error}"))
            return
        chosen = [result.case for result in self._compare(strong, self._few()) if not result.skipped]
        if gradients and chosen:
            self.checks += [gradient_check(strong, one) for one in gradient_cases(strong, chosen)]
        if self.is_good:
            self.checks.append(sensitivity_check(strong, self._reactions(strong, names, case), is_required, why))

    def _few(self) -> list[Case]:
        """The cases of the first seed, at most `FEW`."""
        return [one for one in self.usable if one.seed == self.usable[0].seed][:FEW]

    def _compare(self, pair: Pair, cases: Iterable[Case]) -> list[CaseResult]:
        results = []
        for verdict in judge_cases(pair, cases):
            results.append(verdict.result)
            self.checks += verdict.checks
            self.divergence = self.divergence or verdict.divergence
        return results

    def _reactions(self, pair: Pair, names: Sequence[str], case: Case) -> tuple[Reaction, ...]:
        found = measure_reactions(pair.after, names, case, pair.limits.reaction, by_module=is_costly(pair, case))
        return with_idle(pair, found, case)

    def _announced(self, cases: Iterable[Case]) -> Iterator[Case]:
        for case in cases:
            self.tick(case.name)
            yield case

    def proof(self, seconds: float) -> Proof:
        pair = self.pair
        return Proof(
            model=type(pair.before).__name__,
            promise=pair.limits.promise,
            checks=tuple(self.checks),
            max_difference=largest_difference(self.results),
            first_divergence=self.divergence,
            cases=tuple(case.name for case in self.usable),
            skipped=tuple(f"{result.case.name}: {result.error}" for result in self.results if result.skipped),
            module_differences=summarise([result.modules for result in self.results], pair.before),
            seconds=seconds,
            environment=environment_of(placement(pair.before)[0]),
        )


def _nothing_ran(pair: Pair, results: Iterable[CaseResult]) -> str:
    tried = "\n".join(f"  {result.case.name}: {result.error}" for result in results)
    return (
        f"no input runs on the untouched {type(pair.before).__name__}; "
        f"pass inputs=[{{...}}] with keyword arguments for its forward. What was tried:\n{tried}"
    )
