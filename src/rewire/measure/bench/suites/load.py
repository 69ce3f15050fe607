"""Loading a model, and its first two forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewire.measure.bench.agreement import check_outputs
from rewire.measure.bench.bench import Bench
from rewire.measure.bench.records import BEFORE
from rewire.measure.bench.suites.base import Case, Omitted, Suite, Work, fits_all
from rewire.measure.bench.suites.inputs import check_cases, forwards, on_device, sized
from rewire.measure.bench.timing import Trial, Watch
from rewire.proof.cases import Case as Input

TOKENS = 64


def _check(bench: Bench) -> Sequence[dict[str, Any]]:
    return [check_outputs(bench, "load", check_cases(bench))]


def _cases(bench: Bench) -> Sequence[Case | Omitted]:
    """One case: a forward is the first one only after loading. The models that were checked are let go before."""
    batch, tokens = bench.batches((1,))[0], bench.tokens(TOKENS)
    case = sized(bench.model(BEFORE), batch, tokens, bench.settings.seed)
    bench.release()
    phases = {"load": Work(), "first forward": Work(), "second forward": Work()}
    labels = {"batch": batch, "tokens": tokens} if "input_ids" in case.kwargs else {"batch": batch}
    return [Case(phases, {side: _trial(bench, side, case) for side in bench.sides}, labels)]


def _trial(bench: Bench, side: str, case: Input) -> Trial:
    def trial(watch: Watch) -> None:
        with watch.phase("load"):
            model = bench.open(side)
        run = forwards(model, on_device(model, case))
        for phase in ("first forward", "second forward"):
            with watch.phase(phase, model):
                run()

    return trial


SUITE = Suite("load", "loading, first and second forward", fits_all, _check, _cases)
