"""A class of the modular file written over its parent class: docstring, attributes, methods, in this order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rewire.source.errors import Report
from rewire.source.fragments import Fragment, whole
from rewire.source.methods import Method, decorators, deletes, merge_method, only_raises
from rewire.source.names import common_suffix
from rewire.source.rules import Rules
from rewire.source.statements import ClassStatement, Statement
from rewire.source.supers import Unravelling
from rewire.source.view import View


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two classes: the modular file's or the parent's."""

    view: View
    statement: ClassStatement


@dataclass
class Members:
    """The members of a class by their (renamed) name. Everything that is none of these three is dropped."""

    docstring: Statement | None = None
    attributes: dict[str, Statement] = field(default_factory=dict)
    methods: dict[str, Statement] = field(default_factory=dict)


def members(side: Side) -> Members:
    """Sorts the members of a class."""
    found = Members()
    for one in side.statement.members:
        name = side.view.word(one.name)
        match one.kind:
            case "string":
                found.docstring = found.docstring or one
            case "assign" | "annotated":
                found.attributes[name] = one
            case "function":
                found.methods[_key(name, one, side, found.methods)] = one
    return found


def _key(name: str, statement: Statement, side: Side, methods: dict[str, Statement]) -> str:
    """Of two methods of one name the property keeps it, the other is its setter."""
    other = methods.get(name)
    if other is None:
        return name
    if _is_property(statement, side):
        methods[f"{name}_setter"] = methods.pop(name)
        return name
    return f"{name}_setter" if _is_property(other, side) else name


def _is_property(statement: Statement, side: Side) -> bool:
    text = side.view.file.text
    return bool(statement.decorators) and text[slice(*statement.decorators[0])].strip() == "@property"


# ---------------------------------------------------------------- the merged class


def merge_class(own: Side, parent: Side, merged_base: str, rules: Rules, report: Report) -> Iterator[Fragment]:
    """The fragments of the merged class. `merged_base`: the base that the modular file names and that goes."""
    name = own.statement.name
    statement = parent.statement
    bases = merged_bases(own, parent, merged_base, rules, report)
    state = Unravelling(bases, rules, report)
    yield Fragment(parent.view, statement.lead, statement.start, name)
    yield from decorators(Method(own.view, own.statement, name), Method(parent.view, statement, name), state)
    yield Fragment(parent.view, statement.header, statement.keyword, name)
    yield Fragment(parent.view, statement.keyword, statement.colon + 1, name, _header(name, parent, bases))
    body = list(_body(own, parent, state))
    yield from body or [Fragment(own.view, own.statement.keyword, own.statement.keyword, name, "    pass\n")]


def _header(name: str, parent: Side, bases: Sequence[str]) -> str:
    statement = parent.statement
    arguments = [*bases, *(parent.view.text(*span) for span in statement.keywords)]
    inside = f"({', '.join(arguments)}{statement.comma})" if arguments else ""
    return f"class {name}{statement.type_parameters}{inside}:\n"


def merged_bases(own: Side, parent: Side, merged_base: str, rules: Rules, report: Report) -> list[str]:
    """The parent's bases, with the modular file's other bases in their place or behind them."""
    others = [text for text in (own.view.text(*span) for span in own.statement.bases) if text != merged_base]
    for text in others:
        if not re.fullmatch(r"[\w.]+", text):
            message = f"{own.statement.name} has the base {text}"
            report.error(own.view.file, own.statement.keyword, "base-not-a-name", message, "give it a name first")
    bases = [parent.view.text(*span) for span in parent.statement.bases]
    for number, base in enumerate(bases):
        fitting = (one for one in others if base.isidentifier() and _stands_for(one, base, rules))
        replacement = next(fitting, None)
        if replacement is not None:
            others.remove(replacement)
            bases[number] = replacement
    bases += [one for one in others if rules.other_bases and one not in bases]
    if "GradientCheckpointingLayer" in bases and "nn.Module" in bases:
        bases.remove("nn.Module")
    return bases


def _stands_for(other: str, base: str, rules: Rules) -> bool:
    is_longer = rules.base_by_ending and other.endswith(base)
    return is_longer or common_suffix(other, base)[:1].isupper()


def _body(own: Side, parent: Side, state: Unravelling) -> Iterator[Fragment]:
    name = own.statement.name
    mine, theirs = members(own), members(parent)
    _warn_of_dropped(own, mine, state.report)
    if docstring := mine.docstring or theirs.docstring:
        yield whole((own if mine.docstring else parent).view, docstring, name)
    for key in theirs.attributes | mine.attributes:
        side, attribute = (own, mine.attributes[key]) if key in mine.attributes else (parent, theirs.attributes[key])
        if not _is_deletion(side, attribute):
            yield whole(side.view, attribute, f"{name}.{key}")
        elif key not in theirs.attributes and key not in theirs.methods:
            message = f"the parent class {parent.statement.name} has no attribute {key} to delete"
            state.report.error(side.view.file, attribute.start, "nothing-to-delete", message, "remove the line")
    removed = set(mine.attributes) if state.rules.attribute_removes_method else set()
    for key in theirs.methods | mine.methods:
        if key not in removed:
            yield from _method(key, own, parent, mine.methods.get(key), theirs.methods.get(key), state)


def _warn_of_dropped(own: Side, mine: Members, report: Report) -> None:
    kept = {id(one) for one in (mine.docstring, *mine.attributes.values(), *mine.methods.values())}
    for one in own.statement.members:
        text = own.view.file.text[one.start : one.end].strip()
        if id(one) not in kept and text not in ("pass", "..."):
            is_twice = one.name in mine.attributes or one.name in mine.methods
            message = (
                f"{one.name} is defined again below" if is_twice else "this is neither docstring, attribute nor method"
            )
            report.warn(own.view.file, one.start, "dropped", f"{message}; {own.statement.name} goes without it")


def _method(
    key: str, own: Side, parent: Side, mine: Statement | None, theirs: Statement | None, state: Unravelling
) -> Iterator[Fragment]:
    label = f"{own.statement.name}.{key}"
    if mine is None:
        assert theirs is not None
        yield whole(parent.view, theirs, label)
        return
    written = Method(own.view, mine, label)
    inherited = Method(parent.view, theirs, label) if theirs else None
    if inherited and deletes(written):
        return
    if inherited and only_raises(written):
        message = f"{key} replaces the parent's method by one that raises"
        instead = "to delete it write no decorator, and exactly one blank line above"
        state.report.warn(own.view.file, mine.start, "not-deleted", message, instead)
    yield from merge_method(written, inherited, state)


_DELETED_ATTRIBUTE = re.compile(r"[^\n=]*=\s*AttributeError\(")


def _is_deletion(side: Side, attribute: Statement) -> bool:
    return bool(_DELETED_ATTRIBUTE.match(side.view.file.text, attribute.start))
