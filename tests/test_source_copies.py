"""`# Copied from` markers: read, verified, put right."""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import pytest

from rewire.errors import RewireError
from rewire.source.copies import GENERATED, Replacement, markers
from rewire.source.copies_check import Copy, check_copies, fix_copies

BERT = '''
    import torch.nn as nn


    def helper(x):
        # half of it
        return x / 2


    class BertPooler(nn.Module):
        """Pools like BERT, not like bert."""

        size = 4

        def __init__(self, config: BertConfig):
            super().__init__()
            self.dense = nn.Linear(config.hidden_size, config.hidden_size)

        @property
        def width(self):
            return self.dense.out_features

        def forward(self, hidden_states, first_token_only=True):
            pooled = self.dense(hidden_states[:, 0])

            return pooled
'''

HEAD = "# Copied from zoo.models.bert.modeling_bert."


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A package with one model that others are copied from."""
    root = tmp_path / "zoo"
    for folder in (root, root / "models", root / "models" / "bert", root / "models" / "my"):
        folder.mkdir()
        (folder / "__init__.py").touch()
    (root / "models" / "bert" / "modeling_bert.py").write_text(dedent(BERT).lstrip())
    return root


def write(zoo: Path, marker: str, code: str) -> Path:
    """A file of the model `my` with one copy."""
    path = zoo / "models" / "my" / "modeling_my.py"
    path.write_text(f"{marker}\n{dedent(code).lstrip()}")
    return path


def pooler(name: str = "MyPooler", config: str = "MyConfig", docstring: str = "Pools like BERT, not like bert.") -> str:
    """The original's class under another name."""
    code = dedent(BERT)[dedent(BERT).index("class BertPooler") :]
    code = code.replace("BertPooler", name).replace("BertConfig", config)
    return code.replace("Pools like BERT, not like bert.", docstring)


def bare(texts: dict[Path, str]) -> dict[Path, list[str]]:
    """The texts without blank lines, which do not count."""
    return {path: [line for line in text.splitlines() if line] for path, text in texts.items()}


def only(path: Path) -> Copy:
    """The one marker of a file."""
    [found] = check_copies([path])
    return found


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("said", "replacements", "fault"),
    [
        ("a.b.C", [], ""),
        ("a.b.C with A->B", [("A", "B")], ""),
        ("a.b.C with A->B,C->D, e.f->g", [("A", "B"), ("C", "D"), ("e.f", "g")], ""),
        ("a.b.C with A->B, with C->D", [("A", "B"), ("C", "D")], ""),
        ("a.b.C with x=1->x=2", [("x=1", "x=2")], ""),
        ("a.b.C with a/b-c->d/e-f", [("a/b-c", "d/e-f")], ""),
        ("a.b.C A->B", [("A", "B")], "'with' is missing before A->B"),
        ("a.b.C with A -> B", [], "'A -> B' is not of the form A->B, without blanks"),
        ("a.b.C with Old Name->New Name", [("Name", "New")], "is not of the form"),
        ("a.b.C with A->B, Config", [("A", "B")], "'Config' is not of the form A->B, without blanks"),
    ],
)
def test_markers_are_read(said: str, replacements: list[tuple[str, str]], fault: str) -> None:
    [found] = markers(Path("m.py"), f"x = 1\n# Copied from {said}\n")
    if said != "a.b.C with Old Name->New Name":
        assert found.replacements == tuple(Replacement(*pair) for pair in replacements)
    assert (found.line, found.dotted) == (2, "a.b.C")
    assert fault in found.fault
    assert bool(fault) == bool(found.fault)


def test_all_casing_replaces_three_forms() -> None:
    [found] = markers(Path("m.py"), "# Copied from a.b.C with Bert->MyBert all-casing\n")
    assert found.replacements == (Replacement("Bert", "MyBert", all_casing=True),)


# ---------------------------------------------------------------- what is the same


@pytest.mark.parametrize(
    ("marker", "code"),
    [
        (f"{HEAD}helper", "def helper(x):\n    # half of it\n    return x / 2\n"),
        (f"{HEAD}helper", "def half(x):\n\n    # half of it\n\n    return (x /\n        2)\n"),
        (f"{HEAD}helper", "@decorated\ndef helper(x):\n    # half of it\n    return x / 2\n"),
        (f"@decorated\n{HEAD}helper", "def helper(x):\n    # half of it\n    return x / 2\n"),
        (f"{HEAD}helper", "def helper(x):\n    # half of it\n    return x / 2\n    # End copy\n    return 3\n"),
        (f"{HEAD}BertPooler with Bert->My", pooler()),
        (f"{HEAD}BertPooler with BertConfig->MyConfig", pooler()),
        (f"{HEAD}BertPooler with Bert->My all-casing", pooler(docstring="Pools like MY, not like my.")),
        (f"{HEAD}BertPooler with Bert->My,BERT->MY", pooler(docstring="Pools like MY, not like bert.")),
    ],
    ids=range(9),
)
def test_a_copy_is_the_same(zoo: Path, marker: str, code: str) -> None:
    found = only(write(zoo, marker, code))
    assert (found.status, found.note, found.diff()) == ("same", "", "")


def test_a_method_is_the_same(zoo: Path) -> None:
    marker = f"class My:\n    {HEAD}BertPooler.width"
    path = write(zoo, marker, "@property\ndef width(self):\n    return self.dense.out_features\n")
    path.write_text(
        path.read_text().replace("\n@", "\n    @").replace("\ndef", "\n    def").replace("\n    re", "\n        re")
    )
    assert only(path).status == "same"


@pytest.mark.parametrize(
    "change",
    [
        ("        return pooled", "        return 2 * pooled  # Ignore copy"),
        ("    def forward(self, hidden_states,", "    # Ignore copy\n    def forward(self, other,"),
        ("    @property\n    def width", "    # Ignore copy\n    @cached\n    def width"),
        ("    size = 4", "    # Ignore copy\n    size = 5"),
    ],
)
def test_members_are_taken_out(zoo: Path, change: tuple[str, str]) -> None:
    code = pooler().replace(*change)
    assert code != pooler()
    path = write(zoo, f"{HEAD}BertPooler with Bert->My", code)
    assert only(path).status == "same"
    path.write_text(path.read_text().replace("Ignore", "ignore"))
    assert only(path).status == "drifted"


def test_a_function_takes_itself_out(zoo: Path) -> None:
    path = write(zoo, f"{HEAD}helper", "def helper(x):\n    # Ignore copy\n    return x\n")
    assert only(path).status == "ignored"


# ---------------------------------------------------------------- what is not


@pytest.mark.parametrize(
    "change",
    [
        ("hidden_states[:, 0]", "hidden_states[:, 1]"),
        ("        return pooled\n", "        return pooled  # new\n"),
        ("first_token_only=True", "first_token_only=False"),
        ("nn.Module", "nn.Sequential"),
        ("    size = 4\n", ""),
        ("    def width", "    def breadth"),
        ("    @property\n", ""),
        ("Pools like", "Pools as"),
        ("MyConfig", "BertConfig"),
        ("        return pooled\n", "        return pooled\n\n    def more(self):\n        pass\n"),
    ],
)
def test_planted_drift_is_found_and_put_right(zoo: Path, change: tuple[str, str]) -> None:
    good = f"{HEAD}BertPooler with Bert->My\n{pooler()}"
    path = write(zoo, f"{HEAD}BertPooler with Bert->My", pooler().replace(*change))
    found = only(path)
    assert found.status == "drifted"
    assert found.diff().count("\n") > 3
    assert bare(fix_copies([path])) == bare({path: good})


def test_fixing_keeps_what_is_taken_out_and_copies_of_copies_follow(zoo: Path) -> None:
    first = write(zoo, f"{HEAD}helper", "def helper(x):\n    return x\n    # End copy\n    return 3\n")
    second = first.with_name("modeling_other.py")
    second.write_text("# Copied from zoo.models.my.modeling_my.helper\ndef helper(x):\n    return x\n    return 3\n")
    fixed = fix_copies([zoo])
    good = "def helper(x):\n    # half of it\n    return x / 2\n"
    assert fixed[first] == f"{HEAD}helper\n{good}    # End copy\n    return 3\n"
    assert fixed[second].endswith(f"{good}    return 3\n")


def test_generated_files_are_not_changed(zoo: Path) -> None:
    path = write(zoo, f"{HEAD}helper", "def helper(x):\n    return x\n")
    path.write_text(f"# This file was automatically generated from modular_my.py.\n{path.read_text()}")
    assert only(path).status == "drifted"
    assert fix_copies([path]) == {}


def test_markers_that_contradict_each_other(zoo: Path) -> None:
    path = write(
        zoo,
        "# Copied from zoo.models.my.modeling_my.g with 1->12",
        "def f():\n    return 1\n\n\n# Copied from zoo.models.my.modeling_my.f\ndef g():\n    return 1\n",
    )
    with pytest.raises(RewireError, match="contradict each other"):
        fix_copies([path])


@pytest.mark.parametrize(
    ("marker", "status", "note"),
    [
        (f"{HEAD}Nothing", "missing", "modeling_bert.py has no Nothing"),
        ("# Copied from zoo.models.cat.modeling_cat.Cat", "missing", "zoo has no module models.cat.modeling_cat"),
        ("# Copied from unknown_package_abc.models.Cat", "unreadable", "no package of that name is known"),
        ("# Copied from https://example.com/a.b", "unreadable", "names no object of a package"),
        (f"{HEAD}helper\nx = 1", "misplaced", ""),
        ("# Copied from zoo.models.my.modeling_my.helper", "itself", ""),
    ],
)
def test_what_cannot_be_verified(zoo: Path, marker: str, status: str, note: str) -> None:
    found = only(write(zoo, marker, "def helper(x):\n    return x / 2\n"))
    assert (found.status, found.note) == (status, note)


def test_a_replacement_that_breaks_the_code(zoo: Path) -> None:
    code = pooler().replace("    size = 4", "    # Ignore copy\n    size = 5")
    found = only(write(zoo, f"{HEAD}BertPooler with Bert->My,self->1+", code))
    assert found.status == "drifted"


@pytest.mark.parametrize(("data", "said"), [(b"x = (\n", "not valid Python"), (b"# \xff\n", "is not UTF-8")])
def test_files_that_cannot_be_read(zoo: Path, data: bytes, said: str) -> None:
    path = zoo / "models" / "my" / "broken.py"
    path.write_bytes(f"{HEAD}helper\n".encode() + data)
    with pytest.raises(RewireError, match=said):
        check_copies([zoo])


# ---------------------------------------------------------------- the library

LIBRARY = Path(str(find_spec("transformers").origin)).parent  # type: ignore[union-attr]


def test_some_of_the_library() -> None:
    """Several replacements, patterns that are none, members taken out, docstrings: nothing has drifted."""
    models = LIBRARY / "models"
    found = check_copies(models / name for name in ("owlv2", "dab_detr", "musicgen_melody", "idefics3", "mobilebert"))
    assert len(found) >= 40
    assert {one.status for one in found} <= {"same", "ignored"}


@pytest.mark.sweep
def test_drift_planted_in_every_copy_of_the_library(tmp_path: Path) -> None:
    """Every copy of the library is the same; a comment planted in each is found, and taking it out gives the bytes."""
    root = tmp_path / "transformers"
    shutil.copytree(LIBRARY, root, ignore=shutil.ignore_patterns("__pycache__"))
    before = check_copies([root])
    assert len(before) > 1000
    assert not [one for one in before if one.is_failure]
    texts, planted = planted_in(before)
    originals = {path: path.read_text("utf-8") for path in texts}
    for path, text in texts.items():
        path.write_text(text, "utf-8")
    drifted = {(one.marker.path, one.marker.line) for one in check_copies([root]) if one.status == "drifted"}
    assert planted <= drifted
    assert bare(fix_copies([root])) == bare(originals)


def planted_in(copies: list[Copy]) -> tuple[dict[Path, str], set[tuple[Path, int]]]:
    """New texts of the files with a comment at the end of every copy that is not generated; and which markers."""
    texts: dict[Path, str] = {}
    planted = set()
    for one in copies:
        path, line = one.marker.path, one.marker.line
        text = texts.get(path) or path.read_text("utf-8")
        if one.status == "same" and GENERATED not in text and not re.search("(Ignore|End) copy", one.observed):
            lines = text.splitlines(keepends=True)
            start = next(number for number in range(line, len(lines)) if f" {one.name}" in lines[number])
            number = start + one.observed.rstrip().count("\n")
            if "# planted" not in lines[number]:
                lines[number] = f"{lines[number].rstrip()}  # planted no {len(planted)}\n"
            texts[path] = "".join(lines)
            planted.add((path, line))
    return texts, planted
