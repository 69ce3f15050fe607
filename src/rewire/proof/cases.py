"""One input of a proof: keyword arguments for `forward`, and which of its positions are real."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rewire.errors import ProofError

Padding = Literal["none", "right", "left", "hole"]


@dataclass(frozen=True, eq=False)
class Case:
    """One input.

    `kwargs` are passed to `forward` (tensors are cloned and moved to the model's device; floating ones take
    the model's type; what has a method `fresh` is made anew, as `sessions.VideoSession`). `mask` is a boolean
    tensor (batch, length), true at real positions; outputs with these two dimensions are compared at real and
    at padded positions separately. `seed` starts every random number generator before each forward, so that
    models that draw numbers (random masking, say) draw the same ones.

    With `continuation` forward is called twice: with `kwargs`, and then with `continuation` and the
    `past_key_values` that it gave, as generation does; both outputs are compared.

    >>> Case("one row", {"input_ids": torch.ones(1, 4, dtype=torch.long)}).is_padded
    False
    """

    name: str
    kwargs: Mapping[str, Any]
    mask: Tensor | None = None
    seed: int = 0
    continuation: Mapping[str, Any] | None = None

    @property
    def is_padded(self) -> bool:
        """Whether some positions are padding."""
        return self.mask is not None and not bool(self.mask.all())


def padding_mask(padding: Padding, batch: int, length: int) -> Tensor:
    """True at real positions; shape (batch, length). The first row is always whole.

    >>> padding_mask("left", 2, 4).int().tolist()
    [[1, 1, 1, 1], [0, 0, 1, 1]]
    """
    mask = torch.ones(batch, length, dtype=torch.bool)
    for row in range(1, batch):
        real = max(1, length - row * length // (batch + 1) - length // 3)
        if padding == "right":
            mask[row, real:] = False
        elif padding == "left":
            mask[row, : length - real] = False
        elif padding == "hole":
            mask[row, length // 3 : length // 3 + max(1, length // 4 + row - 1)] = False
    if batch == 1 and padding != "none" and length > 1:
        mask[0, {"right": -1, "left": 0, "hole": length // 2}[padding]] = False
    return mask


def as_cases(inputs: Iterable[Case | Mapping[str, Any]] | Case | Mapping[str, Any]) -> tuple[Case, ...]:
    """Inputs given by a caller as cases; a boolean view of a 2-D `attention_mask` becomes the mask.

    Raises `ProofError` when an element is neither a `Case` nor a mapping, or when there is none.

    >>> as_cases({"input_ids": torch.ones(1, 4, dtype=torch.long)})[0].name
    'input 0'
    """
    listed = [inputs] if isinstance(inputs, Case | Mapping) else list(inputs)
    if not listed:
        raise ProofError("inputs= is empty; give at least one mapping of keyword arguments for forward")
    return tuple(_as_case(value, index) for index, value in enumerate(listed))


def _as_case(value: Case | Mapping[str, Any], index: int) -> Case:
    if isinstance(value, Case):
        return value
    if not isinstance(value, Mapping):
        raise ProofError(
            f"inputs[{index}] is a {type(value).__name__}; "
            "each must be a Case or a mapping of keyword arguments for forward"
        )
    mask = value.get("attention_mask")
    usable = isinstance(mask, Tensor) and mask.ndim == 2
    return Case(f"input {index}", dict(value), mask.bool().cpu() if usable and mask is not None else None, index)
