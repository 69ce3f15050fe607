"""`super()` in a merged method: the parent's statements take the place of the call.

What the method does after the call changes them: an assignment replaces the parent's to the same target, `del` removes
it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from rewire.source.errors import Report
from rewire.source.fragments import Fragment
from rewire.source.rules import Rules
from rewire.source.statements import Statement
from rewire.source.view import View


@dataclass(eq=False)
class Line:
    """A statement of a method's body with the fragments that write it."""

    statement: Statement
    fragments: tuple[Fragment, ...]

    @cached_property
    def text(self) -> str:
        """The generated text, the lines above included."""
        return "".join(one.text for one in self.fragments)

    @cached_property
    def bare(self) -> str:
        """The text without anything from `#` to the end of a line."""
        return re.sub(r"#.*", "", self.text).strip()

    @cached_property
    def target(self) -> str:
        """What the statement assigns to or deletes: the text of the first target."""
        return self.fragments[0].view.code(self.statement.name)

    @property
    def kind(self) -> str:
        """The statement's kind."""
        return self.statement.kind


def lines_of(view: View, statements: Sequence[Statement], label: str) -> list[Line]:
    """The statements of a body."""
    return [Line(one, (Fragment(view, one.lead, one.end, label),)) for one in statements]


def is_super_call(node: ast.stmt | None, name: str) -> bool:
    """Is the statement `super().name(...)` or `return super().name(...)` and nothing else?

    >>> [is_super_call(node, "f") for node in ast.parse("super().f(1)\\nx = super().f(1)\\nsuper().g()").body]
    [True, False, False]
    """
    match node:
        case (
            ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=called)))
            | ast.Return(value=ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=called)))
        ):
            return called == name
    return False


def super_call(own: Sequence[Line], name: str) -> int | None:
    """Which statement is the call of `super().name`."""
    return next((number for number, line in enumerate(own) if is_super_call(line.statement.node, name)), None)


@dataclass
class Unravelling:
    """Goes through the methods of one merged class in order.

    As in the reference, what one method assigns and deletes after its `super()` call is remembered for the methods
    that follow; where that makes a difference the report has a warning.
    """

    bases: Collection[str]
    rules: Rules
    report: Report
    replaced: dict[str, Line] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)

    def unravel(self, own: list[Line], parent: list[Line] | None, name: str) -> list[Line]:
        """The body of a merged method: `own` with the call of `super().name` replaced by `parent`."""
        number = super_call(own, name)
        if number is None or parent is None:
            return [through_super(line, self.bases) for line in own]
        before = [through_super(line, self.bases) for line in own[:number]]
        return _super_first([*before, *self._combine(parent, own[number + 1 :])], parent)

    def _combine(self, parent: list[Line], after: list[Line]) -> list[Line]:
        """The parent's statements as changed by those that follow the call, then the rest of these."""
        self._warn_of_idle(parent, [line for line in after if line.kind == "delete"])
        self.deleted |= {line.target for line in after if line.kind == "delete"}
        self.replaced |= {line.target: line for line in after if line.kind == "assign"}
        deletable = ("assign", "annotated") if self.rules.delete_annotated else ("assign",)
        kept = (
            line
            for line in parent
            if line.kind != "string" and not (line.kind in deletable and line.target in self.deleted)
        )
        body = [self.replaced.get(line.target, line) if line.kind == "assign" else line for line in kept]
        self._warn([line for line in body if line in self.replaced.values() and line not in after])
        placed = set(map(id, body))
        known = {line.bare for line in body}
        for line in after:
            if id(line) not in placed and line.kind != "delete" and line.bare not in known:
                body.append(line)
                known.add(line.bare)
        return _post_init_last(body)

    def _warn_of_idle(self, parent: list[Line], deletions: list[Line]) -> None:
        """A deletion of what the parent's method does not assign deletes nothing, and goes itself."""
        there = {line.target for line in parent if line.kind in ("assign", "annotated")}
        for line in deletions:
            if line.target not in there:
                message = f"{line.target} is deleted, but the parent's method does not assign it"
                fragment = line.fragments[0]
                instead = "remove the line, or name what the parent assigns"
                self.report.warn(fragment.view.file, line.statement.start, "nothing-to-delete", message, instead)

    def _warn(self, carried: list[Line]) -> None:
        for line in carried:
            message = f"this assignment also replaces the one to {line.target} in a later method that calls super()"
            instead = "use another name in one of them"
            fragment = line.fragments[0]
            self.report.warn(fragment.view.file, line.statement.start, "carried-over", message, instead)


def _post_init_last(body: list[Line]) -> list[Line]:
    number = next((number for number, line in enumerate(body) if "self.post_init(" in line.text), None)
    return body if number is None else [*body[:number], *body[number + 1 :], body[number]]


def _super_first(body: list[Line], parent: list[Line]) -> list[Line]:
    """Where the parent calls `super().__init__` first of all, so does the new body."""
    first = next((line for line in parent if line.kind != "string"), None)
    if first is None or "super().__init__" not in first.text:
        return body
    number = next((number for number, line in enumerate(body) if "super().__init__" in line.text), 0)
    top = 1 if body[0].kind == "string" else 0
    rest = [*body[:number], *body[number + 1 :]]
    return [*rest[:top], body[number], *rest[top:]] if number > top else body


# ---------------------------------------------------------------- Base.method(self)

_BASE_CALL = re.compile(r"(?<![\w.])([^\W\d][\w.]*)\.\w+\((\s*self\s*(?:,\s*|(?=\)))|)")


def through_super(line: Line, bases: Collection[str]) -> Line:
    """`Base.method(self, x)` becomes `super().method(x)` where `Base` is a base of the class."""
    fragments = tuple(part for one in line.fragments for part in _through_super(one, bases))
    return Line(line.statement, fragments) if len(fragments) > len(line.fragments) else line


def _through_super(fragment: Fragment, bases: Collection[str]) -> Iterator[Fragment]:
    if fragment.new is not None:
        yield fragment
        return
    start = fragment.start
    for found in _BASE_CALL.finditer(fragment.view.file.lines.code, fragment.start, fragment.end):
        if is_base(found.group(1), bases):
            yield replace(fragment, start=start, end=found.start(1))
            yield replace(fragment, start=found.start(1), end=found.end(1), new="super()")
            yield replace(fragment, start=found.end(1), end=found.start(2))
            start = found.end(2)
    yield replace(fragment, start=start)


def is_base(name: str, bases: Collection[str]) -> bool:
    """Does `super()` reach the class of that name? Two classes of the library stand behind others."""
    return (
        name in bases
        or (name == "nn.Module" and "GradientCheckpointingLayer" in bases)
        or (name == "PreTrainedModel" and any("PreTrainedModel" in base for base in bases))
    )
