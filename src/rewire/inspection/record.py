"""What `inspect` finds, as frozen records that go to JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rewire.plan import Plan
from rewire.receipts import Counts

if TYPE_CHECKING:
    from rich.console import RenderableType

FORMAT = 1
"""Version of the JSON form, under the key `rewire_inspection`."""


@dataclass(frozen=True)
class Family:
    """Projections of one kind, alike in all but the number of their layer.

    Attributes:
        kind: `"fused attention"`, `"fused mlp"`, `"separate attention"` or `"separate mlp"`; `"fused"` where
            it is not even known what the rows are; `"stacked experts"` or `"separate experts"`.
        path: a target that matches exactly these places: the fused linear, the parent of separate ones, or the
            module of experts.
        count: how many places that is.
        module: class of the linear layer, or of the module of experts.
        owner: class of the module that holds it.
        in_features: size of its input.
        parts: names of the parts, in the order of the rows.
        roles: what each part is: q, k, v, gate, up.
        sizes: rows of each part.
        layout: how the rows lie (`stacked`, `per_head`, `grouped`, `interleaved`); None for separate ones.
        groups: how many groups of rows there are; None for separate ones.
        transposed: whether the weight is `[in, out]`.
        experts: how many experts each of these places has, whose parts these are; None for everything else.
        evidence: how this is known.
        edit: what may be done, as it stands in a plan; None if nothing.
        refusal: why nothing may be done; None if something may.
        alone: whether that cannot stand in one plan with the edits of the families before it.
    """

    kind: str
    path: str
    count: int
    module: str
    owner: str
    in_features: int | None = None
    parts: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    layout: str | None = None
    groups: int | None = None
    transposed: bool = False
    experts: int | None = None
    evidence: tuple[str, ...] = ()
    edit: Mapping[str, Any] | None = None
    refusal: str | None = None
    alone: bool = False


@dataclass(frozen=True)
class Node:
    """A module, or several siblings with all-digit names that are alike.

    Attributes:
        names: names in the parent, one for each of the siblings; empty for the model itself.
        module: class.
        parameters: elements of the parameters of one of them, tied ones counted once.
        detail: sizes in brief.
        note: what projections were found here.
        children: what it holds.
    """

    names: tuple[str, ...]
    module: str
    parameters: int
    detail: str = ""
    note: str = ""
    children: tuple[Node, ...] = ()


@dataclass(frozen=True)
class EncoderReport:
    """A stack of layers with attention, and whether `Pack` can run it without padding.

    Attributes:
        path: a target for `Pack`.
        module: class of the layers.
        count: how many there are; 0 where they were not looked at one by one.
        how: how they would run packed; None if they cannot.
        refusal: why they cannot; None if they can.
    """

    path: str
    module: str
    count: int
    how: str | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Inspection:
    """A model seen from outside.

    Attributes:
        model: class of the model.
        model_type: what its configuration calls it; None without one.
        counts: parameters, trainable ones and bytes.
        dtypes: types of the parameters, the most frequent first.
        families: the projections found, with what may be done to them.
        plan_hash: hash of the plan that the model was edited by; None for an untouched one.
        tree: the modules.
        encoders: what could be packed and what not; None where that was not asked.
    """

    model: str
    model_type: str | None
    counts: Counts
    dtypes: tuple[str, ...]
    families: tuple[Family, ...]
    plan_hash: str | None = None
    tree: Node = field(repr=False, default_factory=lambda: Node((), "", 0))
    encoders: tuple[EncoderReport, ...] | None = None

    @property
    def plan(self) -> Plan | None:
        """A plan of every edit that may be made beside the others; None if there is none."""
        edits = [dict(one.edit) for one in self.families if one.edit is not None and not one.alone]
        return Plan.from_dict({"rewire": 1, "edits": edits}) if edits else None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {"rewire_inspection": FORMAT, **asdict(self)}

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    def __rich__(self) -> RenderableType:
        from rewire.inspection.view import view

        return view(self)
