"""Tiny encoders, packed beside their untouched selves, and the masks that they are given."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import rewire
from rewire.encoders import packable
from rewire.modules.packed import LayerForward, OwnerForward, PackedStack
from rewire.plan import Pack, Plan
from rewire.proof.compare import compare_outputs, flatten
from rewire.zoo import tiny_model

ROWS, LENGTH = 4, 11


@dataclass
class Both:
    """A model with strong random weights, packed, and as it was: with eager attention, and with its own."""

    kind: str
    before: Any
    alike: Any
    after: Any
    receipt: rewire.Receipt | None
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def stacks(self) -> list[PackedStack]:
        """What the packed stacks share, with counts of how layers ran."""
        found = [vars(module).get("forward") for module in self.after.modules()]
        return [forward.stack for forward in found if isinstance(forward, OwnerForward)]

    @property
    def ways(self) -> set[str]:
        """How layers ran since `forget`."""
        return {path for stack in self.stacks for path in stack.paths}

    def forget(self) -> None:
        """Forgets how layers ran."""
        for stack in self.stacks:
            stack.paths.clear()

    def difference(self, mask: Tensor | None, **inputs: Any) -> float:
        """The largest difference of any output at real positions, relative to its scale."""
        with torch.no_grad():
            wanted = flatten(self.before(**copied(inputs)))
            given = flatten(self.after(**copied(inputs)))
        assert wanted.keys() == given.keys(), f"{sorted(wanted)} against {sorted(given)}"
        return max((one.real for one in compare_outputs(wanted, given, mask)), default=0.0)


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    """Tensors copied: some models write into what they are given."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def both(kind: str, model: nn.Module | None = None, **settings: Any) -> Both:
    """A tiny model of a type with every stack packed that can be."""
    after: Any = model if model is not None else tiny_model(kind)
    before, alike = copy.deepcopy(after), copy.deepcopy(after)
    if hasattr(before, "set_attn_implementation"):
        before.set_attn_implementation("eager")
    edits = [Pack(stack.path, optional=True, **settings) for stack in packable(after)]
    if not edits:
        return Both(kind, before, alike, after, None)
    receipt = rewire.apply_(after, Plan(edits))
    refused = {one.path: one.detail for one in receipt.decisions if one.outcome == "refused"}
    return Both(kind, before, alike, after, receipt, refused)


def token_ids(model: Any, rows: int = ROWS, length: int = LENGTH) -> Tensor:
    """Random token ids that stand for nothing special."""
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    high = min(getattr(config, "vocab_size", 60), 60)
    return torch.randint(5, high, (rows, length), generator=torch.Generator().manual_seed(3))


def padding_masks(rows: int = ROWS, length: int = LENGTH) -> Iterator[tuple[str, Tensor]]:
    """Which positions are real, bool `[rows, length]`, in every way that batches are padded."""
    whole = torch.ones(rows, length, dtype=torch.bool)
    yield "all ones", whole
    lengths = torch.tensor([length, length // 2, 1, length - 1])[:rows]
    right = torch.arange(length)[None, :] < lengths[:, None]
    yield "right", right
    yield "left", right.flip(1)
    holes = whole.clone()
    holes[1, 2:4], holes[2, 0], holes[-1, 5] = False, False, False
    yield "holes", holes
    empty = right.clone()
    empty[1] = False
    yield "an empty row", empty
    yield "no row as long as the width", right & (torch.arange(length) < length - 3)


def mask_forms(keep: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A mask in every form that Transformers takes."""
    rows, length = keep.shape
    square = keep[:, None, None, :].expand(rows, 1, length, length)
    yield "integers", keep.long()
    yield "bool", keep
    yield "float", keep.float()
    yield "4-D bool", square.contiguous()
    yield "4-D added", torch.zeros(square.shape).masked_fill(~square, torch.finfo(torch.float32).min)


class Outputs:
    """What the last layer of every packed stack gives, while inside: one tensor per call, gradients and all."""

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        self.seen: list[Tensor] = []
        self._handles = [model.get_submodule(path).register_forward_hook(self._note) for path in paths]

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen.append(output[0] if isinstance(output, tuple) else output)

    def __enter__(self) -> list[Tensor]:
        return self.seen

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def last_layers(packed: Both) -> list[str]:
    """The path of the last layer of every packed stack."""
    return [
        stack.layers[-1]
        for stack in packable(packed.before)
        if isinstance(vars(packed.after.get_submodule(stack.layers[-1])).get("forward"), LayerForward)
    ]


def compare_layers(
    packed: Both, inputs: dict[str, Any], mask: Tensor | None = None, seed: int = 0
) -> tuple[float, float] | None:
    """Runs both models; the largest differences of what the last layers give, and of the gradients that these give.

    Outputs are compared without and with gradients, where `mask` is true if it has their shape, else where the packed
    model gives anything but zeros; relative to their scale. Gradients of each parameter are relative to its largest.
    None if no packed stack was called.
    """
    with torch.no_grad():
        wanted, given = (_last_outputs(packed, model, inputs, seed) for model in (packed.alike, packed.after))
        worst = _apart(wanted, given, mask)[0]
    wanted, given = (_last_outputs(packed, model, inputs, seed) for model in (packed.alike, packed.after))
    if not wanted:
        return None
    again, losses = _apart(wanted, given, mask, seed)
    worst = max(worst, again)
    assert losses[0].requires_grad == losses[1].requires_grad
    if not losses[0].requires_grad:  # the model runs this part without
        return worst, 0.0
    return worst, _gradients_apart(packed, losses)


def _last_outputs(packed: Both, model: Any, inputs: dict[str, Any], seed: int) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    with Outputs(model, last_layers(packed)) as seen:
        model(**copied(inputs))
    return seen


def _apart(
    wanted: list[Tensor], given: list[Tensor], mask: Tensor | None, seed: int = 0
) -> tuple[float, tuple[Tensor, Tensor]]:
    """The largest difference at real positions, and a loss of each side there."""
    worst, totals = 0.0, (torch.zeros(()), torch.zeros(()))
    for one, other in zip(wanted, given, strict=True):
        fits = mask is not None and mask.shape == other.shape[:2]
        real = mask if fits else (other.detach() != 0).any(dim=-1)
        assert real is not None
        assert real.any()
        scale = one[real].detach().abs().max()
        worst = max(worst, float((one[real] - other[real]).detach().abs().max() / scale))
        weight = torch.randn(other.shape[-1], generator=torch.Generator().manual_seed(seed))
        totals = (totals[0] + (one[real] * weight).sum() / scale, totals[1] + (other[real] * weight).sum() / scale)
    return worst, totals


def _gradients_apart(packed: Both, losses: tuple[Tensor, Tensor]) -> float:
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    wanted, given = (
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for model in (packed.alike, packed.after)
    )
    assert wanted.keys() == given.keys()
    top = max(float(grad.abs().max()) for grad in wanted.values())
    floor = 1e-3 * top  # what is next to nothing everywhere has no scale of its own
    return max(float((g - given[n]).abs().max()) / max(float(g.abs().max()), floor) for n, g in wanted.items())
