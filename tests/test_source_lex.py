"""Strings, comments and f-string text are found as Python finds them; renaming and dependencies rest on it."""

from __future__ import annotations

import ast
import io
import re
import sys
import sysconfig
import tokenize
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewire.source.files import SourceFile
from rewire.source.indent import indented_by_four
from rewire.source.lex import WORD, code_only, tokens
from rewire.source.names import Names, common_suffix
from rewire.source.rename import Renaming
from rewire.source.statements import ClassStatement, Statement

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
SOME_FILES = ["dataclasses.py", "typing.py", "re/_parser.py", "json/encoder.py", "logging/__init__.py", "textwrap.py"]


def expected_spans(text: str) -> list[tuple[int, int, str]]:
    """Comments and strings that are no f-strings, by the standard library's tokenizer."""
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        start, end = (starts[line - 1] + column for line, column in (token.start, token.end))
        if token.type == tokenize.COMMENT:
            found.append((start, end, "comment"))
        elif token.type == tokenize.STRING and "f" not in token.string.partition(token.string[-1])[0].lower():
            found.append((start, end, "string"))
    return found


@pytest.mark.parametrize("name", SOME_FILES)
def test_strings_and_comments_of_the_standard_library(name: str) -> None:
    text = (LIBRARY / name).read_text("utf-8")
    found = {(one.start, one.end, one.kind) for one in tokens(text)}
    assert found.issuperset(expected_spans(text))


@pytest.mark.parametrize("name", SOME_FILES)
def test_words_of_the_code_are_its_identifiers(name: str) -> None:
    text = (LIBRARY / name).read_text("utf-8")
    words = set(WORD.findall(code_only(text, tokens(text))))
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
    assert names | attributes <= words


F_STRINGS = {
    'f"a {b} c"': ["f", "b"],
    'f"a {{b}} {c!r:>{width}.{places}}"': ["c", "width", "places"],
    "f\"{a['b']}{d[1:2]}\"": ["a", "d"],
    'f"{x!r}" "y" f\'z\'': ["x"],
    'rf"\\{a}"': ["a"],
    'f"""\n{a}\n"" {b}"""': ["a", "b"],
    'f"{(lambda: 1)():5}{c != d}"': ["lambda", "c", "d"],
    'f"{a:%H:%M}"': ["a"],
}


@pytest.mark.parametrize("text", F_STRINGS)
def test_expressions_in_f_strings_are_code(text: str) -> None:
    ast.parse(text)
    words = [word for word in WORD.findall(code_only(text, tokens(text))) if word not in ("r", "f")]
    assert words == [word for word in F_STRINGS[text] if word != "f"]


@given(st.text(st.sampled_from("ab1_'\"#\\{}f\n ()"), max_size=30))
def test_the_parts_of_any_valid_text_make_up_the_whole(text: str) -> None:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return
    text += "\n"
    found = tokens(text)
    assert all(a.end <= b.start for a, b in pairwise(found))
    assert len(code_only(text, found)) == len(text)
    if sys.version_info < (3, 12):
        assert {(one.start, one.end, one.kind) for one in found}.issuperset(expected_spans(text))


# ---------------------------------------------------------------- renaming


def pieces(*parts: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(parts), max_size=8).map("".join)


NAMES = Names({"old_name": "OldNameConfig", "new": "NewConfig", "opt": "OPTConfig"})


@given(pieces("old_name", "OldName", "OLD_NAME", "oldname", "x", "_", " ", "1", ".", "é"))
def test_renaming_does_what_a_regular_expression_does(text: str) -> None:
    values = {"old_name": "new", "OLD_NAME": "NEW", "OldName": "New"}
    pattern = re.compile(r"(?<![^\W_])(?:old_name|OLD_NAME|OldName)", re.IGNORECASE)
    expected = pattern.sub(lambda found: values.get(found.group(), "New"), text)
    assert Renaming("old_name", "new", NAMES).apply(text) == expected


@given(pieces("opt", "OPT", "Opt", "ion", " ", "_", "x"))
def test_a_name_in_capitals_keeps_them_where_no_letter_follows(text: str) -> None:
    renamed = Renaming("opt", "new", NAMES).apply(text)
    assert not re.search(r"(?<![^\W_])opt", renamed, re.IGNORECASE)
    assert renamed.count("NEW") == len(re.findall(r"(?<![^\W_])OPT(?![^\W\d_])", text))


@given(st.text("aAbB", max_size=6), st.text("aAbB", max_size=6))
def test_common_suffix_is_an_ending_of_both_and_neither_entirely(first: str, second: str) -> None:
    suffix = common_suffix(first, second)
    assert first.endswith(suffix)
    assert second.endswith(suffix)
    assert suffix not in (first, second) or not suffix


# ---------------------------------------------------------------- statements


def flat(statements: list[Statement]) -> list[tuple[int, int]]:
    return [(one.lead, one.end) for one in statements]


@pytest.mark.parametrize("name", SOME_FILES)
def test_statements_follow_each_other_without_gaps(name: str) -> None:
    file = SourceFile(Path(name), (LIBRARY / name).read_text("utf-8"))
    spans = flat(file.statements)
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    for one in file.statements:
        if isinstance(one, ClassStatement) and len(one.members) > 1:
            inner = flat(one.members)
            assert all(before[1] == after[0] for before, after in pairwise(inner))
            assert inner[-1][1] <= one.end


BLOCKS = """\
class A:
    x = 1  # one

    # of f
    @first
    # of second
    @second
    # of def
    def f(self):  # header
        return 1
        # footer of f

    # footer of A
# of B
class B: y = 2; z = 3
"""


def test_comments_belong_to_what_they_are_indented_like() -> None:
    file = SourceFile(Path("a.py"), BLOCKS)
    a, b = file.statements
    assert isinstance(a, ClassStatement)
    assert isinstance(b, ClassStatement)
    text = file.text
    x, f = a.members
    assert text[x.lead : x.end] == "    x = 1  # one\n"
    assert text[f.lead : f.start] == "\n    # of f\n"
    assert [text[start:end] for start, end in f.decorators] == ["    @first\n", "    # of second\n    @second\n"]
    assert text[f.header : f.end] == (
        "    # of def\n    def f(self):  # header\n        return 1\n        # footer of f\n"
    )
    assert text[b.lead : b.start] == "# of B\n"
    assert [one.name for one in b.members] == ["y", "z"]
    function = file.function(f)
    assert [text[one.lead : one.end] for one in function.body] == ["        return 1\n"]


def test_columns_count_bytes_and_positions_count_characters() -> None:
    file = SourceFile(Path("a.py"), 'class A(Bäse["é"], C):\n    ü = 1\n')
    statement = file.definitions["A"]
    assert isinstance(statement, ClassStatement)
    assert [file.text[slice(*span)] for span in statement.bases] == ['Bäse["é"]', "C"]
    assert [one.name for one in statement.members] == ["ü"]


def test_two_spaces_become_four() -> None:
    text = "class A:\n  # c\n  def f(self):\n    x = '''\n  y'''\n    if x:\n      return (1,\n         2)\n  # d\n"
    four = indented_by_four(text)
    assert ast.dump(ast.parse(four)) == ast.dump(ast.parse(text))
    assert "\n    # c\n    def f(self):\n        x = '''\n  y'''\n        if x:\n            return" in four
    assert indented_by_four(four) == four
