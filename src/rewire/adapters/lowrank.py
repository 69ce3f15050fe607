"""A change of low rank to one tensor, and what becomes of it under the steps of a tensor rule.

An adapter adds `scaling * B @ A` to a weight. Here that is a sum of terms `scaling * rows @ columns`, in the
shape that the tensor itself has: for an `nn.Linear` the rows are B, for a transposed layer they are A's
transpose. A step that moves rows of the tensor then moves those of `rows`, one that moves columns those of
`columns`, and the rank is touched by neither. That is exact: numbers are moved, none is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rewire.adapters.scaling import Scaling, common
from rewire.errors import RuleError
from rewire.tensor_rules import (
    JoinRows,
    KeepRows,
    PermuteRows,
    Shape,
    SplitRows,
    Stack,
    Step,
    Transpose,
    Unstack,
    run,
    visible,
)


@dataclass(frozen=True)
class Term:
    """One product of two factors.

    Attributes:
        rows: `[*batch, rows, rank]`.
        columns: `[*batch, rank, columns, …]` (for convolutions with the dimensions of the kernel).
        scaling: what the product is multiplied with.
        origins: the tensors on the other side of an edit that this term belongs to; empty: not known.
    """

    rows: Tensor
    columns: Tensor
    scaling: Scaling
    origins: frozenset[str] = frozenset()

    @property
    def rank(self) -> int:
        """The dimension that the factors share."""
        return self.rows.shape[-1]


@dataclass(frozen=True)
class Shift:
    """What an adapter adds to the outputs of a layer (`lora_bias`): `scaling * values`, values `[outputs]`."""

    values: Tensor
    scaling: Scaling

    def to(self, scaling: Scaling) -> Shift:
        """The same shift with another scaling."""
        factor = self.scaling.over(scaling).value
        return self if factor == 1.0 else Shift(multiplied(self.values, factor), scaling)


@dataclass(frozen=True)
class LowRank:
    """A change of low rank to a tensor of the given `shape`.

    Attributes:
        shape: of the tensor.
        terms: what is added to it.
        batch: leading dimensions that count matrices (one, for stacked experts), not rows.
        outputs: the dimension that counts the outputs of the layer, along which shift and magnitude lie.
        magnitude: DoRA's, `[outputs]`.
        shift: of the outputs.
    """

    shape: Shape
    terms: tuple[Term, ...]
    batch: int = 0
    outputs: int = 0
    magnitude: Tensor | None = field(default=None)
    shift: Shift | None = field(default=None)

    @property
    def rank(self) -> int:
        """The rank of all terms together."""
        return sum(term.rank for term in self.terms)

    @property
    def side(self) -> str:
        """Which factor of a term belongs to the outputs: peft's B."""
        return "rows" if self.outputs == self.batch else "columns"


def multiplied(tensor: Tensor, factor: float) -> Tensor:
    """`tensor * factor`, rounded once."""
    return tensor if factor == 1.0 else (tensor.double() * factor).to(tensor.dtype)


CutStep = SplitRows | PermuteRows | KeepRows | Unstack | Transpose
RowStep = SplitRows | PermuteRows | KeepRows
JoinStep = JoinRows | Stack


def cut(step: CutStep, source: LowRank) -> dict[str, LowRank]:
    """What becomes of the change to the one tensor that `step` takes.

    Raises `RuleError` where the result is of no low rank.

    >>> change = LowRank((4, 3), (Term(torch.ones(4, 2), torch.ones(2, 3), Scaling(4, 2)),))
    >>> {name: part.terms[0].rows.shape[0] for name, part in cut(SplitRows("qk", ("q", "k"), (3, 1)), change).items()}
    {'q': 3, 'k': 1}
    """
    shapes = dict(zip(step.outputs, step.shapes(source.shape), strict=True))
    if isinstance(step, Transpose):
        return {step.target: _transposed(step, source, shapes[step.target])}
    if isinstance(step, Unstack):
        return _unstacked(step, source, shapes)
    return _cut_rows(step, source, shapes)


def _transposed(step: Transpose, source: LowRank, shape: Shape) -> LowRank:
    if len(shape) > source.batch + 2:  # the last two dimensions of a kernel are both of the columns
        terms = tuple(replace(term, columns=_only(_pieces(step, term.columns))) for term in source.terms)
        return replace(source, shape=shape, terms=terms)
    terms = tuple(
        replace(term, rows=term.columns.swapaxes(-2, -1), columns=term.rows.swapaxes(-2, -1)) for term in source.terms
    )
    return replace(source, shape=shape, terms=terms, outputs=2 * source.batch + 1 - source.outputs)


def _unstacked(step: Unstack, source: LowRank, shapes: Mapping[str, Shape]) -> dict[str, LowRank]:
    if source.batch != 1:
        raise cannot(step, "takes one matrix apart, and an adapter changes matrices only")
    return {
        part: LowRank(
            shape,
            tuple(replace(term, rows=term.rows[place], columns=term.columns[place]) for term in source.terms),
            outputs=source.outputs - 1,
        )
        for place, (part, shape) in enumerate(shapes.items())
    }


def _cut_rows(step: RowStep, source: LowRank, shapes: Mapping[str, Shape]) -> dict[str, LowRank]:
    if step.dim != source.outputs and not isinstance(step, PermuteRows):
        _refuse_vectors(step, source)
    terms = [_cut_term(step, term, source.batch) for term in source.terms]
    parts = {
        name: replace(source, shape=shape, terms=tuple(term[name] for term in terms)) for name, shape in shapes.items()
    }
    if step.dim != source.outputs:
        return parts
    return {name: _with_vectors(part, replace(step, dim=0), name) for name, part in parts.items()}


def _cut_term(step: RowStep, term: Term, batch: int) -> dict[str, Term]:
    rows = _pieces(step, term.rows) if step.dim <= batch else {}
    columns = _pieces(step, term.columns) if step.dim != batch else {}
    return {
        name: replace(term, rows=rows.get(name, term.rows), columns=columns.get(name, term.columns))
        for name in step.outputs
    }


def _with_vectors(part: LowRank, step: RowStep, name: str) -> LowRank:
    magnitude, shift = part.magnitude, part.shift
    return replace(
        part,
        magnitude=None if magnitude is None else _pieces(step, magnitude)[name],
        shift=None if shift is None else replace(shift, values=_pieces(step, shift.values)[name]),
    )


def _pieces(step: Step, whole: Tensor) -> dict[str, Tensor]:
    return visible(run((step,), {step.inputs[0]: whole}, torch))


def _only(tensors: Mapping[str, Tensor]) -> Tensor:
    (tensor,) = tensors.values()
    return tensor


def _refuse_vectors(step: Step, source: LowRank) -> None:
    if source.magnitude is not None:
        raise cannot(step, "cuts across the rows that DoRA's magnitudes are the lengths of")
    if source.shift is not None:
        raise cannot(step, "divides the inputs of a layer whose adapter has a bias of its own (lora_bias)")


def cannot(step: Step, reason: str) -> RuleError:
    """The error that `step` cannot be carried out on an adapter."""
    return RuleError(f"{step.kind} of {_some(step.inputs)} into {_some(step.outputs)} {reason}")


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f", … ({len(names)})" if len(names) > 3 else "")


# ---------------------------------------------------------------- joining


def join(step: JoinStep, parts: Mapping[str, LowRank]) -> LowRank:
    """The change to the tensor that `step` makes of its parts, some of which may have none.

    Terms that share the factor which the step leaves alone become one term; the others stay side by side, with
    zeros where the rows of the other parts are. Raises `RuleError` where the whole has no such form.

    >>> a = torch.ones(2, 3)
    >>> q, k = (LowRank((4, 3), (Term(torch.ones(4, 2), a, Scaling(4, 2)),)) for _ in "qk")
    >>> other = LowRank((4, 3), (Term(torch.ones(4, 2), 2 * a, Scaling(4, 2)),))
    >>> step = JoinRows("qk", ("q", "k"), (4, 4))
    >>> join(step, {"q": q, "k": k}).rank, join(step, {"q": q, "k": other}).rank
    (2, 4)
    """
    first = next(iter(parts.values()))
    _check_alike(step, parts)
    shapes = [parts[name].shape if name in parts else _without(step, name, first.shape) for name in step.inputs]
    (shape,) = step.shapes(*shapes)
    shared = _shared_factor(step, first)
    terms = tuple(_joined_term(step, group, shared) for group in _groups(parts, shared))
    if isinstance(step, Stack):
        return LowRank(shape, terms, 1, first.outputs + 1)
    if step.dim != first.outputs:
        return LowRank(shape, terms, first.batch, first.outputs)
    along = replace(step, dim=0)
    lengths = {name: part.magnitude for name, part in parts.items() if part.magnitude is not None}
    magnitude = _merged(along, lengths) if lengths else None
    return LowRank(shape, terms, first.batch, first.outputs, magnitude, _joined_shift(along, parts))


def _shared_factor(step: JoinStep, part: LowRank) -> str | None:
    """The factor that `step` leaves alone."""
    if isinstance(step, Stack) or step.dim < part.batch:
        return None
    return "columns" if step.dim == part.batch else "rows"


def _check_alike(step: JoinStep, parts: Mapping[str, LowRank]) -> None:
    first = next(iter(parts.values()))
    if len({(part.batch, part.outputs) for part in parts.values()}) > 1:
        raise cannot(step, "puts together layers that count their outputs along different dimensions")
    if isinstance(step, Stack) and any(len(part.shape) != 2 for part in parts.values()):
        raise cannot(step, "stacks what are no matrices, and an adapter changes matrices only")
    if isinstance(step, Stack) or step.dim != first.outputs:
        for part in parts.values():
            _refuse_vectors(step, part)
    with_magnitude = {name for name, part in parts.items() if part.magnitude is not None}
    if with_magnitude and len(with_magnitude) < len(step.inputs):
        missing = ", ".join(name for name in step.inputs if name not in with_magnitude)
        raise cannot(step, f"needs a DoRA magnitude for every row; the adapter has none for {missing}")


def _without(step: JoinStep, name: str, sibling: Shape) -> Shape:
    """The shape of the part `name`, which has no adapter."""
    if isinstance(step, Stack):
        return sibling
    return (*sibling[: step.dim], step.sizes[step.parts.index(name)], *sibling[step.dim + 1 :])


Group = dict[str, Term]
"""Terms of different parts, by part, that become one."""


def _groups(parts: Mapping[str, LowRank], shared: str | None) -> list[Group]:
    groups: list[Group] = []
    for name, part in parts.items():
        for term in part.terms:
            home = next((group for group in groups if name not in group and _fits(group, term, shared)), None)
            if home is None:
                groups.append({name: term})
            else:
                home[name] = term
    return groups


def _fits(group: Group, term: Term, shared: str | None) -> bool:
    other = next(iter(group.values()))
    if (other.scaling, other.rank) != (term.scaling, term.rank):
        return False
    if shared is None:
        return True
    mine, theirs = getattr(term, shared), getattr(other, shared)
    return mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def _joined_term(step: JoinStep, group: Group, shared: str | None) -> Term:
    first = next(iter(group.values()))
    rows, columns = first.rows, first.columns
    if shared != "rows":
        rows = _merged(step, {name: term.rows for name, term in group.items()})
    if shared != "columns":
        columns = _merged(step, {name: term.columns for name, term in group.items()})
    origins = frozenset[str]().union(*(term.origins for term in group.values()))
    return Term(rows, columns, first.scaling, origins)


def _joined_shift(along: JoinStep, parts: Mapping[str, LowRank]) -> Shift | None:
    shifts = {name: part.shift for name, part in parts.items() if part.shift is not None}
    if not shifts:
        return None
    scaling = common([shift.scaling for shift in shifts.values()])
    return Shift(_merged(along, {name: shift.to(scaling).values for name, shift in shifts.items()}), scaling)


def _merged(step: JoinStep, pieces: Mapping[str, Tensor]) -> Tensor:
    """The whole that `step` makes of `pieces`, with zeros where one is missing."""
    like = next(iter(pieces.values()))

    def piece(name: str) -> Tensor:
        return pieces[name] if name in pieces else like.new_zeros(_without(step, name, tuple(like.shape)))

    return _only(run((step,), {name: piece(name) for name in step.inputs}, torch))
