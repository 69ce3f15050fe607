"""Generating text: time to the first token, per token, and for all of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewire import hf_seam
from rewire.errors import MeasureError
from rewire.measure.bench.agreement import check_outputs
from rewire.measure.bench.bench import Bench
from rewire.measure.bench.records import Label
from rewire.measure.bench.suites.base import Case, Omitted, Suite, Work
from rewire.measure.bench.suites.decode_check import check_compiled, check_tokens
from rewire.measure.bench.suites.inputs import check_cases, check_length, prompts
from rewire.measure.bench.timing import Trial, Watch
from rewire.proof.facts import Facts

TOKENS = 32
BATCHES = (1,)


def _unfit(bench: Bench) -> str | None:
    facts = Facts.of(bench.model())
    if facts.continues:
        return None
    name = type(bench.model()).__name__
    return f"{name} generates no text from a cache of keys and values (config:TYPE does with --task causal-lm)"


def _check(bench: Bench) -> Sequence[dict[str, Any]]:
    tokens = bench.tokens(TOKENS)
    check_length(Facts.of(bench.model()), bench.settings.prompt + tokens)
    _check_backend(bench.settings.backend)
    outputs = check_outputs(bench, "decode", check_cases(bench))
    ids = prompts(bench.model(), max(bench.batches(BATCHES)), bench.settings.prompt, bench.settings.seed)
    return [outputs, *check_tokens(bench, ids, tokens)]


def _cases(bench: Bench) -> Sequence[Case | Omitted]:
    return [case for batch in bench.batches(BATCHES) for case in _of_batch(bench, batch)]


@dataclass(frozen=True)
class _Job:
    """What is generated: `tokens` after each row of `ids` `[batch, prompt]`."""

    ids: Tensor
    tokens: int
    labels: dict[str, Label]

    @property
    def batch(self) -> int:
        return len(self.ids)


def _of_batch(bench: Bench, batch: int) -> list[Case | Omitted]:
    prompt, tokens = bench.settings.prompt, bench.tokens(TOKENS)
    ids = prompts(bench.model(), batch, prompt, bench.settings.seed)
    job = _Job(ids, tokens, {"batch": batch, "prompt": prompt, "tokens": tokens})
    eager = [
        _case(bench, job, "first token", Work("tokens", batch), _first_token),
        _case(bench, job, "token", Work("tokens", batch, tokens), _token),
        _case(bench, job, "generate, dynamic cache", Work("tokens", batch * tokens), _generate(None)),
    ]
    unable = [type(bench.model(s)).__name__ for s in bench.sides if not hf_seam.takes_static_cache(bench.model(s))]
    if unable:
        return [*eager, Omitted("static cache", f"{unable[0]} takes no static cache, so it cannot be compiled either")]
    static = _case(bench, job, "generate, static cache", Work("tokens", batch * tokens), _generate("static"))
    if bench.settings.backend is None:
        return [*eager, static, Omitted("token, compiled", "not asked for")]
    return [*eager, static, *_compiled(bench, job, bench.settings.backend)]


Make = Callable[[nn.Module, _Job, str], Trial]
"""Makes the trial of a phase for a model."""


def _case(bench: Bench, job: _Job, phase: str, work: Work, make: Make) -> Case:
    return Case({phase: work}, {side: make(bench.model(side), job, phase) for side in bench.sides}, job.labels)


def _first_token(model: nn.Module, job: _Job, phase: str) -> Trial:
    """From the prompt to the first token, with the cache that the next ones need."""

    def trial(watch: Watch) -> None:
        with torch.inference_mode(), watch.phase(phase, model):
            next_token(model(input_ids=job.ids, use_cache=True))

    return trial


def _token(model: nn.Module, job: _Job, phase: str) -> Trial:
    """All tokens after the first, one after the other."""

    def trial(watch: Watch) -> None:
        with torch.inference_mode():
            outputs = model(input_ids=job.ids, use_cache=True)
            cache, token = outputs.past_key_values, next_token(outputs)
            with watch.phase(phase, model):
                for _ in range(job.tokens):
                    token = next_token(model(input_ids=token, past_key_values=cache, use_cache=True))

    return trial


def _generate(cache: str | None) -> Make:
    def make(model: nn.Module, job: _Job, phase: str) -> Trial:
        def trial(watch: Watch) -> None:
            with watch.phase(phase, model):
                hf_seam.generate_greedily(model, job.ids, job.tokens, cache)

        return trial

    return make


def next_token(outputs: Any) -> Tensor:
    """The likeliest next token of each row, `[batch, 1]`."""
    return outputs.logits[:, -1:].argmax(-1)  # type: ignore[no-any-return]


# ---------------------------------------------------------------- compiled


class _Compiled:
    """A step of decoding over a static cache, compiled when it is first run."""

    def __init__(self, model: nn.Module, job: _Job, backend: str) -> None:
        self.model, self.job, self.backend = model, job, backend
        self.cache = hf_seam.static_cache(model, job.ids.shape[1] + job.tokens + 1)
        self.step = torch.compile(self.eager, backend=backend)

    def eager(self, token: Tensor) -> Tensor:
        """The logits after one more token `[batch, 1]`."""
        outputs = self.model(input_ids=token, past_key_values=self.cache, use_cache=True)
        return outputs.logits[:, -1:]  # type: ignore[no-any-return]

    def prefill(self) -> Tensor:
        """Fills the cache with the prompt; the next token."""
        self.cache.reset()
        return next_token(self.model(input_ids=self.job.ids, past_key_values=self.cache, use_cache=True))

    def compile(self, phase: str) -> Trial:
        """Compiles, and checks what the result gives."""

        def trial(watch: Watch) -> None:
            _start_compiler(self.backend)
            with torch.no_grad(), _compiling_anew():
                token = self.prefill()
                with watch.phase(phase, self.model):
                    compiled = self.step(token)
                self.prefill()
                check_compiled(self.model, self.eager(token), compiled)

        return trial

    def tokens(self, phase: str) -> Trial:
        """All tokens after the first, one after the other."""

        def trial(watch: Watch) -> None:
            with torch.no_grad():
                token = self.prefill()
                with watch.phase(phase, self.model):
                    for _ in range(self.job.tokens):
                        token = self.step(token).argmax(-1)

        return trial


def _check_backend(name: str | None) -> None:
    known = torch.compiler.list_backends(()) if name is not None else []
    if name is not None and name not in known:
        raise MeasureError(f"torch.compile has no backend {name!r}; there are {', '.join(known)}, and none for none")


@contextmanager
def _compiling_anew() -> Iterator[None]:
    """Nothing that was compiled before, for the other side or on another day, is used again."""
    from torch._inductor import config

    with config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")  # as it should be
        yield


def _start_compiler(backend: str) -> None:
    """Compiles next to nothing: what the compiler does once per process is not charged to the first model."""
    torch.compile(torch.neg, backend=backend)(torch.ones(1))


def _compiled(bench: Bench, job: _Job, backend: str) -> list[Case | Omitted]:
    steps = {side: _Compiled(bench.model(side), job, backend) for side in bench.sides}
    compiling, token = "compile (and its first token)", "token, compiled"
    return [
        Case({compiling: Work()}, {s: step.compile(compiling) for s, step in steps.items()}, job.labels, once=True),
        Case(
            {token: Work("tokens", job.batch, job.tokens)},
            {side: step.tokens(token) for side, step in steps.items()},
            job.labels,
        ),
    ]


SUITE = Suite("decode", "first token, per token (eager and compiled), generate", _unfit, _check, _cases)
