"""Several terms as the one product that a file holds, and back.

The ranks are put side by side. Where terms have different scalings, one is common to all and the others are
multiplied into B: without rounding where the ratio is a power of two, else rounded once, and then the original
is kept for the way back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rewire.adapters.lowrank import LowRank, Term, multiplied
from rewire.adapters.scaling import Scaling, common


@dataclass(frozen=True)
class Block:
    """A part of the rank of a folded term.

    Attributes:
        rank: how much of it.
        origins: the tensors on the other side of the edit that it belongs to.
        alpha: that of its own scaling,
        of_rank: at this rank.
        factor: what B was multiplied with.
        kept: B before, where multiplying rounded.
    """

    rank: int
    origins: tuple[str, ...]
    alpha: float
    of_rank: int
    factor: float = 1.0
    kept: Tensor | None = None


@dataclass(frozen=True)
class Folded:
    """A change with one term, and the blocks that its rank consists of."""

    change: LowRank
    blocks: tuple[Block, ...]

    @property
    def rounded(self) -> bool:
        """Whether a product is only equal up to rounding."""
        return any(block.kept is not None for block in self.blocks) or not self.same_scaling

    @property
    def same_scaling(self) -> bool:
        """Whether the scaling of the whole has bit for bit the value that its blocks were folded into."""
        whole = self.change.terms[0].scaling
        first = self.blocks[0]
        own = Scaling(first.alpha, first.of_rank, whole.root)
        return whole.value * first.factor == own.value


def fold(change: LowRank) -> Folded:
    """All terms of `change` as one.

    >>> a, b = torch.ones(2, 3), torch.ones(4, 2)
    >>> change = LowRank((4, 3), (Term(b, a, Scaling(2, 2)), Term(b, a, Scaling(8, 2))))
    >>> folded = fold(change)
    >>> folded.change.terms[0].scaling, folded.change.terms[0].rows[0].tolist(), folded.rounded
    (Scaling(alpha=4, rank=4, root=False), [1.0, 1.0, 4.0, 4.0], False)
    """
    target = common([term.scaling for term in change.terms])
    rank = change.rank
    blocks = tuple(_block(term, target, change.side) for term in change.terms)
    scaling = target.at(rank)
    if len(change.terms) == 1:
        (term,) = change.terms
    else:
        scaled = [_scaled(term, block.factor, change.side) for term, block in zip(change.terms, blocks, strict=True)]
        rows = torch.cat([term.rows for term in scaled], -1)
        term = Term(rows, torch.cat([term.columns for term in scaled], change.batch), scaling)
    shift = None if change.shift is None else change.shift.to(term.scaling)
    return Folded(replace(change, terms=(term,), shift=shift), blocks)


def _block(term: Term, target: Scaling, side: str) -> Block:
    factor = term.scaling.over(target)
    before: Tensor = getattr(term, side)
    after = multiplied(before, factor.value)
    exact = factor.exact and (factor.value == 1.0 or torch.equal(multiplied(after, 1 / factor.value), before))
    kept = None if exact else before
    return Block(term.rank, tuple(sorted(term.origins)), term.scaling.alpha, term.scaling.rank, factor.value, kept)


def _scaled(term: Term, factor: float, side: str) -> Term:
    return _with(term, side, multiplied(getattr(term, side), factor))


def _with(term: Term, side: str, factor: Tensor) -> Term:
    return replace(term, rows=factor) if side == "rows" else replace(term, columns=factor)


def unfold(change: LowRank, blocks: Sequence[Block]) -> LowRank:
    """The terms that `fold` made one of; `change` as it is where its rank is not theirs."""
    (whole,) = change.terms
    ranks = [block.rank for block in blocks]
    if sum(ranks) != whole.rank:
        return change
    rows = whole.rows.split(ranks, -1)
    columns = whole.columns.split(ranks, change.batch)
    terms = [Term(r, c, whole.scaling) for r, c in zip(rows, columns, strict=True)]
    back = tuple(_unfolded(term, block, change.side) for term, block in zip(terms, blocks, strict=True))
    return replace(change, terms=back)


def _unfolded(term: Term, block: Block, side: str) -> Term:
    now: Tensor = getattr(term, side)
    before = now if block.factor in {0.0, 1.0} else multiplied(now, 1 / block.factor)
    if block.kept is not None and torch.equal(multiplied(block.kept, block.factor), now):
        before = block.kept
    scaling = Scaling(block.alpha, block.of_rank, term.scaling.root)
    return replace(_with(term, side, before), scaling=scaling, origins=frozenset(block.origins))


def settle(name: str, change: LowRank) -> LowRank | None:
    """`change` to the tensor `name` without the terms that belong to others and do nothing here.

    None where no term is left: the tensor had no adapter.
    """
    remaining = tuple(term for term in change.terms if not _is_foreign(term, name))
    return replace(change, terms=remaining) if remaining else None


def _is_foreign(term: Term, name: str) -> bool:
    return bool(term.origins) and name not in term.origins and not (term.rows.any() and term.columns.any())


def with_origins(changes: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Every term belongs to the tensor that it changes."""
    return {
        name: replace(change, terms=tuple(replace(term, origins=frozenset({name})) for term in change.terms))
        for name, change in changes.items()
    }
