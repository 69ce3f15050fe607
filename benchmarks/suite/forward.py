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
from rewire.plan import Edit, Plan
from suite import subjects
from suite.results import Result, Verdict, results
from suite.timing import Effort, Spread, Variant, interleave

GROUP = "forward"
UNTOUCHED, CONTROL, SPLIT, JOIN, UNSTACK, VIEWS, REVERTED = (
    "untouched",
    "untouched, a copy",
    "after Split",
    "after Join",
    "after Unstack",
    "after Unstack, views",
    "after revert_",
)
AIMS = {SPLIT: 1.03, JOIN: 1.00, VIEWS: 1.03, REVERTED: 1.00}
NEAR = 1e-5

Call = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Case:
    """A model, an edit, and what is called.

    Attributes:
        name: what is measured.
        make: makes the model.
        plan: what is done to it.
        edited: what the edited model is called.
        call: what is timed, given a model; returns the tensor to compare.
        seconds: time of a full run.
        least: rounds at least.
        copies: whether an untouched copy is measured too, which shows how far two equal models lie apart.
        in_quick: whether a quick run has it.
        prepare: called with the model before each call, outside the time.
        aims: largest ratios wished for.
        more: further plans to measure in the same run, by what their models are called.
    """

    name: str
    make: Callable[[], Any]
    plan: Edit | Plan
    edited: str
    call: Call
    seconds: float = 18
    least: int = 5
    copies: bool = True
    in_quick: bool = True
    prepare: Callable[[Any], object] = lambda model: None
    aims: dict[str, float] = field(default_factory=lambda: dict(AIMS))
    more: dict[str, Edit | Plan] = field(default_factory=dict)

    @property
    def plans(self) -> dict[str, Edit | Plan]:
        """What is done to the models, by what they are called."""
        return {self.edited: self.plan, REVERTED: self.plan, **self.more}


def run(effort: Effort) -> Iterator[Result]:
    for case in cases():
        if case.in_quick or not effort.quick:
            yield from _run(case, effort)


def cases() -> Iterator[Case]:
    yield Case(
        "SAM vision encoder, 1024²", subjects.sam, subjects.SAM_SPLIT, SPLIT, partial(embed, side=1024),
        seconds=70, least=3, copies=False, in_quick=False,
    )  # fmt: skip
    small = partial(subjects.sam, 256)
    yield Case("SAM vision encoder, 256²", small, subjects.SAM_SPLIT, SPLIT, partial(embed, side=256))
    yield _encoding("MiniLM", subjects.minilm, 8, 128)
    yield _encoding("MiniLM", subjects.minilm, 32, 64)
    yield _encoding("BERT-base", subjects.bert, 8, 128, seconds=25)
    yield _decoding("GPT-2", subjects.gpt2, subjects.GPT2_SPLIT, SPLIT)
    yield _decoding("Llama of GPT-2's size", subjects.small_llama, subjects.LLAMA_JOIN, JOIN)
    yield _mixture("Mixtral of 4 layers, 8 × 32 tokens", partial(encode, batch=8, length=32))
    step = Decoding()
    yield _mixture(f"Mixtral of 4 layers, one token after {step.past}", step, step.remember)
    name = "MiniLM, 8 × 64 tokens, forward and backward"
    yield Case(name, subjects.minilm, subjects.BERT_JOIN, JOIN, train_step, aims={})


def _encoding(name: str, make: Callable[[], Any], batch: int, length: int, seconds: float = 18) -> Case:
    call = partial(encode, batch=batch, length=length)
    return Case(f"{name}, {batch} × {length} tokens", make, subjects.BERT_JOIN, JOIN, call, seconds)


def _mixture(name: str, call: Call, prepare: Callable[[Any], object] = lambda model: None) -> Case:
    """Experts stacked, apart, and apart as views of the stacked tensors."""
    views = {VIEWS: subjects.MIXTRAL_VIEWS}
    return Case(
        name, subjects.small_mixtral, subjects.MIXTRAL_UNSTACK, UNSTACK, call, seconds=12, prepare=prepare, more=views
    )


def _decoding(name: str, make: Callable[[], Any], plan: Edit | Plan, edited: str) -> Case:
    step = Decoding()
    title = f"{name}, one token after {step.past}"
    return Case(title, make, plan, edited, step, seconds=12, prepare=step.remember)


def _run(case: Case, effort: Effort) -> Iterator[Result]:
    untouched = case.make()
    models = {UNTOUCHED: untouched} | ({CONTROL: copy.deepcopy(untouched)} if case.copies else {})
    models |= {name: copy.deepcopy(untouched) for name in case.plans}
    for name, plan in case.plans.items():
        rewire.apply_(models[name], plan, hashes=False)
    rewire.revert_(models[REVERTED])
    wanted, operations = _counted(case, untouched)
    verdicts = {name: _judge(case, wanted, model, name) for name, model in models.items() if name != UNTOUCHED}
    variants = [
        Variant(name, partial(case.call, model), partial(case.prepare, model)) for name, model in models.items()
    ]
    samples = interleave(variants, effort.seconds(case.seconds), least=case.least, warm_up=False)
    notes = {
        name: {"speed": f"{operations / Spread.of(numbers).median / 1e9:.0f} GFLOP/s"}
        for name, numbers in samples.items()
    }
    yield from results(GROUP, case.name, samples, aims=case.aims, verdicts=verdicts, notes=notes)


def _counted(case: Case, model: Any) -> tuple[Tensor, int]:
    """What the untouched model gives, and how many additions and multiplications that takes."""
    case.prepare(model)
    with FlopCounterMode(display=False) as counter:
        output = case.call(model)
    return output, counter.get_total_flops()


def _judge(case: Case, wanted: Tensor, model: Any, name: str) -> Verdict:
    case.prepare(model)
    difference = float((wanted - case.call(model)).abs().max() / wanted.abs().max())
    limit = NEAR if name in (SPLIT, JOIN, UNSTACK, VIEWS) else 0.0
    return Verdict(f"largest relative difference {difference:.1e}", difference <= limit)


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
