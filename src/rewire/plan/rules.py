"""Tensor rules inside `Replace`: how a replaced module's tensors become the new one's, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from rewire.plan.fields import Count, Counts, DtypeName, Integer, TensorLayoutName, TensorName, TensorNames
from rewire.plan.messages import misfit
from rewire.plan.record import Record, record


@record
class TensorRule(Record):
    """Base of the rules that say how a replaced module's tensors become the new one's.

    Names are relative to the module. One `*` may stand for the rest of a name (`weight`, `bias`), and then it
    stands for the same in every name of the rule.
    """

    def _stars(self) -> Mapping[str, tuple[str, ...]]:
        """The names on the way in and on the way out, by the key that holds them."""
        return {}

    @model_validator(mode="after")
    def _same_stars(self) -> TensorRule:
        starred = {"*" in name for names in self._stars().values() for name in names}
        if len(starred) > 1:
            raise misfit({"into": "must have a `*` in every name if 'from' has one, and none otherwise"})
        return self


def check_rows(into: tuple[str, ...] | None, layout: str, sizes: tuple[int, ...] | None, groups: int | None) -> None:
    """Check what `into`, `layout`, `sizes` and `groups` must have to do with each other."""
    wrong: dict[str, str] = {}
    if into is not None and sizes is not None and len(into) != len(sizes):
        wrong["sizes"] = f"must have one number for each part: {len(into)} parts, {len(sizes)} sizes"
    if layout == "stacked" and groups not in (None, 1):
        wrong["groups"] = f"must be 1 (or left out) where rows are stacked, but is {groups}"
    if layout == "interleaved" and sizes is not None and len(set(sizes)) > 1:
        wrong["sizes"] = "must all be equal where single rows alternate"
    if groups is not None and sizes is not None and any(size % groups for size in sizes):
        wrong.setdefault("sizes", f"must each be divisible by groups={groups}")
    if wrong:
        raise misfit(wrong)


@record
class SplitTensor(TensorRule):
    """Cut one tensor into several along `dim`.

    >>> SplitTensor("qkv.*", into=("q.*", "k.*", "v.*")).to_dict()
    {'split': {'from': 'qkv.*', 'into': ['q.*', 'k.*', 'v.*']}}
    """

    kind: ClassVar[str] = "split"
    source: Annotated[TensorName, Field(alias="from")]
    into: TensorNames
    layout: TensorLayoutName = "stacked"
    sizes: Counts | None = None
    groups: Count | None = None
    dim: Integer = 0

    def _stars(self) -> Mapping[str, tuple[str, ...]]:
        return {"from": (self.source,), "into": self.into}

    @model_validator(mode="after")
    def _rows(self) -> SplitTensor:
        check_rows(self.into, self.layout, self.sizes, self.groups)
        return self


@record
class JoinTensor(TensorRule):
    """Put several tensors together along `dim`; the opposite of `SplitTensor`."""

    kind: ClassVar[str] = "join"
    sources: Annotated[TensorNames, Field(alias="from")]
    into: TensorName
    layout: TensorLayoutName = "stacked"
    sizes: Counts | None = None
    groups: Count | None = None
    dim: Integer = 0

    def _stars(self) -> Mapping[str, tuple[str, ...]]:
        return {"from": self.sources, "into": (self.into,)}

    @model_validator(mode="after")
    def _rows(self) -> JoinTensor:
        check_rows(self.sources, self.layout, self.sizes, self.groups)
        return self


@record
class RenameTensor(TensorRule):
    """Give a tensor another name.

    >>> RenameTensor("proj.*", into="out.*")
    RenameTensor(source='proj.*', into='out.*')
    """

    kind: ClassVar[str] = "rename"
    source: Annotated[TensorName, Field(alias="from")]
    into: TensorName

    def _stars(self) -> Mapping[str, tuple[str, ...]]:
        return {"from": (self.source,), "into": (self.into,)}


@record
class TransposeTensor(TensorRule):
    """Swap the two dimensions of a matrix, under a new name if `into` is given."""

    kind: ClassVar[str] = "transpose"
    source: Annotated[TensorName, Field(alias="from")]
    into: TensorName | None = None

    def _stars(self) -> Mapping[str, tuple[str, ...]]:
        return {"from": (self.source,), "into": (self.source if self.into is None else self.into,)}


@record
class DropTensor(TensorRule):
    """Leave a tensor out: the new module has no use for it."""

    kind: ClassVar[str] = "drop"
    source: Annotated[TensorName, Field(alias="from")]


@record
class CastTensor(TensorRule):
    """Store a tensor with another dtype."""

    kind: ClassVar[str] = "cast"
    source: Annotated[TensorName, Field(alias="from")]
    dtype: DtypeName


TENSOR_RULES: tuple[type[TensorRule], ...] = (
    SplitTensor,
    JoinTensor,
    RenameTensor,
    TransposeTensor,
    DropTensor,
    CastTensor,
)
