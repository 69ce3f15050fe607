"""The types of the fields of a plan's records.

Every check returns the value in its one stored form (lists become tuples) or raises `ValueError` with a
sentence that goes on from the name of the field: "must be text, but is 3".
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import AfterValidator, BeforeValidator, PlainValidator, WithJsonSchema

from rewire.errors import PlanError
from rewire.plan.data import bounded, text
from rewire.plan.messages import did_you_mean, show
from rewire.targets import Target

# ---------------------------------------------------------------- checks of single values


def _identifier(value: object) -> str:
    if not text(value).isidentifier():
        raise ValueError(f"must be a plain name such as q or q_proj, but is {show(value)}")
    return str(value)


def _leaf(value: object) -> str:
    """The last part of a module's path: a name, or a number as in a ModuleList."""
    if not (text(value).isidentifier() or re.fullmatch(r"[0-9]+", str(value))):
        raise ValueError(f"must be the last part of a path, a plain name or digits, but is {show(value)}")
    return str(value)


def _part(value: object) -> str:
    """The path of a module below its parent, most often one name."""
    if not all(name.isidentifier() or re.fullmatch(r"[0-9]+", name) for name in text(value).split(".")):
        raise ValueError(f"must be the name of a child, or a path below it such as q.linear, but is {show(value)}")
    return str(value)


def _adapter(value: object) -> str:
    if not re.fullmatch(r"[^.\s]+", text(value)):
        raise ValueError(f"must be a name without dots and blanks, but is {show(value)}")
    return str(value)


def _tensor_name(value: object) -> str:
    if not re.fullmatch(r"[^.\s]+(\.[^.\s]+)*", text(value)) or str(value).count("*") > 1:
        raise ValueError(
            f"must be a tensor's name inside the module, such as qkv.weight or qkv.*, with at most one `*`, "
            f"but is {show(value)}"
        )
    return str(value)


def _target(value: object) -> str:
    if text(value) == "":
        raise ValueError("must not be empty; `**` stands for everything")
    if value == "all-linear":
        raise ValueError('must be a path or class; for every linear layer write "**:Linear"')
    try:
        return Target.parse(str(value)).text
    except PlanError as error:
        raise ValueError(str(error)) from None


def _targets(value: object) -> str | tuple[str, ...]:
    if not isinstance(value, list | tuple):
        return _target(value)
    if not value:
        raise ValueError("must name at least one place")
    return tuple(_target(item) for item in value)


def _import_path(value: object) -> str | type[Any]:
    """`package.module:Class`, or the class itself. Nothing is imported."""
    if isinstance(value, type):
        return value
    name = r"[^\W\d]\w*"
    if not isinstance(value, str) or not re.fullmatch(rf"{name}(\.{name})*:{name}(\.{name})*", value):
        raise ValueError(f'must be an import path such as "package.module:Class", but is {show(value)}')
    return value


def import_path_of(cls: type[Any]) -> str | None:
    """The path by which a class can be imported again, or None if it has none. Imports nothing."""
    if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
        return None
    found: object = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return f"{cls.__module__}:{cls.__qualname__}" if found is cls else None


def _true_or_false(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, but is {show(value)}")
    return value


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"must be a whole number, but is {show(value)}")
    return bounded(int(value))


def _positive(value: object) -> int:
    if (number := _integer(value)) < 1:
        raise ValueError(f"must be at least 1, but is {number}")
    return number


def _sequence(value: object) -> tuple[object, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be a list, but is {show(value)}")
    return tuple(value)


def _two_or_more(items: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(items) < 2:
        raise ValueError(f"must list at least two, but has {len(items)}")
    return items


def _distinct(items: tuple[Any, ...]) -> tuple[Any, ...]:
    if repeated := sorted({item for item in items if items.count(item) > 1}):
        raise ValueError(f"lists {show(repeated[0])} more than once")
    return items


def _one_of(choices: Sequence[str], value: object) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"is {show(value)}{did_you_mean(value, choices)} (allowed: {', '.join(choices)})")
    return value


# ---------------------------------------------------------------- the types of fields

Layout: TypeAlias = Literal["auto", "stacked", "per_head", "grouped", "interleaved"]
TensorLayout: TypeAlias = Literal["stacked", "per_head", "grouped", "interleaved"]
Dtype: TypeAlias = Literal["float32", "bfloat16", "float16", "float64"]
ProductDtype: TypeAlias = Literal["bfloat16", "int8"]
Padding: TypeAlias = Literal["zeros", "original"]


def _plain(check: Callable[[Any], Any], **schema: Any) -> tuple[Any, Any]:
    return PlainValidator(check), WithJsonSchema(schema)


def _choice(literal: Any) -> tuple[Any, Any]:
    choices = get_args(literal)
    return _plain(functools.partial(_one_of, choices), enum=list(choices))


_LEAF = {"type": "string", "pattern": r"^[^.\s]+$"}
_PART = {"type": "string", "pattern": r"^[^.\s]+(\.[^.\s]+)*$"}
_PLACE = {"type": "string", "pattern": r"^\S+$"}
_TENSOR = {"type": "string", "pattern": r"^[^.*\s]*(\.[^.*\s]+)*(\.?\*)?[^*\s]*$", "minLength": 1}
_COUNT = {"type": "integer", "minimum": 1}
_TWO = {"type": "array", "minItems": 2}

Text = Annotated[str, *_plain(text, type="string")]
Flag = Annotated[bool, *_plain(_true_or_false, type="boolean")]
Integer = Annotated[int, *_plain(_integer, type="integer")]
Count = Annotated[int, *_plain(_positive, **_COUNT)]
Identifier = Annotated[str, *_plain(_identifier, **_LEAF)]
Leaf = Annotated[str, *_plain(_leaf, **_LEAF)]
Part = Annotated[str, *_plain(_part, **_PART)]
AdapterName = Annotated[str, *_plain(_adapter, **_LEAF)]
TensorName = Annotated[str, *_plain(_tensor_name, **_TENSOR)]
OneTarget = Annotated[str, *_plain(_target, **_PLACE)]
Targets = Annotated[
    str | tuple[str, ...],
    *_plain(_targets, anyOf=[_PLACE, {"type": "array", "items": _PLACE, "minItems": 1}]),
]
ImportPath = Annotated[str | type[Any], *_plain(_import_path, type="string", pattern=r"^[\w.]+:[\w.]+$")]
LayoutName = Annotated[Layout, *_choice(Layout)]
TensorLayoutName = Annotated[TensorLayout, *_choice(TensorLayout)]
DtypeName = Annotated[Dtype, *_choice(Dtype)]
PackedDtype = Annotated[ProductDtype, *_choice(ProductDtype)]
PaddingValues = Annotated[Padding, *_choice(Padding)]


def _several(items: dict[str, Any], *checks: Callable[[Any], Any], unique: bool) -> tuple[Any, ...]:
    """Annotations of a list of two or more."""
    schema = {**_TWO, "items": items} | ({"uniqueItems": True} if unique else {})
    after = [AfterValidator(check) for check in (_two_or_more, *checks)]
    return (BeforeValidator(_sequence), *after, WithJsonSchema(schema))


Identifiers = Annotated[tuple[Identifier, ...], *_several(_LEAF, _distinct, unique=True)]
Parts = Annotated[tuple[Part, ...], *_several(_PART, _distinct, unique=True)]
TensorNames = Annotated[tuple[TensorName, ...], *_several(_TENSOR, _distinct, unique=True)]
Counts = Annotated[tuple[Count, ...], *_several(_COUNT, unique=False)]
Sequenced = BeforeValidator(_sequence)
