"""Whether two models generate the same text, as far as the plan promises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewire import hf_seam
from rewire.errors import MeasureError
from rewire.measure.bench.agreement import limits_of
from rewire.measure.bench.bench import Bench
from rewire.measure.bench.records import AFTER, BEFORE, checked
from rewire.proof.compare import relative_difference
from rewire.proof.tolerances import Tolerances, coarsest_dtype

_LONGER = 4.0
"""How many times as far apart logits may be after a whole text as after one forward: caches carry differences on."""


def check_tokens(bench: Bench, ids: Tensor, tokens: int) -> Sequence[dict[str, Any]]:
    """The record of a comparison of the texts that both models generate after `ids` `[batch, prompt]`.

    A token may be another one where the untouched model holds both for equally likely, within the promise of the plan;
    what follows then is not compared. Raises `MeasureError` for any other difference.
    """
    if AFTER not in bench.sides:
        return []
    texts = [hf_seam.generate_greedily(bench.model(side), ids, tokens) for side in (BEFORE, AFTER)]
    limits = limits_of(bench)
    limit = limits.outputs * _LONGER
    worst = 0.0
    for row, (left, right) in enumerate(zip(*texts, strict=True)):
        different = (left != right).nonzero()
        if len(different):
            place = int(different[0])
            worst = max(worst, _gap(bench.model(BEFORE), left, right, place))
            if worst > limit:
                raise MeasureError(
                    f"the two models generate different texts: in row {row} token {place - ids.shape[1]} is "
                    f"{int(left[place])} before the plan and {int(right[place])} after it, and they are no tie (their "
                    f"logits differ by {worst:.1e}, {limits.promise} edits may move them by {limit:.1e}). "
                    "Nothing was timed"
                )
    return [checked("decode", "tokens", limits.promise, worst, limit if math.isfinite(limit) else None)]


@torch.inference_mode()
def _gap(model: nn.Module, left: Tensor, right: Tensor, place: int) -> float:
    """How much less likely the token of `right` is than that of `left`, relative to the largest logit."""
    logits = model(input_ids=left[None, :place]).logits[0, -1].double()
    return float((logits[left[place]] - logits[right[place]]).abs() / logits.abs().max())


def check_compiled(model: nn.Module, eager: Tensor, compiled: Tensor) -> None:
    """Raises `MeasureError` where the compiled model gives other logits than rounding explains."""
    limit = Tolerances("rounding", coarsest_dtype([model])).outputs
    difference = relative_difference(eager, compiled)
    if difference > limit:
        raise MeasureError(
            f"torch.compile gives other logits: they differ by {difference:.1e}, more than rounding ({limit:.1e}). "
            "Its times would be those of another model"
        )
