"""How far two tensors may lie apart: one small table, by data type and by the promise of the edit.

All differences in a proof are relative: the largest absolute difference, divided by the largest absolute
value of the tensor on the untouched side. Tolerances are in the same unit.

| data type | exact | additive, rounding | as multiples of the machine epsilon |
|-----------|-------|--------------------|-------------------------------------|
| float64   | 1e-12 | 1e-11              | 4500, 45000                         |
| float32   | 1e-5  | 1e-4               | 84, 840                             |
| float16   | 5e-3  | 1e-2               | 5, 10                               |
| bfloat16  | 4e-2  | 8e-2               | 5, 10                               |

`exact` leaves room for sums taken in another order, nothing else. `lossy` edits are reported, not judged,
unless the caller names a tolerance. A difference beyond the tolerance that vanishes in float64 is rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import nn

from rewire.errors import ProofError

Promise = Literal["exact", "rounding", "lossy", "additive"]

EXACT: Mapping[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
LOOSER: Mapping[torch.dtype, float] = {
    torch.float64: 10,
    torch.float32: 10,
    torch.float16: 2,
    torch.bfloat16: 2,
}
"""By how much `rounding` and `additive` exceed `exact`."""

GRADIENT_FACTOR = 10.0
"""Gradients pass through twice as many operations and sum over positions."""

REACTION_FACTOR = 10.0
"""Outputs must move this many tolerances when an edited tensor is disturbed."""

DOUBLE = 1e-9
"""Relative difference in float64 at or below which a larger one in a shorter type counts as rounding."""

SHRINKS = 1e-5
"""A difference that shrinks by this factor from the model's type to float64 counts as rounding too."""


def check_promise(promise: str) -> Promise:
    """`promise` if it is one of the four, else `ProofError`.

    >>> check_promise("exact")
    'exact'
    """
    for known in get_args(Promise):
        if promise == known:
            return known  # type: ignore[no-any-return]
    raise ProofError(f"promise {promise!r} is not one of {', '.join(get_args(Promise))}")


def coarsest_dtype(models: Iterable[nn.Module]) -> torch.dtype:
    """The least precise floating type among the parameters; float32 when there is none.

    >>> coarsest_dtype([nn.Linear(2, 2), nn.Linear(2, 2).to(torch.bfloat16)])
    torch.bfloat16
    """
    dtypes = {parameter.dtype for model in models for parameter in model.parameters()}
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


@dataclass(frozen=True)
class Tolerances:
    """The limits of one comparison, all relative to the scale of the tensor compared.

    >>> Tolerances("exact", torch.float32).outputs
    1e-05
    >>> Tolerances("rounding", torch.float32, {"float32": 1e-3}).outputs
    0.001
    """

    promise: Promise
    dtype: torch.dtype
    overrides: Mapping[torch.dtype | str, float] = field(default_factory=dict)

    @property
    def outputs(self) -> float:
        """For outputs of the model and of its modules."""
        for key in (self.dtype, str(self.dtype).removeprefix("torch.")):
            if key in self.overrides:
                return float(self.overrides[key])
        if self.promise == "lossy":
            return math.inf
        base = EXACT.get(self.dtype, 5 * torch.finfo(self.dtype).eps)
        return base if self.promise == "exact" else base * LOOSER.get(self.dtype, 2)

    @property
    def gradients(self) -> float:
        """For gradients."""
        return self.outputs * GRADIENT_FACTOR

    @property
    def reaction(self) -> float:
        """How far outputs must move when an edited tensor is disturbed."""
        # By the table: a caller who allows more does not ask for stronger reactions.
        return Tolerances(self.promise, self.dtype).outputs * REACTION_FACTOR

    @property
    def judges_padding(self) -> bool:
        """Whether padded positions must agree as well. Packed encoders leave zeros there and promise
        `rounding`.
        """
        return self.promise in ("exact", "additive")

    def is_rounding(self, difference: float, in_double: float, limit: float) -> bool:
        """Whether a `difference` above `limit` is mere rounding, given the difference in float64."""
        return in_double <= DOUBLE or (in_double <= SHRINKS * difference and in_double <= limit / 10)
