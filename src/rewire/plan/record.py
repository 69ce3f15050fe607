"""What every record of a plan is: frozen, equal by value, written without its defaults."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from inspect import signature
from typing import Any, ClassVar, TypeVar, dataclass_transform

from pydantic import ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import core_schema

from rewire.errors import Issue, PlanError
from rewire.plan.data import thaw
from rewire.plan.fields import import_path_of
from rewire.plan.messages import Place, Problem, explain, where

R = TypeVar("R", bound="Record")


class Record:
    """Base of all records: equal by value, hashable, and shown without its defaults."""

    kind: ClassVar[str]
    children: ClassVar[Mapping[str, tuple[type[Record], ...]]] = {}  # records listed in a field, by its key

    def __repr__(self) -> str:
        given = [f"{name}={value!r}" for name, value in self._given().items()]
        return f"{type(self).__name__}({', '.join(given)})"

    def to_dict(self) -> dict[str, Any]:
        """The record as it stands in a plan file: one key, its kind; defaults left out.

        >>> from rewire.plan import Split
        >>> Split("a.qkv", into=("q", "k")).to_dict()
        {'split': {'target': 'a.qkv', 'into': ['q', 'k']}}
        """
        names = self.file_keys()
        return {self.kind: {names.get(name, name): _to_data(value) for name, value in self._given().items()}}

    @classmethod
    def file_keys(cls) -> dict[str, str]:
        """Every field with the key that it has in a plan file (`with_` is `with` there)."""
        aliases = cls.__pydantic_fields__  # type: ignore[attr-defined]
        ordered = sorted(fields(cls), key=lambda one: one.kw_only is True)  # type: ignore[arg-type]
        return {one.name: aliases[one.name].alias or one.name for one in ordered}

    @classmethod
    def known_keys(cls, *, in_python: bool = False) -> list[str]:
        """The keys that the record may have in a plan file, or the arguments of its constructor."""
        return [name if in_python else key for name, key in cls.file_keys().items()]

    @classmethod
    def file_schema(cls, made: dict[str, Any]) -> dict[str, Any]:
        """The JSON Schema of the settings, given what pydantic makes of the fields."""
        return made

    def _given(self) -> dict[str, Any]:
        """The fields that differ from their default."""
        defaults = {one.name: _default(one) for one in fields(self)}  # type: ignore[arg-type]
        values = {name: getattr(self, name) for name in self.file_keys()}
        return {name: value for name, value in values.items() if defaults[name] is MISSING or value != defaults[name]}


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _to_data(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, type):
        return importable(value)
    return [_to_data(item) for item in value] if isinstance(value, tuple) else thaw(value)


def importable(value: str | type[Any]) -> str:
    """The import path of a class; `PlanError` if it has none."""
    path = value if isinstance(value, str) else import_path_of(value)
    if path is None:
        raise PlanError(
            f"{value!r} cannot be imported by a path, so this plan can be applied in this process but not "
            "written or hashed; move the class to the top level of a module"
        )
    return path


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(cls: type[R]) -> type[R]:
    """Make a class a frozen pydantic dataclass whose constructor raises `PlanError` with every problem."""
    # In Python a field has its own name, in a file its alias; reading a file switches over.
    config = ConfigDict(extra="forbid", validate_by_name=True, validate_by_alias=False)
    declared = cls.__dict__.get("__init__")
    made: Any = pydantic_dataclass(frozen=True, repr=False, config=config)(cls)
    generated = made.__init__
    positional = [one.name for one in fields(made) if one.init and not one.kw_only]

    @functools.wraps(declared or generated)
    def __init__(self: R, *args: Any, **kwargs: Any) -> None:
        given = _by_name(type(self), positional, args, kwargs)
        try:
            generated(self, **given)
        except ValidationError as error:
            keys = functools.partial(keys_below, self.known_keys(in_python=True), self.children)
            raise _not_valid(type(self), explain(error, keys)) from None

    made.__init__ = __init__
    if declared is not None:  # pydantic's would show fields that cannot be given
        made.__signature__ = signature(functools.partial(declared, None))
    return made  # type: ignore[no-any-return]


def _by_name(cls: type[Record], names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, so that every message can name what it speaks of."""
    if len(args) > len(names):
        message = f"takes {len(names)} positional arguments ({', '.join(names)}), but got {len(args)}"
        raise _not_valid(cls, [Problem((), message)])
    given = dict(zip(names, args, strict=False))
    if twice := given.keys() & kwargs.keys():
        raise _not_valid(cls, [Problem((name,), "is given twice") for name in sorted(twice)])
    return given | kwargs


def _not_valid(cls: type[Record], problems: list[Problem]) -> PlanError:
    issues = tuple(Issue(problem.message, where=where(problem.place)) for problem in problems)
    return PlanError(f"this {cls.__name__} is not valid:", issues)


def keys_below(keys: Sequence[str], children: Mapping[str, tuple[type[Record], ...]], place: Place) -> Sequence[str]:
    """The keys allowed at a place, seen from a mapping that has these keys and lists these records."""
    if not place:
        return keys
    listed = {one.kind: one for one in children.get(str(place[0]), ())}
    found = listed.get(str(place[2])) if len(place) > 2 else None
    return list(listed) if found is None else keys_below(found.known_keys(), found.children, place[3:])


class Keyed:
    """Annotation: in a plan file such a record is a mapping with one key, its kind."""

    def __init__(self, *records: type[Record]) -> None:
        self.records = {one.kind: one for one in records}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """A union told apart by the key, so that errors carry the key in their place."""
        choices: dict[Any, core_schema.CoreSchema] = {
            kind: core_schema.no_info_before_validator_function(
                functools.partial(_below, kind), handler.generate_schema(cls)
            )
            for kind, cls in self.records.items()
        }
        return core_schema.tagged_union_schema(choices, discriminator=_kind_of)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """One key, and below it the record."""
        choices: Mapping[str, Any] = schema["choices"]
        return {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {kind: self.records[kind].file_schema(handler(choice["schema"]))},
                    "required": [kind],
                    "additionalProperties": False,
                }
                for kind, choice in choices.items()
            ]
        }


def _kind_of(value: object) -> str | None:
    if isinstance(value, Mapping):
        return str(next(iter(value))) if len(value) == 1 else None
    return getattr(value, "kind", None)


def _below(kind: str, value: Any) -> Any:
    return value[kind] if isinstance(value, Mapping) else value
