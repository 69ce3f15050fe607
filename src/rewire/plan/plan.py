"""The plan itself: an ordered list of edits, with a hash, read and written as YAML or JSON."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError, WithJsonSchema

from rewire.errors import Issue, PlanError
from rewire.plan import text as files
from rewire.plan.data import canonical
from rewire.plan.edits import EDITS, PROMISES, Edit, Promise
from rewire.plan.fields import Sequenced, Text
from rewire.plan.messages import Place, Problem, explain, show, where
from rewire.plan.record import Keyed, keys_below
from rewire.plan.resolved import Resolved

VERSION = 1


@dataclass(frozen=True, init=False)
class Plan:
    """What to do to a model: edits, carried out in their order.

    >>> from rewire.plan import Lora, Split
    >>> plan = Plan([Split("layers.*.attn.qkv", into=("q", "k", "v")), Lora(("q", "v"), r=16)], name="qv")
    >>> print(plan.to_yaml(), end="")
    rewire: 1
    name: qv
    edits:
    - split:
        target: layers.*.attn.qkv
        into: [q, k, v]
    - lora:
        target: [q, v]
        r: 16
    >>> Plan.from_yaml(plan.to_yaml()) == plan, plan.promise, len(plan)
    (True, 'additive', 2)
    """

    edits: tuple[Edit, ...]
    name: str | None = None
    description: str | None = None
    resolved: Resolved | None = None

    def __init__(
        self,
        edits: Iterable[Edit],
        name: str | None = None,
        description: str | None = None,
        resolved: Resolved | None = None,
    ) -> None:
        words = {"name": name, "description": description}
        try:
            file = _File(rewire=VERSION, **words, edits=_only_edits(edits), resolved=resolved)
        except ValidationError as error:
            problems = explain(error, _keys)
            raise _not_valid(None, [_issue(one, files.Document(None), None) for one in problems]) from None
        for key in ("edits", "name", "description", "resolved"):
            object.__setattr__(self, key, getattr(file, key))

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    @property
    def promise(self) -> Promise:
        """The weakest promise of the edits: what may be expected of the whole."""
        return max((edit.promise for edit in self.edits), key=PROMISES.index, default="exact")

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the edits, whatever they were written in; nothing else counts.

        >>> from rewire.plan import Cast
        >>> one, other = Plan([Cast("a", "float16")]), Plan.from_yaml("rewire: 1\\nname: x\\nedits: []")
        >>> one.hash == Plan.from_json(one.to_json()).hash, one.hash == other.hash
        (True, False)
        """
        data = {"rewire": VERSION, "edits": [edit.to_dict() for edit in self.edits]}
        return hashlib.sha256(canonical(data).encode("ascii")).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, as it stands in a file; defaults are left out."""
        words = {"name": self.name, "description": self.description}
        said = {key: value for key, value in words.items() if value is not None}
        resolved = self.resolved.to_dict() if self.resolved is not None else {}
        return {"rewire": VERSION, **said, "edits": [edit.to_dict() for edit in self.edits], **resolved}

    def to_yaml(self) -> str:
        """The plan as the text of a YAML file."""
        return files.to_yaml(self.to_dict())

    def to_json(self) -> str:
        """The plan as the text of a JSON file."""
        return files.to_json(self.to_dict())

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a file, JSON if it is named so and YAML otherwise; one that stands there is replaced."""
        path = Path(path)
        files.write(path, self.to_json() if _is_json(path) else self.to_yaml())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that plain data describes; `PlanError` with every problem."""
        return _settle(*_validate(files.Document(data), None), file=None)

    @classmethod
    def from_yaml(cls, text: str) -> Plan:
        """The plan in the text of a YAML file; `PlanError` with every problem and its line."""
        return _settle(*_from_text(text, as_json=False, file=None), file=None)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan in the text of a JSON file; `PlanError` with every problem and its line."""
        return _settle(*_from_text(text, as_json=True, file=None), file=None)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Plan:
        """The plan in a file, JSON if it is named so and YAML otherwise; `PlanError` with every problem."""
        return _settle(*_from_file(Path(path), str(path)), file=str(path))


def check(path_or_text: str | os.PathLike[str], file: str | None = None) -> list[Issue]:
    """Everything that is wrong with a plan, in the order of its lines; empty if it is right.

    A text is told from a path by its line breaks; without any, it is a path if such a file exists or its name
    ends as a plan's would. `file` is the name to show.

    >>> for issue in check("rewire: 1\\nedits:\\n- split: {target: a.qkv, layuot: stacked}\\n", "my.yaml"):
    ...     print(issue)
    my.yaml:3: edits[0].split.layuot: unknown key 'layuot'; did you mean 'layout'? (allowed: ...)
    """
    if _is_path(path_or_text):
        return _from_file(Path(path_or_text), file or str(path_or_text))[1]
    text = str(path_or_text)
    return _from_text(text, as_json=_is_json(Path(file or "")), file=file)[1]


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a plan file, for editors and for other languages.

    It knows keys, types and choices. What one value means for another, what a target may look like, and the
    names of peft's options are left to `check`.

    >>> json_schema()["required"]
    ['rewire', 'edits']
    """
    schema = _tidy(_File.model_json_schema(by_alias=True))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Rewire plan"}


# ---------------------------------------------------------------- a file's view of a plan


def _version(value: object) -> int:
    if isinstance(value, bool) or value != VERSION:
        raise ValueError(
            f"is format version {show(value)}, and this Rewire reads version {VERSION} only; a newer Rewire may read it"
        )
    return VERSION


class _File(BaseModel):
    """The whole of a plan file."""

    model_config = ConfigDict(extra="forbid")
    rewire: Annotated[int, PlainValidator(_version), WithJsonSchema({"const": VERSION})]
    name: Text | None = None
    description: Text | None = None
    edits: Annotated[tuple[Annotated[Edit, Keyed(*EDITS)], ...], Sequenced]
    resolved: Resolved | None = None


def _only_edits(edits: Iterable[object]) -> tuple[Edit, ...]:
    """In Python an edit is a record; mappings with one key are for files."""
    found = tuple(edits)
    if wrong := [number for number, edit in enumerate(found) if not isinstance(edit, EDITS)]:
        said = [f"must be an edit such as Split(…), but is {show(found[number])}" for number in wrong]
        places = [where(("edits", number)) for number in wrong]
        raise _not_valid(None, [Issue(text, where=place) for text, place in zip(said, places, strict=True)])
    return cast("tuple[Edit, ...]", found)


def _is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def _is_path(given: str | os.PathLike[str]) -> bool:
    if not isinstance(given, str):
        return True
    return "\n" not in given and (os.path.isfile(given) or given.lower().endswith((".yaml", ".yml", ".json")))


def _from_file(path: Path, shown: str) -> tuple[Plan | None, list[Issue]]:
    try:
        with path.open("rb") as file:
            text = files.decode(file.read(files.MAX_BYTES + 1))
    except OSError as error:
        return None, [Issue(f"cannot be read: {error.strerror or error}", file=shown)]
    except files.Unreadable as error:
        return None, [Issue(error.message, file=shown, line=error.line)]
    return _from_text(text, as_json=_is_json(path), file=shown)


def _from_text(text: str, *, as_json: bool, file: str | None) -> tuple[Plan | None, list[Issue]]:
    try:
        document = files.read(text, as_json=as_json)
    except files.Unreadable as error:
        return None, [Issue(error.message, file=file, line=error.line)]
    return _validate(document, file)


def _validate(document: files.Document, file: str | None) -> tuple[Plan | None, list[Issue]]:
    """The plan in a document, or everything that is wrong with it."""
    found, problems = None, list(document.problems)
    try:
        found = _File.model_validate(document.data, by_alias=True, by_name=False)
    except ValidationError as error:
        problems += _new(explain(error, _keys), known=document.problems)
    if other_version := [problem for problem in problems if problem.place == ("rewire",)]:
        problems = other_version  # what the rest means is for that version to say
    if problems or found is None:
        issues = [_issue(problem, document, file) for problem in problems]
        return None, sorted(issues, key=lambda issue: (issue.line or 0, issue.where))
    return Plan(found.edits, found.name, found.description, found.resolved), []


_file_keys = functools.partial(keys_below, list(_File.model_fields), {"edits": EDITS})


def _keys(place: Place) -> Sequence[str]:
    """The keys allowed at a place of a plan file."""
    return Resolved.known_keys() if place == ("resolved",) else _file_keys(place)


def _new(problems: list[Problem], known: tuple[Problem, ...]) -> list[Problem]:
    """Without those that only follow from what the text itself has wrong at the same place."""
    places = {problem.place for problem in known}
    return [problem for problem in problems if problem.place not in places]


def _issue(problem: Problem, document: files.Document, file: str | None) -> Issue:
    return Issue(problem.message, file, files.line_of(problem, document), where(problem.place))


def _settle(plan: Plan | None, issues: list[Issue], file: str | None) -> Plan:
    if plan is None:
        raise _not_valid(file, issues)
    return plan


def _not_valid(file: str | None, issues: list[Issue]) -> PlanError:
    count = f"{len(issues)} problem" + ("s" if len(issues) != 1 else "")
    return PlanError(f"{file or 'this plan'} is not valid ({count}):", tuple(issues))


def _tidy(schema: Any) -> Any:
    """Without the titles that pydantic makes of names, and with the first paragraph of each description."""
    if isinstance(schema, list):
        return [_tidy(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if not (key == "title" and isinstance(value, str))}
    if isinstance(kept.get("description"), str):
        kept["description"] = " ".join(kept["description"].split("\n\n")[0].split())
    return {key: _tidy(value) for key, value in kept.items()}
