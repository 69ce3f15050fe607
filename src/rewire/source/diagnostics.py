"""Problems for people (text, with a caret under the code) and for programs (JSON, SARIF)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rewire.source.errors import RULES, Problem

Format = Literal["text", "json", "sarif"]

SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def as_text(problems: Iterable[Problem], rules: Mapping[str, str] = RULES) -> str:
    """The problems, each with its line of code and a caret.

    >>> print(as_text([Problem(Path("m.py"), 3, 1, "two-parents", "A has the parent bases B and C")]), end="")
    m.py:3:1: error: A has the parent bases B and C [two-parents]
    """
    return "".join(_text(one, rules) for one in problems)


def _text(one: Problem, rules: Mapping[str, str]) -> str:
    head = f"{one.path}:{one.line}:{one.column}: {one.severity}: {one.message} [{one.rule}]\n"
    code = _line(one.path, one.line)
    advice = f"  instead: {one.instead}\n" if one.instead else ""
    if not code.strip():
        return head + advice
    number = f"{one.line:>5} | "
    blanks = "".join("\t" if character == "\t" else " " for character in code[: one.column - 1])
    length = max(1, min(one.end_column or one.column + 1, len(code) + 1) - one.column)
    return f"{head}{number}{code}\n{' ' * (len(number) - 2)}| {blanks}{'^' * length}\n{advice}"


def _line(path: Path, number: int) -> str:
    lines = _lines(path)
    return lines[number - 1] if 0 < number <= len(lines) else ""


@cache
def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def as_data(problems: Iterable[Problem]) -> list[dict[str, Any]]:
    """The problems as plain data.

    >>> as_data([Problem(Path("m.py"), 3, 1, "unused", "no class needs f", severity="warning")])[0]["rule"]
    'unused'
    """
    return [
        {
            "file": str(one.path),
            "line": one.line,
            "column": one.column,
            "end_column": one.end_column or one.column,
            "severity": one.severity,
            "rule": one.rule,
            "message": one.message,
            "instead": one.instead,
        }
        for one in problems
    ]


def as_sarif(problems: Sequence[Problem], version: str, rules: Mapping[str, str] = RULES) -> dict[str, Any]:
    """The problems as SARIF 2.1.0, which code hosts and editors show beside the code."""
    used = sorted({one.rule for one in problems})
    described = [{"id": rule, "shortDescription": {"text": rules.get(rule, rule)}} for rule in used]
    driver = {"name": "rewire modular", "version": version, "rules": described}
    results = [_result(one, used) for one in problems]
    return {
        "$schema": SARIF_SCHEMA,
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}],
    }


def _result(one: Problem, rules: Sequence[str]) -> dict[str, Any]:
    region = {"startLine": one.line, "startColumn": one.column}
    if one.end_column > one.column:
        region["endColumn"] = one.end_column
    location = {"artifactLocation": {"uri": _uri(one.path)}, "region": region}
    return {
        "ruleId": one.rule,
        "ruleIndex": rules.index(one.rule),
        "level": one.severity,
        "message": {"text": f"{one.message}; {one.instead}" if one.instead else one.message},
        "locations": [{"physicalLocation": location}],
    }


def _uri(path: Path) -> str:
    """A path below the working folder is given from there, as code hosts need it."""
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.as_posix()


def dumped(problems: Sequence[Problem], form: Format, version: str, rules: Mapping[str, str] = RULES) -> str:
    """The problems in one of the forms, ending with a line end."""
    if form == "text":
        return as_text(problems, rules)
    data = as_data(problems) if form == "json" else as_sarif(problems, version, rules)
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"
