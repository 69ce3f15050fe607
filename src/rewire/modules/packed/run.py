"""What the wrapped forwards of one stack of layers share: what is known of it, and where each thread is in it."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rewire.modules.packed.attend import Visits
from rewire.modules.packed.padding import Packing
from rewire.modules.packed.recipe import Options
from rewire.modules.packed.weights import Derived


class Broken(Exception):
    """Something stands between the layers: what one gave is not what the next was given."""


@dataclass(eq=False)
class Run:
    """One call of the encoder, from its first layer to its last.

    Attributes:
        packing: of the batch; None before the first layer.
        sent: what the last layer gave, packed; None when nothing packed is on its way.
        called: how many layers were called.
        seen: what masks were found to say, and arguments packed, by identity.
    """

    packing: Packing | None = None
    sent: Tensor | None = None
    called: int = 0
    seen: dict[int, tuple[object, Any]] = field(default_factory=dict)


class Runs(threading.local):
    """The run of this thread; None: every layer is on its own."""

    now: Run | None = None

    def __deepcopy__(self, memo: object) -> Runs:
        return Runs()

    def __reduce__(self) -> tuple[type[Runs], tuple[()]]:
        return Runs, ()


@dataclass(frozen=True)
class StackFacts:
    """What is particular about a stack.

    Attributes:
        chains: whether nothing stands between its layers, so that packed tokens may pass from one to the next.
        sequence_first: whether hidden states are `[positions, batch, width]`.
        inverted: whether true in a mask means padding.
        in_place: whether nothing is packed: the layers' own code runs on the batch as it is, with prepared weights.
        reads_padding: whether the model makes something of padded positions; batches with any run untouched then.
    """

    chains: bool = True
    sequence_first: bool = False
    inverted: bool = False
    in_place: bool = False
    reads_padding: bool = False


class PackedStack:
    """What the wrapped forwards of one stack share.

    Attributes:
        facts: what is particular about it.
        options: how products are computed.
        original_padding: whether padded positions hold what the untouched model gives there; then a batch that
            has any runs untouched.
        layers: how many layers the encoder calls; found out by counting.
        weights: prepared weights.
        visits: the layer that each thread is in.
        paths: how many layer calls ran in which way, for the receipt and for tests.
        chained: whether the last run of the encoder stayed packed from its first layer to its last.
    """

    def __init__(self, facts: StackFacts, options: Options, *, original_padding: bool, layers: int) -> None:
        self.facts, self.options, self.original_padding, self.layers = facts, options, original_padding, layers
        self.weights = Derived()
        self.visits = Visits()
        self.runs = Runs()
        self.paths: dict[str, int] = {}
        self.chained = False

    def note(self, path: str) -> None:
        """Counts a layer call."""
        self.paths[path] = self.paths.get(path, 0) + 1


class Wrapped:
    """A forward of one module instance, in place of its class's."""

    def __init__(self, module: nn.Module, stack: PackedStack) -> None:
        self.module, self.stack = module, stack

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return types.MethodType(type(self.module).forward, self.module)

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """What the class does."""
        return type(self.module).forward(self.module, *args, **kwargs)
