"""What cannot be converted is refused with place, rule and advice, all at once; warnings change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewire.source import RULES, Problem, SourceError, build, build_many, convert
from source_tree import RUFF, needs_ruff, write_tree

PARENT = """
from torch import nn


class LlamaMLP(nn.Module):
    bias = False

    def forward(self, x):
        size = x
        return size


class LlamaConfig:
    pass
"""

HEAD = "from torch import nn\nfrom ..llama.modeling_llama import LlamaMLP\n"

REFUSED = {
    "parent-missing": ("from ..nowhere.modeling_nowhere import X\n", 1, 1, "modeling_nowhere.py"),
    "config-from-modeling": ("from ..llama.modeling_llama import LlamaConfig\n", 1, 1, "configuration_llama"),
    "import-from-package": ("from transformers import X\n", 1, 1, "the module that defines it"),
    "base-missing": (
        "from ..llama.modeling_llama import LlamaNothing\n\n\nclass GemmaMLP(LlamaNothing):\n    pass\n",
        4,
        1,
        "modeling_llama.py has no class LlamaNothing",
    ),
    "two-parents": (
        "from ..llama.modeling_llama import LlamaMLP, LlamaNorm\nclass GemmaMLP(LlamaMLP, LlamaNorm):\n    pass\n",
        2,
        1,
        "LlamaMLP and LlamaNorm",
    ),
    "base-not-a-name": (f"{HEAD}class GemmaMLP(LlamaMLP, make(1)):\n    pass\n", 3, 1, "make(1)"),
    "super-without-parent": (
        f"{HEAD}class GemmaMLP(LlamaMLP):\n    def reset(self):\n        super().reset()\n",
        5,
        9,
        "Base.reset(self, ...)",
    ),
    "nothing-to-delete": (f"{HEAD}class GemmaMLP(LlamaMLP):\n    size = AttributeError()\n", 4, 5, "no attribute size"),
    "mixed-decorators": (
        f"{HEAD}class GemmaMLP(LlamaMLP):\n    @no_inherit_decorator\n    @x\n    def forward(self):\n        pass\n",
        4,
        5,
        "beside 1 more",
    ),
    "code-in-guard": (
        f"{HEAD}if is_x():\n    import x\n    x = 1\nclass GemmaMLP(LlamaMLP):\n    pass\n",
        5,
        5,
        "move it",
    ),
    "syntax": ("class GemmaMLP(:\n", 1, 16, "invalid syntax"),
}


def problems_of(folder: Path, modular: str) -> tuple[Problem, ...]:
    models = write_tree(folder, {"llama/modeling_llama.py": PARENT, "gemma/modular_gemma.py": modular})
    with pytest.raises(SourceError) as caught:
        convert(models / "gemma" / "modular_gemma.py")
    return caught.value.problems


@pytest.mark.parametrize(("modular", "line", "column", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(
    tmp_path: Path, request: pytest.FixtureRequest, modular: str, line: int, column: int, says: str
) -> None:
    (problem,) = problems_of(tmp_path, modular)
    assert (problem.line, problem.column, problem.severity) == (line, column, "error")
    assert problem.path.name == "modular_gemma.py"
    assert problem.rule in RULES
    assert f"[{problem.rule}]" in request.node.name
    assert says in str(problem)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    deletions = "    a = AttributeError()\n    b = AttributeError()\n"
    modular = f"{HEAD}class GemmaMLP(LlamaMLP):\n{deletions}\n    def f(self):\n        super().f()\n"
    assert [one.line for one in problems_of(tmp_path, modular)] == [4, 5, 8]


WARNED = {
    "unused": (f"{HEAD}SIZE = 3\nclass GemmaMLP(LlamaMLP):\n    pass\n", 3),
    "not-deleted": (
        f"{HEAD}class GemmaMLP(LlamaMLP):\n    def forward(self, x):\n        raise AttributeError('')\n",
        4,
    ),
    "dropped": (f"{HEAD}print('hello')\nclass GemmaMLP(LlamaMLP):\n    pass\n", 3),
    "competing-names": (
        "from ..llama.modeling_llama import LlamaMLP\nclass GemmaMLP(LlamaMLP):\n    pass\n"
        "class GemmaTextMLP(LlamaMLP):\n    pass\n",
        2,
    ),
}


@pytest.mark.parametrize(("modular", "line"), WARNED.values(), ids=WARNED.keys())
def test_warnings(tmp_path: Path, request: pytest.FixtureRequest, modular: str, line: int) -> None:
    models = write_tree(tmp_path, {"llama/modeling_llama.py": PARENT, "gemma/modular_gemma.py": modular})
    (problem,) = convert(models / "gemma" / "modular_gemma.py").problems
    assert (problem.severity, problem.line) == ("warning", line)
    assert f"[{problem.rule}]" in request.node.name


def test_a_deletion_that_deletes_nothing_is_reported(tmp_path: Path) -> None:
    body = "    def forward(self, x):\n        super().forward(x)\n        del self.nothing\n"
    modular = f"{HEAD}class GemmaMLP(LlamaMLP):\n{body}"
    models = write_tree(tmp_path, {"llama/modeling_llama.py": PARENT, "gemma/modular_gemma.py": modular})
    (problem,) = convert(models / "gemma" / "modular_gemma.py").problems
    assert (problem.rule, problem.severity, problem.line) == ("nothing-to-delete", "warning", 6)
    assert "self.nothing" in problem.message


def test_an_assignment_that_strays_into_another_method_is_reported(tmp_path: Path) -> None:
    files = {
        "llama/modeling_llama.py": f"{PARENT}\n\nclass LlamaTwo(nn.Module):\n    def a(self):\n        size = 1\n\n"
        "    def b(self):\n        size = 1\n        return size\n",
        "gemma/modular_gemma.py": """
            from ..llama.modeling_llama import LlamaTwo
            class GemmaTwo(LlamaTwo):
                def a(self):
                    super().a()
                    size = 3

                def b(self):
                    super().b()
            """,
    }
    conversion = convert(write_tree(tmp_path, files) / "gemma" / "modular_gemma.py")
    assert [(one.rule, one.line) for one in conversion.problems] == [("carried-over", 5)]


@needs_ruff
def test_one_broken_file_does_not_keep_others_from_being_built(tmp_path: Path) -> None:
    files = {
        "llama/modeling_llama.py": PARENT,
        "gemma/modular_gemma.py": f"{HEAD}class GemmaMLP(LlamaMLP):\n    pass\n",
        "sam/modular_sam.py": f"{HEAD}class SamMLP(LlamaMLP):\n    x = AttributeError()\n",
    }
    models = write_tree(tmp_path, files)
    paths = [models / "gemma/modular_gemma.py", models / "sam/modular_sam.py"]
    good, bad = build_many(paths, ruff=RUFF).values()
    assert list(good.texts) == ["modeling_gemma.py"]
    assert not bad.texts
    assert [one.rule for one in bad.errors] == ["nothing-to-delete"]


@needs_ruff
def test_circles_are_named(tmp_path: Path) -> None:
    files = {
        "sam/modular_sam.py": "from ..gemma.modeling_gemma import GemmaMLP\nclass SamMLP(GemmaMLP):\n    pass\n",
        "gemma/modular_gemma.py": "from ..sam.modeling_sam import SamMLP\nclass GemmaMLP(SamMLP):\n    pass\n",
    }
    path = write_tree(tmp_path, files) / "gemma" / "modular_gemma.py"
    with pytest.raises(
        SourceError, match=r"modular_gemma\.py inherits from modular_sam\.py inherits from modular_gemma"
    ):
        build(path, ruff=RUFF)
    (built,) = build_many([path], parents="memory", ruff=RUFF).values()
    assert [one.rule for one in built.errors] == ["circular-inheritance"]


def test_every_rule_is_tested() -> None:
    elsewhere = {"circular-inheritance", "carried-over", "broken-output"}
    assert REFUSED.keys() | WARNED.keys() | elsewhere == RULES.keys()
