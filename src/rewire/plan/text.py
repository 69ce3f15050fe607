"""Plans as text: YAML and JSON in, with the line of every value, and out.

YAML is read by its core schema of version 1.2, which is JSON's view of data: `on` and `no` are text, `1e-4`
is a number, and there are no dates, merge keys or Python objects. Size, depth and the number of values are
bounded, so that no file can keep the reader busy for long.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rewire.errors import OutputError
from rewire.plan.messages import Place, Problem, show

MAX_BYTES = 1 << 20
_MAX_DEPTH = 48
_MAX_VALUES = 100_000  # after following aliases


class Unreadable(Exception):
    """The text is no YAML or JSON at all, so nothing more can be said about it than this."""

    def __init__(self, message: str, line: int | None = None) -> None:
        self.message, self.line = message, line
        super().__init__(message)


@dataclass(frozen=True)
class Document:
    """Plain data with the lines on which its keys and values begin, and what is wrong with it as text."""

    data: Any
    key_lines: Mapping[Place, int] = field(default_factory=dict)
    value_lines: Mapping[Place, int] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    def line(self, place: Place, *, at_key: bool = False) -> int | None:
        """The line of a place, or of the innermost place around it that the text has."""
        first, second = (self.key_lines, self.value_lines) if at_key else (self.value_lines, self.key_lines)
        if place in first or place in second:
            return first.get(place, second.get(place))
        return self.line(place[:-1], at_key=True) if place else None


# ---------------------------------------------------------------- reading


def read(source: str, *, as_json: bool) -> Document:
    """Read a plan's text; `Unreadable` if its syntax is broken."""
    if len(source.encode("utf-8", "replace")) > MAX_BYTES:
        raise Unreadable(f"longer than {MAX_BYTES} bytes, which is no plan")
    return _read_json(source) if as_json else _read_yaml(source)


def decode(raw: bytes) -> str:
    """The text of a file."""
    if len(raw) > MAX_BYTES:
        raise Unreadable(f"longer than {MAX_BYTES} bytes, which is no plan")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 text ({error.reason})", raw.count(b"\n", 0, error.start) + 1) from None


def _read_yaml(source: str) -> Document:
    try:
        node = _compose(source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        raise Unreadable(f"not readable as YAML: {error.problem or error}{_hint(source, line)}", line) from None
    except yaml.reader.ReaderError as error:
        line = source.count("\n", 0, error.position) + 1
        shown = chr(error.character) if isinstance(error.character, int) else error.character
        raise Unreadable(f"not readable as YAML: the character {shown!r} is not allowed", line) from None
    if node is None:
        raise Unreadable("empty; a plan begins with `rewire: 1`")
    walker = _Walker()
    data = walker.value(node, ())
    return Document(data, walker.key_lines, walker.value_lines, tuple(walker.problems))


def _hint(source: str, line: int | None) -> str:
    text = source.split("\n")[line - 1] if line and line <= source.count("\n") + 1 else ""
    if "\t" in text[: len(text) - len(text.lstrip())]:
        return "; indent with spaces, not tabs"
    if re.search(r"\btarget\b|[:\-,\[]\s+[@*\[{%`!&]", text):
        return '; put a target between quotes: "@attention", "**.qkv"'
    return ""


def _read_json(source: str) -> Document:
    twice: list[str] = []
    try:
        data = json.loads(
            source,
            object_pairs_hook=lambda pairs: _without_duplicates(pairs, twice),
            parse_constant=_refuse_constant,
        )
    except json.JSONDecodeError as error:
        raise Unreadable(f"not readable as JSON: {error.msg}", error.lineno) from None
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not readable as JSON: {error}") from None
    # JSON is nearly YAML, which knows lines. Where it is not, the messages do without.
    view = Document(None)
    with contextlib.suppress(Unreadable):
        view = _read_yaml(source.replace("\t", " "))
    known = tuple(problem for problem in view.problems if problem.message.startswith(_TWICE))
    lineless = tuple(Problem((name,), _TWICE) for name in twice)
    return Document(data, view.key_lines, view.value_lines, known or lineless)


_TWICE = "the key is given twice"


def _without_duplicates(pairs: list[tuple[str, Any]], twice: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            twice.append(name)
        else:
            found[name] = value
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


# YAML 1.2 core schema: what an unquoted scalar may be besides text, with the characters it may begin with.
_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


class _Loader(yaml.SafeLoader):
    """Composes nodes only: it constructs no objects, and refuses deep nesting before the stack runs out."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - filled below, then only read
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Count how deep it goes."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            problem = f"nested deeper than {_MAX_DEPTH} levels"
            raise yaml.composer.ComposerError(problem=problem, problem_mark=self.get_mark())
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), ["" if c == "\0" else c for c in _first])


def _compose(source: str) -> yaml.Node | None:
    loader = _Loader(source)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


class _Walker:
    """Turns nodes into plain data and notes lines and problems on the way."""

    def __init__(self) -> None:
        self.key_lines: dict[Place, int] = {}
        self.value_lines: dict[Place, int] = {}
        self.problems: list[Problem] = []
        self._visited = 0

    def value(self, node: yaml.Node, place: Place) -> Any:
        line = node.start_mark.line + 1
        self._visited += 1
        if self._visited > _MAX_VALUES or len(place) > _MAX_DEPTH:
            raise Unreadable(
                f"too large or too deep: more than {_MAX_VALUES} values or {_MAX_DEPTH} levels "
                "once its aliases are followed",
                line,
            )
        self.value_lines[place] = line
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return {name: self.value(child, (*place, name)) for name, child in self._pairs(node, place)}
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.value(child, (*place, number)) for number, child in enumerate(node.value)]
        return self._scalar(node, place)

    def _pairs(self, node: yaml.MappingNode, place: Place) -> Iterator[tuple[str, yaml.Node]]:
        seen: set[str] = set()
        for key, child in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            here = (*place, str(name))
            line = key.start_mark.line + 1
            if name is None or key.tag != "tag:yaml.org,2002:str":
                self.key_lines.setdefault(here, line)
                self.problems.append(Problem(here, f"keys must be text; put {name or 'it'} in quotes", at_key=True))
            elif name in seen:
                first = self.key_lines[here]
                self.problems.append(_Twice(here, f"{_TWICE}, first on line {first}", True, line))
            else:
                seen.add(name)
                self.key_lines[here] = line
                yield name, child

    def _scalar(self, node: yaml.Node, place: Place) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if not isinstance(node, yaml.ScalarNode) or kind not in ("str", "null", "bool", "int", "float"):
            self.problems.append(Problem(place, f"the YAML tag {show(node.tag)} is not allowed; a plan is plain data"))
            return None
        try:
            return _scalar_value(kind, node.value)
        except ValueError:
            self.problems.append(Problem(place, f"{show(node.value)} is no usable {kind}"))
            return None


@dataclass(frozen=True)
class _Twice(Problem):
    """A second use of a key: the one problem whose line is not that of its place."""

    own_line: int | None = None


def line_of(problem: Problem, document: Document) -> int | None:
    """The line to show for a problem."""
    own = problem.own_line if isinstance(problem, _Twice) else None
    return own or document.line(problem.place, at_key=problem.at_key)


def _scalar_value(kind: str, text: str) -> Any:
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else int("x")
    if kind == "int":
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    number = float(text.replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(number):
        raise ValueError(text)
    return number


# ---------------------------------------------------------------- writing


class _Dumper(yaml.SafeDumper):
    """Writes short lists on one line, and quotes what either version of YAML would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Several lines as a block. Rarer line breaks would come back as `\\n` unless they are escaped."""
    style = '"' if re.search("[\r\x85\u2028\u2029]", text) else "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    flow = not any(isinstance(item, list | dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


for _tag, _pattern, _first in _SCALARS:
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), ["" if c == "\0" else c for c in _first])
_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)


def to_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as YAML, keys in their order."""
    return yaml.dump(
        dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=100
    )


def to_json(data: Mapping[str, Any]) -> str:
    """Plain data as JSON, keys in their order."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write(path: Path, text: str) -> None:
    """Write a file so that at any time either the old or the new one stands there, whole."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with beside.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
