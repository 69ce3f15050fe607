"""The documentation is true: its examples run, its plans are valid, its commands and links exist."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from typer.main import get_command

import rewire
from rewire import errors, plan
from rewire.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]

NOT_RUN = re.compile(r"<!-- not run\b.*-->")
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*).*?\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and the line on which its content begins."""

    page: Path
    line: int
    language: str
    code: str
    is_run: bool


@cache
def text_of(page: Path) -> str:
    return page.read_text("utf-8")


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a language, in order."""
    text = text_of(page)
    found = []
    for match in FENCE.finditer(text):
        above = text[: match.start()].rstrip().rpartition("\n")[2]
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(page, line, match["language"], match["code"], NOT_RUN.fullmatch(above.strip()) is None))
    return [block for block in found if block.language == language]


def prose(page: Path) -> str:
    """A page without its blocks."""
    return FENCE.sub("", text_of(page))


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def all_pages(*languages: str) -> list[Any]:
    """The pages that have blocks of one of these languages, or all pages."""
    chosen = [page for page in PAGES if not languages or any(blocks(page, one) for one in languages)]
    return [pytest.param(page, id=named(page)) for page in chosen]


# ---------------------------------------------------------------- examples


@pytest.mark.parametrize("page", all_pages("python"))
def test_the_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # for models this small the best, whatever else the machine does
    module = ModuleType("example")  # classes defined in an example look for their module
    monkeypatch.setitem(sys.modules, "example", module)
    for block in blocks(page, "python"):
        if block.is_run:
            # Line numbers of the page, so that a failure is found at once.
            source = "\n" * (block.line - 1) + block.code
            exec(compile(source, str(page), "exec"), vars(module))  # noqa: S102 - our own examples


def test_hardly_an_example_is_left_out() -> None:
    left_out = [f"{named(page)}:{b.line}" for page in PAGES for b in blocks(page, "python") if not b.is_run]
    assert left_out == []


# ---------------------------------------------------------------- plans


PLAN_BLOCKS = [b for page in PAGES for b in blocks(page, "yaml") if re.search(r"^rewire: 1$", b.code, re.MULTILINE)]


@pytest.mark.parametrize("block", PLAN_BLOCKS, ids=lambda b: f"{named(b.page)}:{b.line}")
def test_the_plans_are_valid(block: Block) -> None:
    assert plan.check(block.code, file=named(block.page)) == []


def test_every_block_of_yaml_is_a_whole_plan() -> None:
    assert [block for page in PAGES for block in blocks(page, "yaml") if block not in PLAN_BLOCKS] == []


# ---------------------------------------------------------------- commands


def command_lines(page: Path) -> Iterator[str]:
    """What stands after `$` in the console blocks, without comments; long ones put together again."""
    for block in blocks(page, "console"):
        for line in re.sub(r"\\\n\s*", "", block.code).splitlines():
            if line.startswith("$ "):
                yield line[2:]


REWIRE_LINES = [
    pytest.param(line, id=f"{named(page)}: {line[:50]}")
    for page in PAGES
    for line in command_lines(page)
    if line.startswith("rewire ")
]


@pytest.mark.parametrize("line", REWIRE_LINES)
def test_the_command_lines_can_be_given(line: str) -> None:
    words = shlex.split(line.partition(" > ")[0], comments=True)[1:]
    command: Any = get_command(app)
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        assert words[0] in command.commands, f"there is no command {words[0]!r}"
        command = command.commands[words.pop(0)]
    options = [word.partition("=")[0] for word in words if word.startswith("-")]
    assert [option for option in options if option not in known_options(command)] == []


def known_options(command: Any) -> set[str]:
    given = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    return {*given, "--help", "-h"}


def paths_of_commands(command: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """`("plan", "check")` and all the others."""
    for name, child in getattr(command, "commands", {}).items():
        yield (*prefix, name)
        yield from paths_of_commands(child, (*prefix, name))


COMMANDS = set(paths_of_commands(get_command(app)))
TOP = sorted(path[0] for path in COMMANDS if len(path) == 1)


@pytest.mark.parametrize("page", all_pages())
def test_commands_named_in_prose_exist(page: Path) -> None:
    for found in re.findall(r"`rewire ([a-z]+)(?: ([a-z]+)(?=[` ]))?", prose(page)):
        assert (found[0],) in COMMANDS, found
        if found[0] == "plan" and found[1]:
            assert found in COMMANDS


@pytest.mark.parametrize("name", TOP)
def test_every_command_has_a_page_with_its_own_options(name: str) -> None:
    page = text_of(DOCS / "commands" / f"{name}.md")
    command: Any = get_command(app).commands[name]  # type: ignore[attr-defined]
    shared = {"--json", "--quiet", "--debug"}
    wanted = {one.opts[0] for one in command.params if one.opts[0].startswith("--")} - shared - {"--help"}
    assert [option for option in sorted(wanted) if option not in page] == []
    for child in getattr(command, "commands", ()):
        assert f"## rewire {name} {child}" in page


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named_ones = {target for page in PAGES for target in re.findall(r"(?:`|\$ )make ([a-z]+)", text_of(page))}
    assert named_ones - targets == set()


# ---------------------------------------------------------------- names


OTHERS = {"plan", "errors", "json", "zoo", "coverage", "measure", "fastpath"}  # modules, and rewire.json


@pytest.mark.parametrize("page", all_pages())
def test_public_names_in_prose_exist(page: Path) -> None:
    for name in re.findall(r"`rewire\.(\w+)", prose(page)):
        assert name in rewire.__all__ or name in OTHERS, f"rewire.{name}"
    for name in re.findall(r"`rewire\.plan\.(\w+)", prose(page)):
        assert hasattr(plan, name), f"rewire.plan.{name}"


def test_the_readme_lists_every_edit() -> None:
    rows = re.findall(r"^\| \[`(\w+)`\]\(docs/edits/\w+\.md\) \| [^|]* \| (\w+) \|", text_of(README), re.MULTILINE)
    assert rows == [(edit.__name__, edit.promise) for edit in plan.EDITS]


@pytest.mark.parametrize("edit", plan.EDITS, ids=lambda edit: edit.__name__)
def test_every_edit_has_a_page_with_all_its_options(edit: type[plan.Edit]) -> None:
    kind = {"unfreeze": "freeze"}.get(edit.kind, edit.kind)
    page = text_of(DOCS / "edits" / f"{kind}.md")
    own = [key for key in edit.file_keys().values() if key != "options"]
    assert [key for key in own if not re.search(rf"^\| `{key}`", page, re.MULTILINE)] == []


def test_the_python_page_has_every_public_name() -> None:
    page = text_of(DOCS / "python.md")
    assert [name for name in rewire.__all__ if f"\n### {name}\n" not in page] == []


@pytest.mark.parametrize("name", ["apply_", "load", "revert_", "save", "prove", "inspect", "receipt"])
def test_the_python_page_has_every_argument(name: str) -> None:
    line = re.search(rf"^`rewire\.{name}\((.*)\)`", text_of(DOCS / "python.md"), re.MULTILINE)
    assert line is not None
    arguments = ", ".join(f"{key}={value}" if value else key for key, value in defaults(name).items())
    assert re.sub(r"\*, ", "", line[1]) == arguments


def defaults(name: str) -> Mapping[str, str]:
    found = inspect.signature(getattr(rewire, name)).parameters.values()
    prefix = {inspect.Parameter.VAR_KEYWORD: "**"}
    return {
        prefix.get(one.kind, "") + one.name: "" if one.default is one.empty else as_written(one.default)
        for one in found
    }


def as_written(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def test_the_errors_page_draws_the_tree() -> None:
    page = text_of(DOCS / "errors.md")
    tree = {name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, Exception)}
    assert set(re.findall(r"\b(\w+Error) {2,}", page)) == tree
    assert {name for name in tree if f"| `{name}` |" not in page} == {"RewireError"}


def test_the_sam_page_answers_every_point_of_the_guide() -> None:
    rows = re.findall(r"^\| (H\d+) \|", text_of(DOCS / "sam.md"), re.MULTILINE)
    assert rows == [f"H{number}" for number in range(1, 26)]


# ---------------------------------------------------------------- links


LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", all_pages())
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of a page's headings, as MkDocs makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", one)) for one in headings)
    return frozenset(re.sub(r"[-\s]+", "-", one.strip().lower()) for one in plain)


@pytest.mark.parametrize("page", all_pages())
def test_files_named_in_prose_exist(page: Path) -> None:
    for path in re.findall(r"`((?:src|tests|docs|examples|scripts)/[^`*]*)`", prose(page)):
        assert (ROOT / path).exists(), path


def test_private_names_in_prose_are_in_the_source() -> None:
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    names = {name for page in PAGES for name in re.findall(r"`(_[A-Za-z]\w+)", prose(page))}
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", source)] == []


def test_every_page_is_in_the_navigation() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    assert set(pages_of(settings["nav"])) == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert settings["theme"]["font"] is False  # nothing is fetched when a page is read
    assert settings["strict"] is True


def pages_of(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for item in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from pages_of(item)
