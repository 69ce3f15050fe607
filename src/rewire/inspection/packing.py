"""What `Pack` could do with a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from rewire.encoder_trial import try_out
from rewire.encoders import EncoderStack, encoder_stacks
from rewire.inspection.record import EncoderReport
from rewire.linears import Refusal


def encoder_reports(model: nn.Module) -> tuple[EncoderReport, ...]:
    """Every stack of layers with attention in `model`, tried out on a small copy; `model` may be on meta.

    >>> encoder_reports(nn.Linear(2, 2))
    ()
    """
    return tuple(_reports(model))


def _reports(model: nn.Module) -> Iterator[EncoderReport]:
    for stack in encoder_stacks(model):
        if isinstance(stack, Refusal):
            module = type(model.get_submodule(stack.path).get_submodule("0")).__name__
            yield EncoderReport(stack.path, module, 0, refusal=stack.reason)
            continue
        yield _tried(model, stack)


def _tried(model: nn.Module, stack: EncoderStack) -> EncoderReport:
    tried = try_out(model, stack)
    if isinstance(tried, str):
        return EncoderReport(stack.path, stack.kind, len(stack.layers), refusal=tried)
    return EncoderReport(stack.path, stack.kind, len(stack.layers), how=tried.how)
