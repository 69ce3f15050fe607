"""What is said when a plan is wrong: findings of pydantic and of our own checks, in plain words."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

Place: TypeAlias = tuple[int | str, ...]
"""Where in a plan something stands: `("edits", 1, "split", "layout")`."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a plan; `at_key` tells a wrong key from a wrong value."""

    place: Place
    message: str
    at_key: bool = False


def misfit(messages: Mapping[str, str]) -> ValidationError:
    """An error for pydantic that speaks of several fields at once."""
    details = [
        InitErrorDetails(type=PydanticCustomError("misfit", "{said}", {"said": said}), loc=(name,), input=None)
        for name, said in messages.items()
    ]
    return ValidationError.from_exception_data("plan", details)


def unknown_key(name: object, allowed: Iterable[str]) -> str:
    """What is said about a key that is not known."""
    allowed = list(allowed)
    return f"unknown key '{name}'{did_you_mean(name, allowed)} (allowed: {', '.join(allowed)})"


def explain(error: ValidationError, keys: Callable[[Place], Sequence[str]]) -> list[Problem]:
    """Pydantic's findings in our words. `keys` tells which keys a mapping at a place may have."""
    return [_explain_one(detail, keys) for detail in error.errors(include_url=False)]


def _explain_one(detail: Any, keys: Callable[[Place], Sequence[str]]) -> Problem:
    place: Place = _outside_options(detail["loc"])
    match detail["type"]:
        case "value_error":
            return Problem(place, str(detail["ctx"]["error"]))
        case "misfit":
            return Problem(place, detail["ctx"]["said"], at_key=True)
        case "missing":
            return Problem(place, f"missing key '{place[-1]}'; it has to be given")
        case "unexpected_keyword_argument" | "extra_forbidden" | "invalid_key":
            return Problem(place, unknown_key(place[-1], keys(place[:-1])), at_key=True)
        case "union_tag_invalid" | "union_tag_not_found":
            return _explain_kind(place, detail["input"], keys(place))
        case "dataclass_type" | "model_type" | "dict_type":
            allowed = ", ".join(keys(place))
            return Problem(place, f"must be a mapping with keys ({allowed}), but is {show(detail['input'])}")
    return Problem(place, detail["msg"])


def _outside_options(place: Place) -> Place:
    """Lora keeps peft's options in a field of their own; in a plan they stand beside the other keys."""
    at = place.index("options") if "options" in place[:-1] else None
    return place if at is None else place[:at] + place[at + 1 :]


def _explain_kind(place: Place, found: object, kinds: Sequence[str]) -> Problem:
    """Something stands where one key naming the kind of edit or rule should."""
    allowed = f"(allowed: {', '.join(kinds)})"
    if not isinstance(found, Mapping):
        return Problem(place, f"must be a mapping with one key, the kind, but is {show(found)} {allowed}")
    if len(found) == 1:
        kind = next(iter(found))
        return Problem((*place, str(kind)), unknown_key(kind, kinds), at_key=True)
    if known := next((kind for kind in kinds if kind in found), None):
        return Problem(place, f"'{known}' must be the only key here; indent its settings below it")
    return Problem(place, f"must have exactly one key, the kind, but has {len(found)} {allowed}")


def where(place: Place) -> str:
    """`edits[1].split.layout` for `("edits", 1, "split", "layout")`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def show(value: object, limit: int = 60) -> str:
    """A value as a message shows it: short, and as it would stand in a plan."""
    if value is None:
        return "empty"
    try:
        shown = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        shown = f"an object of type {type(value).__name__}"
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`; did you mean 'layout'?`, or nothing if nothing is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
