"""One record per kind of edit.

A record says what to change and how, and knows nothing about models; the file of the same name under
`rewire/edits` carries it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import ArgsKwargs

from rewire.plan.data import FrozenMapping, thaw
from rewire.plan.fields import (
    AdapterName,
    Count,
    Counts,
    DtypeName,
    Flag,
    Identifier,
    Identifiers,
    ImportPath,
    LayoutName,
    Leaf,
    OneTarget,
    PackedDtype,
    PaddingValues,
    Parts,
    Sequenced,
    Targets,
    import_path_of,
)
from rewire.plan.lora_options import lora_option_names, lora_options
from rewire.plan.record import Keyed, Record, record
from rewire.plan.rules import TENSOR_RULES, TensorRule, check_rows
from rewire.targets import Target

Promise: TypeAlias = Literal["exact", "additive", "rounding", "lossy"]

#: From the strongest to the weakest, by how far the outputs may lie from the original's. `additive` stands
#: before `rounding` because a fresh adapter adds exactly nothing.
PROMISES: tuple[Promise, ...] = ("exact", "additive", "rounding", "lossy")


@record
class Edit(Record):
    """Base of all edits: `target` says where, `promise` how near the outputs stay to the original's.

    A target that matches nothing is an error, unless the edit is `optional`.
    """

    promise: ClassVar[Promise]
    target: Targets
    optional: Flag = field(default=False, kw_only=True)

    @property
    def targets(self) -> tuple[Target, ...]:
        """The parsed targets; a place is meant if any of them matches it.

        >>> [target.path_matches("h.0.attn") for target in Freeze(target=("h.*.attn", "h.*.mlp")).targets]
        [True, False]
        """
        texts = (self.target,) if isinstance(self.target, str) else self.target
        return tuple(self._parse(text) for text in texts)

    def _parse(self, text: str) -> Target:
        return Target.parse(text)


@record
class Split(Edit):
    """Cut a fused linear layer (`qkv`, `gate_up`, …) into its parts, which become children of the module.

    `into` names the parts in the order in which their rows occur, so CodeGen's is `("q", "v", "k")`.
    `layout` says how the rows of a fused weight lie. They are `groups` groups, and each holds some rows of
    every part in turn:

    - `stacked`: one group, so all rows of the first part, then all of the second, …
    - `per_head`: a group per attention head
    - `grouped`: a group per key-value group, its queries, its key and its value
    - `interleaved`: single rows alternate
    - `auto`: found by structure and config, and refused where that does not settle it

    `sizes` gives the rows of each part in total, where they cannot be found (`into` in the same order).

    >>> Split("transformer.h.*.attn.c_attn", into=("q", "k", "v"), layout="stacked").promise
    'exact'
    """

    kind: ClassVar[str] = "split"
    promise: ClassVar[Promise] = "exact"
    target: OneTarget
    into: Identifiers | None = None
    layout: LayoutName = "auto"
    sizes: Counts | None = None
    groups: Count | None = None

    @model_validator(mode="after")
    def _rows(self) -> Split:
        check_rows(self.into, self.layout, self.sizes, self.groups)
        return self


@record
class Join(Edit):
    """Put linear layers of the same input together into one: `target` is their parent, `parts` its children.

    A part may stand deeper, where a child only wraps it: `q_proj.linear`.

    >>> Join("encoder.layer.*.attention.self", parts=("query", "key", "value"), name="qkv").promise
    'exact'
    """

    kind: ClassVar[str] = "join"
    promise: ClassVar[Promise] = "exact"  # the same sums, which one large product may add in another order
    target: OneTarget
    parts: Parts
    name: Identifier | None = None


@record
class Unstack(Edit):
    """Give every expert linear layers of its own, where all experts' weights lie in three-dimensional tensors.

    `target` is the module that holds these tensors; afterwards its children `0`, `1`, … are the experts. With
    `views` the layers are views of the tensors, which stay: no copy, and a model that is only read keeps its speed.

    >>> Unstack("model.layers.*.mlp.experts", views=True).views
    True
    """

    kind: ClassVar[str] = "unstack"
    promise: ClassVar[Promise] = "exact"
    target: OneTarget
    views: Flag = False


@record
class Stack(Edit):
    """Put the weights of all experts into one tensor per projection: `target` is the module that holds the experts.

    Experts that `Unstack` took apart become the module that they were. Where a model has separate experts by
    itself, these stay, and their linear layers read their slice of the tensor.

    >>> Stack("encoder.block.*.layer.*.mlp.experts").promise
    'exact'
    """

    kind: ClassVar[str] = "stack"
    promise: ClassVar[Promise] = "exact"
    target: OneTarget


@record
class Replace(Edit):
    """Put another module in place of one; `tensors` says how its tensors become the new one's.

    `with_` is an import path, never imported here (carrying it out needs the caller's consent), or in Python
    the class itself. A class without an import path works too, but then the plan cannot be written or hashed.

    >>> from rewire.plan import RenameTensor
    >>> edit = Replace("enc.*.attn", with_="pkg.attention:Attention", tensors=[RenameTensor("w", "weight")])
    >>> edit.to_dict()["replace"]["tensors"]
    [{'rename': {'from': 'w', 'into': 'weight'}}]
    """

    kind: ClassVar[str] = "replace"
    children: ClassVar[Mapping[str, tuple[type[Record], ...]]] = {"tensors": TENSOR_RULES}
    promise: ClassVar[Promise] = "exact"
    target: OneTarget
    with_: Annotated[ImportPath, Field(alias="with")]
    tensors: Annotated[tuple[Annotated[TensorRule, Keyed(*TENSOR_RULES)], ...], Sequenced] = ()

    def __eq__(self, other: object) -> bool:
        return self._identity() == other._identity() if isinstance(other, Replace) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        """A class and its import path are the same thing, so that a plan equals itself read from a file."""
        path = self.with_ if isinstance(self.with_, str) else import_path_of(self.with_)
        return self.target, path or self.with_, self.tensors, self.optional


@record
class Lora(Edit):
    """Add a LoRA adapter; every option of `peft.LoraConfig` but `target_modules` passes through.

    A target of one plain level (`q`) means every module of that name, wherever it stands, as in peft.

    >>> edit = Lora(target=("q", "v"), r=16, lora_alpha=32, use_dora=True)
    >>> edit.options["r"], edit.adapter, edit.targets[0].path_matches("vision_encoder.layers.0.attn.qkv.q")
    (16, 'default', True)
    """

    kind: ClassVar[str] = "lora"
    promise: ClassVar[Promise] = "additive"
    target: Targets
    adapter: AdapterName = "default"
    options: Annotated[FrozenMapping, PlainValidator(lora_options), WithJsonSchema({})] = field(
        default_factory=FrozenMapping, kw_only=True
    )

    def __init__(
        self,
        target: str | tuple[str, ...],
        adapter: str = "default",
        *,
        optional: bool = False,
        **options: Any,
    ) -> None:
        """Only what can be given; as for every record, `record` puts the constructor in place."""

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        """Every key that is no field is an option."""
        if isinstance(data, ArgsKwargs):
            data = data.kwargs or {}
        if not isinstance(data, Mapping):
            return data
        own = {name: value for name, value in data.items() if name in ("target", "adapter", "optional")}
        options = {name: value for name, value in data.items() if name not in own}
        if isinstance(copied := options.get("options"), FrozenMapping):  # from `dataclasses.replace`
            options = {**copied, **{name: value for name, value in options.items() if name != "options"}}
        return own | {"options": options}

    @classmethod
    def file_schema(cls, made: dict[str, Any]) -> dict[str, Any]:
        """The options are checked against the installed peft, so the schema leaves them open."""
        own = {key: value for key, value in made["properties"].items() if key != "options"}
        return {**made, "properties": {**own, "target_modules": False}, "additionalProperties": True}

    def peft_options(self) -> dict[str, Any]:
        """The options as fresh plain data, to be passed to `peft.LoraConfig`."""
        return dict(thaw(self.options))

    @classmethod
    def known_keys(cls, *, in_python: bool = False) -> list[str]:
        """Those of every edit and those of peft."""
        own = [key for key in super().known_keys(in_python=in_python) if key != "options"]
        return own + sorted((lora_option_names() or frozenset()) - {"target_modules"})

    def _parse(self, text: str) -> Target:
        target = Target.parse(text)
        bare = target.structural is None and "." not in target.glob and target.glob != "**"
        return Target.parse(f"**.{text}") if bare else target

    def _given(self) -> dict[str, Any]:
        """The options stand beside the fields."""
        given = super()._given()
        options = thaw(given.pop("options", {}))
        return {**given, **options}


@record
class Freeze(Edit):
    """Stop training the parameters of a part.

    >>> Freeze("**:Embedding")
    Freeze(target='**:Embedding')
    """

    kind: ClassVar[str] = "freeze"
    promise: ClassVar[Promise] = "exact"


@record
class Unfreeze(Edit):
    """Train the parameters of a part again."""

    kind: ClassVar[str] = "unfreeze"
    promise: ClassVar[Promise] = "exact"


@record
class Cast(Edit):
    """Store the parameters of a part with another dtype.

    With `keep_original` the wide tensors are kept aside, so that going back is bit-equal.

    >>> Cast("lm_head", dtype="bfloat16").keep_original
    True
    """

    kind: ClassVar[str] = "cast"
    promise: ClassVar[Promise] = "lossy"
    dtype: DtypeName
    keep_original: Flag = True


@record
class Rename(Edit):
    """Give a module another name in its parent; `to` is the last part of the new path.

    >>> Rename("model.norm", to="final_norm").to
    'final_norm'
    """

    kind: ClassVar[str] = "rename"
    promise: ClassVar[Promise] = "exact"
    target: OneTarget
    to: Leaf


class _ByDtype:
    """The promise of `Pack`: on the class what it promises in float32, on a record what its dtype allows."""

    def __get__(self, edit: Pack | None, owner: type[Pack]) -> Promise:
        return "rounding" if edit is None or edit.dtype is None else "lossy"


@record
class Pack(Edit):
    """Run an encoder on its real tokens alone: padding is left out before its first layer and put back after the last.

    `target` is a list of encoder layers, or the module that calls them; `@encoder` finds them all. The modules and
    their tensors stay what they are.

    - `dtype`: `bfloat16` or `int8` for the operands of products; by default they keep their type
    - `padding`: what padded positions of the output hold, `zeros` or the `original`'s values; for the latter, batches
      with padding run untouched
    - `prepare`: whether a second copy of the weights is kept in memory, ready for faster products

    >>> Pack("@encoder").promise, Pack("@encoder", dtype="int8").promise
    ('rounding', 'lossy')
    """

    kind: ClassVar[str] = "pack"
    promise: ClassVar[Any] = _ByDtype()
    target: OneTarget
    dtype: PackedDtype | None = None
    padding: PaddingValues = "zeros"
    prepare: Flag = True


EDITS: tuple[type[Edit], ...] = (Split, Join, Unstack, Stack, Replace, Lora, Freeze, Unfreeze, Cast, Rename, Pack)
