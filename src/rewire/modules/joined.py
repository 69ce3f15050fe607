"""Separate projections that have become one matrix multiplication."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewire.modules.rows import rows_of, with_rows


@dataclass
class _Pending:
    """Outputs computed together with another part's, waiting for their part to be called."""

    source: weakref.ref[Tensor]
    state: tuple[Any, ...]
    outputs: dict[int, Tensor]


@dataclass
class _Scratch(threading.local):
    """Per thread, so that one model can serve several; never copied, never pickled."""

    pending: _Pending | None = None


class JoinedProjection(nn.Linear):
    """The joined weight: the rows of every part, one part after the other.

    Called like an `nn.Linear` it gives all parts at once; `rows` selects some of them. It is a linear layer
    by type, so that adapters and quantisers can treat it as one.

    Args:
        in_features: size of the last input dimension.
        parts: names of the parts.
        sizes: rows of each part.
        biased: which parts have a bias. `bias` holds the rows of those alone: a part that had none must not
            grow one in training.
        device: where to create the parameters.
        dtype: their type.

    >>> joined = JoinedProjection(4, ("q", "k"), (4, 2), (True, False))
    >>> joined(torch.zeros(3, 4)).shape, joined(torch.zeros(3, 4), rows=(4, 6)).shape, joined.bias.shape
    (torch.Size([3, 6]), torch.Size([3, 2]), torch.Size([4]))
    """

    def __init__(
        self,
        in_features: int,
        parts: Sequence[str],
        sizes: Sequence[int],
        biased: Sequence[bool],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, sum(sizes), bias=all(biased), device=device, dtype=dtype)
        self.parts = tuple(parts)
        self.sizes = tuple(sizes)
        self.biased = tuple(biased)
        if any(biased) and not all(biased):
            rows = sum(size for size, has_bias in zip(sizes, biased, strict=True) if has_bias)
            self.bias = nn.Parameter(torch.zeros(rows, device=device, dtype=dtype))

    def forward(self, input: Tensor, rows: tuple[int, int] | None = None) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`, or to the given range of output rows."""
        bias = self._full_bias()
        if rows is None or rows == (0, self.out_features):
            return F.linear(input, self.weight, bias)
        start, stop = rows
        return F.linear(input, self.weight[start:stop], None if bias is None else bias[start:stop])

    def _full_bias(self) -> Tensor | None:
        if all(self.biased) or not any(self.biased):
            return self.bias
        given = iter(self.bias.split([s for s, b in zip(self.sizes, self.biased, strict=True) if b]))
        rows = zip(self.sizes, self.biased, strict=True)
        return torch.cat([next(given) if has_bias else self.bias.new_zeros(size) for size, has_bias in rows])

    def extra_repr(self) -> str:
        parts = ", ".join(f"{name}={size}" for name, size in zip(self.parts, self.sizes, strict=True))
        return f"in_features={self.in_features}, {parts}, bias={self.bias is not None}"


class _Company:
    """What the parts of one join share: where their rows are, and who is called with the same input.

    At first all parts are expected to share their input. A part that turns up with another input (keys of a
    cross-attention) is put into a company of its own with the parts after it, so from then on nobody computes
    rows that nobody asks for. Results do not depend on it, only the amount of work does.
    """

    def __init__(
        self, sizes: Sequence[int], biased: Sequence[bool], groups: int = 1, row_dim: int = 0, axis: int = -1
    ) -> None:
        self.sizes = tuple(sizes)
        self.biased = tuple(biased)
        self.groups, self.row_dim, self.axis = groups, row_dim, axis
        stops = tuple(accumulate(self.sizes))
        self.bounds = tuple(zip((0, *stops), stops, strict=False))
        self.leader = [0] * len(self.sizes)
        self.scratch = _Scratch()

    def members(self, part: int) -> range:
        """`part` and the parts after it that are expected to be called with the same input."""
        stop = part + 1
        while stop < len(self.leader) and self.leader[stop] == self.leader[part]:
            stop += 1
        return range(part, stop)

    def depart(self, part: int) -> None:
        """`part` and those after it in its company no longer follow their leader."""
        for member in self.members(part):
            self.leader[member] = part

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: everything but the pending outputs."""
        return {name: value for name, value in self.__dict__.items() if name != "scratch"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, leader=list(state["leader"]), scratch=_Scratch())


class JoinedPart(nn.Module):
    """Stands where one of the separate projections stood; owns no parameters.

    The first part called with an input has the whole product computed and hands the others theirs when
    they are called with that very tensor, unchanged, in the same thread and mode. With any other input a part
    computes its own rows. The joined projection is looked up in the parent at every call, so an adapter or
    quantiser put around it is honoured.
    """

    parent: nn.Module
    joined: str
    index: int
    company: _Company

    def __init__(self, parent: nn.Module, joined: str, index: int, company: _Company) -> None:
        super().__init__()
        # In __dict__: a registered parent would make the module tree a ring.
        self.__dict__.update(parent=parent, joined=joined, index=index, company=company)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[..., in_features]` to `[..., rows of this part]`; what else the layer takes is passed on."""
        call = (input, *args), kwargs
        # A compiler traces the hand-over badly; an inference tensor does not count its in-place changes.
        if torch.compiler.is_compiling() or _is_tracing() or input.is_inference():
            return self._rows(call, self.index, self.index + 1)
        state: tuple[Any, ...] = (input._version, *_mode(input), *_stamps(self._joined))
        if args or kwargs:
            state += (*map(_token, args), *((name, _token(value)) for name, value in sorted(kwargs.items())))
        handed = self._take(input, state)
        return self._compute(call, state) if handed is None else handed

    def _take(self, x: Tensor, state: tuple[Any, ...]) -> Tensor | None:
        scratch = self.company.scratch
        pending = scratch.pending
        if pending is None or self.index not in pending.outputs:
            return None
        if pending.source() is not x or pending.state != state:
            self.company.depart(self.index)
            scratch.pending = None
            return None
        output = pending.outputs.pop(self.index)
        if not pending.outputs:
            scratch.pending = None
        return output

    def _compute(self, call: _Call, state: tuple[Any, ...]) -> Tensor:
        self._forsake()
        members = self.company.members(self.index)
        product = self._rows(call, members.start, members.stop)
        if len(members) == 1:
            return product
        sizes = [self.company.sizes[member] for member in members]
        starts = (0, *accumulate(sizes))
        # Slices, not `split`: a model may change its queries in place, which views of a split forbid.
        outputs = {
            member: rows_of(product, start, start + size, self.company.groups, self.company.axis)
            for member, start, size in zip(members, starts, sizes, strict=False)
        }
        own = outputs.pop(self.index)
        scratch = self.company.scratch
        # Dies with its input, so that a part that is never called (cached keys) keeps no memory; where gradients
        # are recorded the outputs keep their input alive, and they wait until the next call.
        scratch.pending = _Pending(weakref.ref(call[0][0], _forget(scratch)), state, outputs)
        return own

    def _forsake(self) -> None:
        """Parts that were not called with the last input leave the company: next time nothing waits for them."""
        pending, self.company.scratch.pending = self.company.scratch.pending, None
        for member in sorted(pending.outputs) if pending else ():
            self.company.depart(member)

    def _rows(self, call: _Call, first: int, stop: int) -> Tensor:
        args, kwargs = call
        joined, company = self._joined, self.company
        rows = (company.bounds[first][0], company.bounds[stop - 1][1])
        output: Tensor
        if isinstance(joined, JoinedProjection):
            output = joined(*args, rows=rows)
        elif rows == (0, company.bounds[-1][1]):
            output = joined(*args, **kwargs)
        elif hasattr(joined, "joined_parts"):
            output = _narrowed(joined, rows, company)(*args, **kwargs)
        else:  # an adapter stands around it
            output = rows_of(joined(*args, **kwargs), *rows, company.groups, company.axis)
        return output

    @property
    def _joined(self) -> Any:
        """Whatever has the joined projection's place now."""
        return self.parent._modules[self.joined]

    @property
    def in_features(self) -> int:
        """Size of the last input dimension."""
        return int(self._joined.in_features)

    @property
    def out_features(self) -> int:
        """Rows of this part."""
        return self.company.sizes[self.index]

    @property
    def weight(self) -> Tensor:
        """This part's rows of the joined weight, as a view `[out_features, in_features]`."""
        return _rows_of(self._joined.weight, *self.company.bounds[self.index], self.company)

    @property
    def bias(self) -> Tensor | None:
        """This part's rows of the joined bias, as a view `[out_features]`; None if the part has no bias."""
        if not self.company.biased[self.index]:
            return None
        before = zip(self.company.sizes[: self.index], self.company.biased, strict=False)
        start = sum(size for size, has_bias in before if has_bias)
        return _rows_of(self._joined.bias, start, start + self.out_features, self.company)

    def extra_repr(self) -> str:
        return f"part {self.index} of {self.joined!r}"


def join_parts(
    parent: nn.Module, name: str, joined: nn.Module, company: _Company | None = None
) -> dict[str, JoinedPart]:
    """The stand-ins for the parts of `joined`, which is (or will be) the child `name` of `parent`.

    `company` is needed where `joined` is a layer of another kind, which `joined_layer` has made.
    """
    if company is None:
        assert isinstance(joined, JoinedProjection)
        company = _Company(joined.sizes, joined.biased)
    names: Any = joined.parts if isinstance(joined, JoinedProjection) else joined.joined_parts
    return {part: JoinedPart(parent, name, index, company) for index, part in enumerate(names)}


def joined_layer(
    first: nn.Module, parts: Sequence[str], sizes: Sequence[int], *, groups: int = 1, row_dim: int = 0, axis: int = -1
) -> tuple[nn.Module, _Company]:
    """The joined layer of parts that are no `nn.Linear`, on meta, and what its stand-ins share.

    Args:
        first: one of the parts; all are alike but for their rows.
        parts: their names.
        sizes: rows of each.
        groups: equal groups of rows, each of which holds rows of every part.
        row_dim: the dimension of the tensors that counts the rows.
        axis: the dimension of the output that they become.
    """
    layer: Any = with_rows(first, sum(sizes), row_dim)
    layer.joined_parts = tuple(parts)
    biased = (layer._parameters.get("bias") is not None,) * len(sizes)
    return layer, _Company(sizes, biased, groups, row_dim, axis)


def _narrowed(joined: nn.Module, rows: tuple[int, int], company: _Company) -> nn.Module:
    """The joined layer with some of its rows alone; everything else, hooks too, is shared."""
    own = joined.__class__.__new__(joined.__class__)
    own.__dict__.update(joined.__dict__)
    own.__dict__["_parameters"] = {
        name: None if tensor is None else rows_of(tensor, *rows, company.groups, company.row_dim)
        for name, tensor in joined._parameters.items()
    }
    return own


def _rows_of(tensor: Tensor, start: int, stop: int, company: _Company) -> Tensor:
    """A view of some rows that says of itself what the whole says.

    Loaders mark tensors that hold values already; a model that initialises its `q_proj.weight` itself would
    otherwise fill the rows of a loaded joined weight with random numbers.
    """
    view = rows_of(tensor, start, stop, company.groups, company.row_dim)
    view.__dict__.update(tensor.__dict__)
    return view


_Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments, the input first, and keyword arguments."""


class _Tensor:
    """A tensor given as a further argument: equal to itself while it is unchanged."""

    def __init__(self, tensor: Tensor) -> None:
        self.source, self.version = weakref.ref(tensor), tensor._version

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Tensor) or self.version != other.version:
            return False
        return self.source() is not None and self.source() is other.source()

    __hash__ = None  # type: ignore[assignment]


def _token(value: object) -> object:
    """Something equal for two calls that give the same further argument; unlike anything if nobody can tell."""
    if isinstance(value, Tensor) and not value.is_inference():
        return _Tensor(value)
    return (type(value), value) if value is None or isinstance(value, bool | int | float | str) else object()


def _is_tracing() -> bool:
    return bool(torch._C._is_tracing())


def _mode(x: Tensor) -> tuple[Any, ...]:
    """What besides the input and the weights decides the result."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    return torch.is_grad_enabled(), torch.get_autocast_dtype(device) if autocast else None


def _stamps(joined: nn.Module) -> list[tuple[int, int]]:
    """Changes whenever a weight does."""
    # Walking the tree takes longer than a small product; it is needed only under an adapter's wrapper.
    bare = type(joined) is JoinedProjection
    parameters = joined._parameters.values() if bare else joined.parameters()
    return [(id(p), 0 if p.is_inference() else p._version) for p in parameters if p is not None]


def _forget(scratch: _Scratch) -> Any:
    def clear(reference: weakref.ref[Tensor]) -> None:
        if scratch.pending is not None and scratch.pending.source is reference:
            scratch.pending = None

    return clear
