"""Which positions of a padded batch are real, read off any attention mask; and how to leave the others out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Unpackable(Exception):
    """This call cannot run without its padding; the untouched forward has to do it. The message says why."""


@dataclass(frozen=True, eq=False)
class Packing:
    """How a batch of `batch` rows of `width` positions becomes the rows of one matrix, and back.

    Attributes:
        batch: rows of the batch; one of them may be without real positions.
        width: positions of a row.
        index: places of the real positions in the flattened batch, int64 `[tokens]`; None: all are real.
        starts: where each row with real positions begins among the tokens, int64 `[rows + 1]`.
        longest: real positions of the longest row.
        adjoining: whether the real positions of every row stand side by side, so that distances stay.
        leading: whether they are the first ones of every row, so that positions stay.
    """

    batch: int
    width: int
    index: Tensor | None
    starts: Tensor
    longest: int
    adjoining: bool
    leading: bool

    @property
    def tokens(self) -> int:
        """How many positions are real."""
        return self.batch * self.width if self.index is None else len(self.index)

    def pack(self, dense: Tensor) -> Tensor:
        """`[batch, width, …]` (or `[1, width, …]`, the same for every row) as `[tokens, …]`."""
        if dense.shape[0] != self.batch:
            dense = dense.expand(self.batch, *dense.shape[1:])
        flat = dense.reshape(self.batch * self.width, *dense.shape[2:])
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, packed: Tensor) -> Tensor:
        """`[tokens, …]` as `[batch, width, …]`, with zeros at padded positions."""
        if self.index is not None:
            room = packed.new_zeros(self.batch * self.width, *packed.shape[1:])
            packed = room.index_copy(0, self.index, packed) if packed.requires_grad else _fill(room, self.index, packed)
        return packed.reshape(self.batch, self.width, *packed.shape[1:])

    def same_tokens(self, other: Packing) -> bool:
        """Whether both keep the same positions."""
        if (self.batch, self.width) != (other.batch, other.width):
            return False
        if self.index is None or other.index is None:
            return self.index is other.index
        return self.index is other.index or torch.equal(self.index, other.index)


def _fill(room: Tensor, index: Tensor, packed: Tensor) -> Tensor:
    return room.index_copy_(0, index, packed)


def full_packing(batch: int, width: int, device: torch.device) -> Packing:
    """The packing of a batch without padding.

    >>> packing = full_packing(2, 3, torch.device("cpu"))
    >>> packing.tokens, packing.starts.tolist()
    (6, [0, 3, 6])
    """
    starts = torch.arange(0, (batch + 1) * width, width, device=device)
    return Packing(batch, width, None, starts, width, adjoining=True, leading=True)


def packing_of(keep: Tensor | None, batch: int, width: int, device: torch.device) -> Packing:
    """The packing of a batch whose real positions are true in `keep`, bool `[batch, width]`; None: all are.

    Raises `Unpackable` where no position is real.

    >>> packing = packing_of(torch.tensor([[True, True, False], [False, True, False]]), 2, 3, torch.device("cpu"))
    >>> packing.index.tolist(), packing.starts.tolist(), packing.longest, packing.adjoining
    ([0, 1, 4], [0, 2, 3], 2, True)
    >>> packing.unpack(packing.pack(torch.arange(6.0).view(2, 3))).tolist()
    [[0.0, 1.0, 0.0], [0.0, 4.0, 0.0]]
    """
    if keep is None:
        return full_packing(batch, width, device)
    lengths = keep.sum(dim=1)
    found = lengths.tolist()  # the one place where a GPU has to be waited for
    if sum(found) == batch * width:
        return full_packing(batch, width, device)
    if not any(found):
        raise Unpackable("no position is real")
    edges = (keep[:, 1:] & ~keep[:, :-1]).sum(dim=1) + keep[:, 0]
    starts = torch.zeros(sum(length > 0 for length in found) + 1, dtype=torch.int64, device=device)
    torch.cumsum(lengths[lengths > 0], 0, out=starts[1:])
    index = keep.flatten().nonzero().flatten()
    adjoining = bool((edges <= 1).all())
    leading = adjoining and bool((keep[:, 0] | (lengths == 0)).all())
    return Packing(batch, width, index, starts, max(found), adjoining, leading)


@dataclass(frozen=True, eq=False)
class Sight:
    """What a mask lets be seen.

    Attributes:
        keep: real positions, bool `[batch, width]`; None: all.
        window: how far a position sees to either side; None: over the whole row.
        causal: whether a position sees those before it alone.
    """

    keep: Tensor | None
    window: int | None = None
    causal: bool = False


def read_mask(mask: Tensor | None, batch: int, width: int, *, inverted: bool = False) -> Sight:
    """What `mask` lets be seen, whatever form it has.

    Args:
        mask: None, `[batch, keys]`, `[batch, queries, keys]` or `[batch, heads, queries, keys]`; true, one or an added
            zero where a key is seen; false, zero or a large negative number added where not.
        batch: rows of the batch; a mask may have one row for all.
        width: positions of a row.
        inverted: whether true means padding.

    Raises `Unpackable` for a mask that says more than which positions are real, and how near they must be.

    >>> read_mask(torch.tensor([[1, 1, 0]]), 1, 3).keep.tolist()
    [[True, True, False]]
    >>> read_mask(torch.ones(1, 1, 3, 3).tril().bool(), 1, 3).causal
    True
    >>> read_mask(torch.tensor([[[1, 0], [1, 1], [1, 1]]]), 1, 2)
    Traceback (most recent call last):
    rewire.modules.packed.padding.Unpackable: the mask differs from query to query
    """
    if mask is None:
        return Sight(None)
    seen = _seen(mask, inverted)
    if seen.ndim == 4:
        seen = _of_all_heads(seen)
    if seen.ndim not in (2, 3) or seen.shape[-1] != width or seen.shape[0] not in (1, batch):
        raise Unpackable(f"a mask of shape {tuple(mask.shape)} for {batch} rows of {width}")
    if seen.ndim == 3:
        return _of_all_queries(seen, batch, width)
    return Sight(seen.expand(batch, width))


def _seen(mask: Tensor, inverted: bool) -> Tensor:
    """True where a key is seen."""
    if mask.dtype == torch.bool:
        return ~mask if inverted else mask
    if not mask.is_floating_point():
        return mask == 0 if inverted else mask != 0
    mask = _first_query(mask)
    if mask.ndim == 2 and bool((mask > 0).any()):  # ones and zeros
        return mask > 0
    seen = mask == 0
    if not bool((seen | (mask < _ABSENT)).all()):
        raise Unpackable("the mask adds numbers that are neither zero nor very negative")
    return seen


_ABSENT = -1e3
"""Numbers below this, added to a score, leave nothing of it."""


def _first_query(mask: Tensor) -> Tensor:
    """A mask that was only expanded over heads and queries, without being expanded."""
    for dim in range(1, mask.ndim - 1):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _of_all_heads(seen: Tensor) -> Tensor:
    """`[batch, heads, queries, keys]` as `[batch, queries, keys]`, if all heads see the same."""
    first = seen[:, 0]
    if seen.shape[1] > 1 and seen.stride(1) != 0 and not torch.equal(seen, seen[:, :1].expand_as(seen)):
        raise Unpackable("the mask differs from head to head")
    return first


def _of_all_queries(seen: Tensor, batch: int, width: int) -> Sight:
    """`[batch, queries, keys]`: the same for every query, but perhaps for a window around it."""
    if seen.shape[1] == 1 or seen.stride(1) == 0:
        return Sight(seen[:, 0].expand(batch, width))
    keep = seen.any(dim=1)
    real = keep if keep.shape == seen.shape[::2] else keep.expand(seen.shape[0], width)
    rows = seen | ~real[:, :, None] if seen.shape[1] == width else seen  # what padded queries see is of no interest
    wanted = keep[:, None, :].expand_as(seen)
    if torch.equal(rows & wanted, wanted):
        return Sight(keep.expand(batch, width))
    if seen.shape[1] != width:
        raise Unpackable("the mask differs from query to query")
    return _banded(seen, keep, batch, width)


def _banded(seen: Tensor, keep: Tensor, batch: int, width: int) -> Sight:
    """Queries that see different keys: those before them, or those near them, or both."""
    places = torch.arange(width, device=seen.device)
    ahead = places[None, :] - places[:, None]  # [query, key]
    real = keep[:, :, None]
    looked = seen & real
    causal = not bool((looked & (ahead > 0)).any())
    window = int((ahead.abs() * looked).max())
    allowed = (ahead.abs() <= window) & ((ahead <= 0) if causal else torch.ones_like(ahead, dtype=torch.bool))
    if not torch.equal(looked, keep[:, None, :] & allowed & real):
        raise Unpackable("the mask differs from query to query")
    return Sight(keep.expand(batch, width), window, causal)
