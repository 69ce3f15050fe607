"""Forward passes of edited models against the untouched one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import rewire
from rewire.plan import Edit
from suite import subjects
from suite.results import Result, Verdict, results
from suite.timing import Effort, Variant, interleave

GROUP = "forward"
UNTOUCHED, CONTROL, SPLIT, JOIN, REVERTED = (
    "untouched",
    "untouched, a copy",
    "after Split",
    "after Join",
    "after revert_",
)
AIMS = {SPLIT: 1.03, JOIN: 1.00, REVERTED: 1.00}
NEAR = 1e-5

Call = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Case:
    """A model, an edit, and what is called.

    Attributes:
        name: what is measured.
        make: makes the model.
        edit: what is done to it.
        call: what is timed, given a model; returns the tensor to compare.
        seconds: time of a full run.
        least: rounds at least.
        copies: whether an untouched copy is measured too, which shows how far two equal models lie apart.
        in_quick: whether a quick run has it.
        prepare: called with the model before each call, outside the time.
        aims: largest ratios wished for.
    """

    name: str
    make: Callable[[], Any]
    edit: Edit
    call: Call
    seconds: float = 20
    least: int = 5
    copies: bool = True
    in_quick: bool = True
    prepare: Callable[[Any], object] = lambda model: None
    aims: dict[str, float] = field(default_factory=lambda: dict(AIMS))


def run(effort: Effort) -> Iterator[Result]:
    for case in cases():
        if case.in_quick or not effort.quick:
            yield from _run(case, effort)


def cases() -> Iterator[Case]:
    yield Case(
        "SAM vision encoder, 1024²", subjects.sam, subjects.SAM_SPLIT, partial(embed, side=1024),
        seconds=75, least=3, copies=False, in_quick=False,
    )  # fmt: skip
    yield Case("SAM vision encoder, 256²", partial(subjects.sam, 256), subjects.SAM_SPLIT, partial(embed, side=256))
    for batch, length in ((8, 128), (32, 64)):
        name = f"MiniLM, {batch} × {length} tokens"
        yield Case(name, subjects.minilm, subjects.BERT_JOIN, partial(encode, batch=batch, length=length))
    yield Case("BERT-base, 8 × 128 tokens", subjects.bert, subjects.BERT_JOIN, partial(encode, batch=8, length=128))
    step = Decoding()
    yield Case(
        "GPT-2, one token after 128", subjects.gpt2, subjects.GPT2_SPLIT, step, seconds=12, prepare=step.remember
    )
    yield Case("MiniLM, 8 × 64 tokens, forward and backward", subjects.minilm, subjects.BERT_JOIN, train_step, aims={})


def _run(case: Case, effort: Effort) -> Iterator[Result]:
    untouched = case.make()
    models = {UNTOUCHED: untouched} | ({CONTROL: copy.deepcopy(untouched)} if case.copies else {})
    edited = SPLIT if case.edit.kind == "split" else JOIN
    models |= {edited: copy.deepcopy(untouched), REVERTED: copy.deepcopy(untouched)}
    for name in (edited, REVERTED):
        rewire.apply_(models[name], case.edit, hashes=False)
    rewire.revert_(models[REVERTED])
    variants = [
        Variant(name, partial(case.call, model), partial(case.prepare, model)) for name, model in models.items()
    ]
    samples = interleave(variants, effort.seconds(case.seconds), least=case.least)
    verdicts = {name: _judge(case, untouched, model, name) for name, model in models.items() if name != UNTOUCHED}
    operations = _operations(case, untouched)
    notes = {
        name: {"speed": f"{operations / sorted(numbers)[len(numbers) // 2] / 1e9:.0f} GFLOP/s"}
        for name, numbers in samples.items()
    }
    yield from results(GROUP, case.name, samples, aims=case.aims, verdicts=verdicts, notes=notes)


def _judge(case: Case, untouched: Any, model: Any, name: str) -> Verdict:
    wanted, found = (_called(case, one) for one in (untouched, model))
    difference = float((wanted - found).abs().max() / wanted.abs().max())
    limit = NEAR if name in (SPLIT, JOIN) else 0.0
    return Verdict(f"largest relative difference {difference:.1e}", difference <= limit)


def _called(case: Case, model: Any) -> Tensor:
    case.prepare(model)
    return case.call(model)


def _operations(case: Case, model: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        _called(case, model)
    total: int = counter.get_total_flops()
    return total


# ---------------------------------------------------------------- what is called


def embed(model: Any, side: int) -> Tensor:
    """Image embeddings of noise."""
    with torch.no_grad():
        found: Tensor = model.get_image_embeddings(_noise(side))
    return found


def _noise(side: int) -> Tensor:
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def encode(model: Any, batch: int, length: int) -> Tensor:
    """Hidden states of random tokens."""
    with torch.no_grad():
        found: Tensor = model(input_ids=subjects.tokens(batch, length)).last_hidden_state
    return found


def train_step(model: Any) -> Tensor:
    """Forward and backward; returns the hidden states."""
    states: Tensor = model(input_ids=subjects.tokens(8, 64)).last_hidden_state
    model.zero_grad()
    states.square().mean().backward()
    return states.detach()


class Decoding:
    """One step of writing: a token after 128 others, whose keys and values are remembered."""

    def __init__(self, past: int = 128) -> None:
        self.past = past
        self.caches: dict[int, Any] = {}

    def __call__(self, model: Any) -> Tensor:
        with torch.no_grad():
            output = model(input_ids=subjects.tokens(1, 1), past_key_values=self.caches[id(model)])
        found: Tensor = output.last_hidden_state
        return found

    def remember(self, model: Any) -> None:
        """Has the cache hold the past and nothing more."""
        if id(model) not in self.caches:
            with torch.no_grad():
                self.caches[id(model)] = model(input_ids=subjects.tokens(1, self.past), use_cache=True).past_key_values
        surplus = self.caches[id(model)].get_seq_length() - self.past
        if surplus:
            self.caches[id(model)].crop(-surplus)
