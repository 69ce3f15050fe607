"""What the general rules cannot know about a single model type: one entry of the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Draw:
    """How to make one input tensor.

    Attributes:
        shape: its shape.
        of: `normal` numbers, `integers` from `low` to below `high`, `uniform` numbers between them, or all `low`
            (`constant`).
        low: lower bound, or the constant.
        high: upper bound, not included.
        values: the values themselves, in place of all the above.
        dtype: of the tensor, where it is not the usual one of its kind.
    """

    shape: tuple[int, ...] = ()
    of: Literal["normal", "integers", "uniform", "constant"] = "normal"
    low: float = 0
    high: float = 1
    values: Any = None
    dtype: str | None = None


@dataclass(frozen=True)
class Entry:
    """Values for one model type, and why it needs them.

    Attributes:
        why: the reason, for people.
        given: values the configuration is made with before it is made small; nested ones as nested mappings.
        then: values set after that, by dotted name (`vision_config.num_heads`).
        inputs: inputs that take the place of those made from the model, or come on top; None leaves one out.
            A value that is neither a `Draw` nor None is passed as it is.
        only: whether `inputs` are all there are.
        architecture: the class of the model, where `AutoModel` takes one that the configuration does not describe.
    """

    why: str
    given: Mapping[str, Any] = field(default_factory=dict)
    then: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Draw | Any] = field(default_factory=dict)
    only: bool = False
    architecture: str | None = None
