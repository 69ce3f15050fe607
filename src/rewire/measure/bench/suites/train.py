"""A step of training: forward, backward, optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewire.errors import MeasureError
from rewire.measure.bench.agreement import check_outputs
from rewire.measure.bench.bench import Bench
from rewire.measure.bench.suites.base import Case, Omitted, Suite, Work
from rewire.measure.bench.suites.inputs import check_cases, on_device, sized
from rewire.measure.bench.timing import Trial, Watch
from rewire.proof.cases import Case as Input
from rewire.proof.compare import flatten
from rewire.proof.facts import Facts

TOKENS = 128
BATCHES = (4,)


def _unfit(bench: Bench) -> str | None:
    for side in bench.sides:
        if not any(parameter.requires_grad for parameter in bench.model(side).parameters()):
            return f"nothing is trained: the model {side} the plan has no parameter that requires gradients"
    return None


def _check(bench: Bench) -> Sequence[dict[str, Any]]:
    return [check_outputs(bench, "train", check_cases(bench))]


def _cases(bench: Bench) -> Sequence[Case | Omitted]:
    return [_case(bench, batch) for batch in bench.batches(BATCHES)]


def _case(bench: Bench, batch: int) -> Case:
    tokens = bench.tokens(TOKENS)
    case = sized(bench.model(), batch, tokens, bench.settings.seed)
    is_text = "input_ids" in case.kwargs
    step = Work("tokens", batch * tokens) if is_text else Work("inputs", batch)
    labels = {"batch": batch, "tokens": tokens} if is_text else {"batch": batch}
    phases = {"forward": Work(), "backward": Work(), "optimizer": Work(), "step": step}
    return Case(phases, {side: _trial(bench.model(side), case) for side in bench.sides}, labels)


def _trial(model: nn.Module, case: Input) -> Trial:
    """Steps with a learning rate of zero: all the work of AdamW, and the weights stay for the next suite."""
    kwargs = on_device(model, case)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    is_causal = Facts.of(model).continues

    def parts(watch: Watch) -> None:
        with watch.phase("forward", model, optimizer):
            loss = _loss(model(**kwargs), kwargs, is_causal)
        with watch.phase("backward", model, optimizer):
            loss.backward()
        with watch.phase("optimizer", model, optimizer):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def trial(watch: Watch) -> None:
        model.train()
        try:
            parts(watch)
            with watch.phase("step", model, optimizer):
                _loss(model(**kwargs), kwargs, is_causal).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        finally:
            model.eval()

    return trial


def _loss(outputs: Any, kwargs: dict[str, Any], is_causal: bool) -> Tensor:
    """Cross entropy of the next token where there are logits for it, else the mean square of the main output."""
    logits = getattr(outputs, "logits", None)
    if is_causal and isinstance(logits, Tensor):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), kwargs["input_ids"][:, 1:].flatten())
    main = next((one for one in flatten(outputs).values() if one.is_floating_point() and one.requires_grad), None)
    if main is None:
        raise MeasureError("no output of the model has gradients, so it cannot be trained as it is")
    return main.float().square().mean()


SUITE = Suite("train", "a step of training: forward, backward, optimizer", _unfit, _check, _cases)
