"""Throughput of encoders: real tokens per second, by batch size and share of padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from rewire.measure.bench.agreement import check_outputs
from rewire.measure.bench.bench import Bench
from rewire.measure.bench.records import Label
from rewire.measure.bench.suites.base import Case, Omitted, Suite, Work
from rewire.measure.bench.suites.inputs import (
    check_cases,
    forwards,
    lengths_for,
    on_device,
    padded,
    sized,
    takes_texts,
)
from rewire.measure.bench.timing import Trial, Watch
from rewire.proof.cases import Case as Input
from rewire.proof.facts import Facts

TOKENS = 128
BATCHES = (1, 8, 32)


def _unfit(bench: Bench) -> str | None:
    if Facts.of(bench.model()).continues:
        return f"{type(bench.model()).__name__} is a decoder; decode measures those"
    return None


def _check(bench: Bench) -> Sequence[dict[str, Any]]:
    model, seed = bench.model(), bench.settings.seed
    uneven = [padded(model, lengths_for(3, 17, 0.5), seed)] if _pads(model) else []
    return [check_outputs(bench, "encode", [*check_cases(bench), *uneven])]


def _cases(bench: Bench) -> Sequence[Case | Omitted]:
    batches = bench.batches(BATCHES)
    if not takes_texts(bench.model()):
        return [_plain(bench, batch) for batch in batches]
    found: list[Case | Omitted] = []
    for batch in batches:
        for share in dict.fromkeys(bench.settings.padding):
            if share and batch == 1:
                continue  # one text is never padded
            if share and not _pads(bench.model()):
                found.append(Omitted(f"padding {share}", "the model takes no attention_mask"))
            else:
                found.append(_texts(bench, batch, share))
    return found


def _pads(model: nn.Module) -> bool:
    return takes_texts(model) and "attention_mask" in Facts.of(model).accepts


def _texts(bench: Bench, batch: int, share: float) -> Case:
    model, tokens, seed = bench.model(), bench.tokens(TOKENS), bench.settings.seed
    case = padded(model, lengths_for(batch, tokens, share), seed) if share else sized(model, batch, tokens, seed)
    real = int(case.mask.sum()) if case.mask is not None else batch * tokens
    return _case(bench, case, Work("real tokens", real), {"batch": batch, "padding": share, "tokens": tokens})


def _plain(bench: Bench, batch: int) -> Case:
    """Images, sounds, and texts with these in them: inputs are counted, not tokens."""
    case = sized(bench.model(), batch, bench.tokens(TOKENS), bench.settings.seed)
    return _case(bench, case, Work("inputs", batch), {"batch": batch})


def _case(bench: Bench, case: Input, work: Work, labels: dict[str, Label]) -> Case:
    return Case({"forward": work}, {side: _trial(bench.model(side), case) for side in bench.sides}, labels)


def _trial(model: nn.Module, case: Input) -> Trial:
    run = forwards(model, on_device(model, case))

    def trial(watch: Watch) -> None:
        with watch.phase("forward", model):
            run()

    return trial


SUITE = Suite("encode", "real tokens per second by batch size and padding", _unfit, _check, _cases)
