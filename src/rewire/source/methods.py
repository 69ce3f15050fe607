"""One method of a merged class, written by the modular file over the parent's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rewire.source.fragments import Fragment
from rewire.source.functions import Function, split_at_commas
from rewire.source.statements import Statement
from rewire.source.supers import Line, Unravelling, lines_of, super_call
from rewire.source.view import View


@dataclass(frozen=True, eq=False)
class Method:
    """A method (or, for its decorators, a class) in one of the two classes."""

    view: View
    statement: Statement
    label: str

    @property
    def function(self) -> Function:
        """Its parts."""
        return self.view.file.function(self.statement)

    def part(self, start: int, end: int, new: str | None = None) -> Fragment:
        """A fragment of the method."""
        return Fragment(self.view, start, end, self.label, new)

    @property
    def lines(self) -> list[Line]:
        """The statements of its body; those of a one-line method are given lines of their own."""
        function = self.function
        if not function.is_one_line:
            return lines_of(self.view, function.body, self.label)
        lines = self.view.file.lines
        indent = lines.indent(lines.line(function.keyword)) + "    "
        texts = (f"{indent}{self.view.text(one.start, one.end)}\n" for one in function.body)
        return [
            Line(one, (self.part(one.start, one.end, text),)) for one, text in zip(function.body, texts, strict=True)
        ]

    def colon(self) -> Fragment:
        """The end of the `def` line, with a comment that stands there."""
        colon = self.function.colon
        if self.function.is_one_line:
            return self.part(colon, colon + 1, ":\n")
        return self.part(colon, self.view.file.text.index("\n", colon) + 1)


_DELETION = re.compile(r"[ \t]*\n[ \t]*def [^\n]*\)[^\n]*:[^\n]*\n[ \t]*raise \w*Error\(")


def deletes(method: Method) -> bool:
    """Does the method ask for the removal of the parent's? It must have exactly one blank line above."""
    return _DELETION.match(method.view.file.text, method.statement.lead) is not None


def only_raises(method: Method) -> bool:
    """Is the body nothing but the raising of an error?"""
    body = method.function.body
    text = method.view.text(body[0].start, body[0].end) if len(body) == 1 else ""
    return re.match(r"\s*raise \w*Error\(", text) is not None


def merge_method(own: Method, parent: Method | None, state: Unravelling) -> Iterator[Fragment]:
    """The fragments of a method that the modular file defines, over the parent's if it has one."""
    frame = parent or own
    function = frame.function
    yield frame.part(frame.statement.lead, frame.statement.start)
    yield from decorators(own, parent, state)
    yield frame.part(frame.statement.header, first_parameter(frame))
    yield from parameters(own, parent)
    yield frame.part(function.parameters[1], function.parameters[1] + 1)
    has_returns = own.view.text(*own.function.returns).strip()
    yield (own if has_returns else frame).part(*(own if has_returns else frame).function.returns)
    yield own.colon()
    lines = body(own, parent, state)
    for line in lines:
        yield from line.fragments
    if not lines:
        keyword = own.function.keyword
        indent = own.view.file.lines.indent(own.view.file.lines.line(keyword))
        yield own.part(keyword, keyword, f"{indent}    pass\n")


def body(own: Method, parent: Method | None, state: Unravelling) -> list[Line]:
    """The statements of the merged method, the parent's docstring first where the modular file writes none."""
    lines = own.lines
    name = own.statement.name
    call = super_call(lines, name)
    if call is not None and parent is None:
        message = f"the parent class does not define {name}, so that super().{name}() has nothing to take over"
        instead = f"name the class that defines it: Base.{name}(self, ...)"
        state.report.error(own.view.file, lines[call].statement.start, "super-without-parent", message, instead)
    if parent and own.function.docstring is None and parent.function.docstring:
        lines = [parent.lines[0], *lines]
    return state.unravel(lines, parent.lines if parent else None, name)


# ---------------------------------------------------------------- decorators

NO_INHERIT = "@no_inherit_decorator"
ADDED = "@deprecate_kwarg("


def decorators(own: Method, parent: Method | None, state: Unravelling) -> Iterator[Fragment]:
    """The modular file's decorators in place of the parent's, or none if it says so."""
    written = [own.view.file.text[start:end].strip() for start, end in own.statement.decorators]
    if written == [NO_INHERIT]:
        return
    if NO_INHERIT in written:
        message = f"{NO_INHERIT} stands beside {len(written) - 1} more"
        instead = "leave it out: the decorators written replace the parent's in any case"
        state.report.error(own.view.file, own.statement.start, "mixed-decorators", message, instead)
    if parent and state.rules.deprecation_is_added and all(text.startswith(ADDED) for text in written):
        inherited = (span for span in parent.statement.decorators if not (written and _is_deprecation(parent, span)))
        yield from (parent.part(*span) for span in inherited)
    elif parent and not written:
        yield parent.part(parent.statement.start, parent.statement.header)
    yield own.part(own.statement.start, own.statement.header)


def _is_deprecation(method: Method, decorator: tuple[int, int]) -> bool:
    return method.view.file.text[slice(*decorator)].strip().startswith(ADDED)


# ---------------------------------------------------------------- parameters


def first_parameter(method: Method) -> int:
    """Where the first parameter begins. A comment behind the parenthesis belongs to the function, not to it."""
    start, end = method.function.parameters
    code = method.view.file.lines.code[start:end]
    return end - len(code.lstrip())


_NAME = re.compile(r"\s*(\**)\s*(\w*)")


@dataclass(frozen=True)
class Parameter:
    """One parameter as written, without the comma behind it."""

    stars: str
    name: str
    fragment: Fragment
    has_comma: bool


def parameters(own: Method, parent: Method | None) -> Iterator[Fragment]:
    """What stands between the parentheses. With `**super_kwargs` the parent's parameters are inherited."""
    written = list(_parameters(own))
    if parent is None or not any(one.stars == "**" and one.name == "super_kwargs" for one in written):
        yield own.part(first_parameter(own), own.function.parameters[1])
        return
    inherited = list(_parameters(parent))
    kept = {one.name: one for one in inherited if not one.stars}
    new = {one.name: one for one in written[1:] if not one.stars}
    star = (one for one in written if one.stars == "*")
    two_stars = (one for one in inherited if one.stars == "**")
    merged = [*(kept | new).values(), *star, *two_stars]
    for number, one in enumerate(merged):
        yield one.fragment
        if one.has_comma or number + 1 < len(merged):
            yield replace(one.fragment, start=one.fragment.end, end=one.fragment.end, new=",")


def _parameters(method: Method) -> Iterator[Parameter]:
    code = method.view.file.lines.code
    span = first_parameter(method), method.function.parameters[1]
    parts = list(split_at_commas(code, span))
    for number, (start, end) in enumerate(parts):
        found = _NAME.match(code, start, end)
        if found and (found.group(1) or found.group(2)):
            name = method.view.word(found.group(2))
            yield Parameter(found.group(1), name, method.part(start, end), number + 1 < len(parts))
