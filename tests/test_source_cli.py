"""`rewire modular`: build, check, graph, explain, lint, new, copies, on a small package of three generations."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from textwrap import dedent

import pytest

from cli_runner import Result, rewire
from rewire.source.cache import Records, write_whole
from rewire.source.explain import explain
from rewire.source.lint import lint
from rewire.source.modules import installed
from source_tree import needs_ruff
from test_cli_help import loaded_by

pytestmark = needs_ruff

ALPHA = """
    from torch import nn

    from .configuration_alpha import AlphaConfig


    def helper(x):
        return x


    class AlphaMLP(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.up = nn.Linear(config.size, config.size)

        def forward(self, x):
            return helper(self.up(x))


    class AlphaModel(nn.Module):
        config: AlphaConfig

        def __init__(self, config):
            super().__init__()
            self.mlp = AlphaMLP(config)

        def forward(self, x):
            return self.mlp(x)


    __all__ = ["AlphaModel"]
"""
ALPHA_CONFIG = """
    from transformers import PreTrainedConfig


    class AlphaConfig(PreTrainedConfig):
        model_type = "alpha"
        size: int = 4


    __all__ = ["AlphaConfig"]
"""
BETA = """
    from ..alpha.configuration_alpha import AlphaConfig
    from ..alpha.modeling_alpha import AlphaMLP, AlphaModel


    class BetaConfig(AlphaConfig):
        size: int = 8


    class BetaMLP(AlphaMLP):
        def forward(self, x):
            return 2 * super().forward(x)


    class BetaModel(AlphaModel):
        pass


    __all__ = ["BetaConfig", "BetaModel"]
"""
GAMMA = """
    from ..beta.modeling_beta import BetaMLP, BetaModel


    class GammaMLP(BetaMLP):
        def __init__(self, config):
            super().__init__(config)
            del self.up
            self.down = config.down


    class GammaModel(BetaModel):
        pass


    __all__ = ["GammaModel"]
"""
FILES = {
    "alpha/configuration_alpha.py": ALPHA_CONFIG,
    "alpha/modeling_alpha.py": ALPHA,
    "beta/modular_beta.py": BETA,
    "gamma/modular_gamma.py": GAMMA,
}


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A package with one model written by hand and two generations of modular files, nothing built."""
    models = tmp_path / "zoo" / "models"
    for name, text in FILES.items():
        path = models / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(dedent(text).lstrip())
    (models / "__init__.py").touch()
    (models.parent / "__init__.py").touch()
    return models


def modular(zoo: Path, *args: object) -> Result:
    """A command with a cache of its own."""
    cache = ["--cache", zoo.parent.parent / "cache"] if args[0] in ("build", "check") else []
    return rewire("modular", *args, *cache)


def generated(zoo: Path) -> list[str]:
    """Names of the files that are not in FILES."""
    return sorted(
        path.name
        for path in zoo.rglob("*.py")
        if str(path.relative_to(zoo)) not in FILES and path.name != "__init__.py"
    )


def edit(path: Path, old: str, new: str) -> None:
    """Replaces a text in a file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# ---------------------------------------------------------------- build


def test_build_from_nothing_then_only_what_has_changed(zoo: Path) -> None:
    done = modular(zoo, "build", zoo)
    assert (done.code, done.err) == (0, "")
    assert done.out == "2 modular files, 2 built, 0 up to date; 3 files written\n"
    assert generated(zoo) == ["configuration_beta.py", "modeling_beta.py", "modeling_gamma.py"]
    assert "return 2 * super().forward(x)" in (zoo / "gamma" / "modeling_gamma.py").read_text()
    assert modular(zoo, "build", zoo).out == "2 modular files, 0 built, 2 up to date; 0 files written\n"

    edit(zoo / "gamma" / "modular_gamma.py", "config.down", "config.lower")
    assert modular(zoo, "build", zoo).out == "2 modular files, 1 built, 1 up to date; 1 file written\n"


def test_a_change_goes_through_all_generations(zoo: Path) -> None:
    modular(zoo, "build", zoo)
    edit(zoo / "alpha" / "modeling_alpha.py", "self.mlp = AlphaMLP(config)", "self.inner = AlphaMLP(config)")
    assert modular(zoo, "build", zoo).out == "2 modular files, 2 built, 0 up to date; 2 files written\n"
    assert "self.inner = GammaMLP(config)" in (zoo / "gamma" / "modeling_gamma.py").read_text()


def test_a_change_without_effect_stops_there(zoo: Path) -> None:
    modular(zoo, "build", zoo)
    edit(zoo / "beta" / "modular_beta.py", "__all__", "# why\n__all__")
    edit(zoo / "beta" / "modular_beta.py", "# why\n", "")
    assert modular(zoo, "build", zoo).out == "2 modular files, 0 built, 2 up to date; 0 files written\n"


def test_an_edited_or_deleted_output_is_written_anew(zoo: Path) -> None:
    modular(zoo, "build", zoo)
    path = zoo / "gamma" / "modeling_gamma.py"
    before = path.read_text()
    path.write_text("x = 1\n")
    assert modular(zoo, "build", zoo).out == "2 modular files, 1 built, 1 up to date; 1 file written\n"
    path.unlink()
    assert modular(zoo, "build", zoo).out == "2 modular files, 1 built, 1 up to date; 1 file written\n"
    assert path.read_text() == before


def test_build_into_a_folder(zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert modular(zoo, "build", zoo, "--out", out).code == 0
    assert generated(zoo) == []
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.py")) == [
        "beta/configuration_beta.py",
        "beta/modeling_beta.py",
        "gamma/modeling_gamma.py",
    ]
    assert "0 built, 2 up to date" in modular(zoo, "build", zoo, "--out", out).out


def test_two_workers_write_the_same(zoo: Path, tmp_path: Path) -> None:
    modular(zoo, "build", zoo)
    one = {path: path.read_text() for path in zoo.rglob("*.py")}
    assert modular(zoo, "build", zoo, "--all", "--jobs", 2).out.startswith("2 modular files, 2 built")
    assert {path: path.read_text() for path in zoo.rglob("*.py")} == one


def test_an_error_keeps_nothing_else_from_being_built(zoo: Path) -> None:
    modular(zoo, "build", zoo)
    edit(zoo / "gamma" / "modular_gamma.py", "BetaMLP)", "BetaNothing)")
    edit(zoo / "gamma" / "modular_gamma.py", "BetaMLP,", "BetaNothing,")
    edit(zoo / "beta" / "modular_beta.py", "2 *", "3 *")
    before = (zoo / "gamma" / "modeling_gamma.py").read_text()
    done = modular(zoo, "build", zoo)
    assert done.code == 2
    assert done.out == "2 modular files, 1 built, 0 up to date, 1 with errors; 1 file written\n"
    head, code, caret, instead = done.err.splitlines()
    assert head.startswith(f"{zoo / 'gamma' / 'modular_gamma.py'}:4:")
    assert head.endswith("modeling_beta.py has no class BetaNothing [base-missing]")
    assert code == "    4 | class GammaMLP(BetaNothing):"
    assert set(caret.partition("|")[2].strip()) == {"^"}
    assert instead.startswith("  instead: ")
    assert (zoo / "gamma" / "modeling_gamma.py").read_text() == before
    assert not list(zoo.rglob(".*"))


def test_what_no_file_can_hold_is_refused(zoo: Path) -> None:
    edit(zoo / "beta" / "modular_beta.py", "class BetaModel", "print(1)\n\n\nclass BetaModel")
    done = modular(zoo, "build", zoo / "beta")
    assert (done.code, generated(zoo)) == (2, [])
    assert "[dropped]" in done.err
    assert modular(zoo, "build", zoo / "beta", "--reference-behaviour").code == 0
    assert generated(zoo) == ["configuration_beta.py", "modeling_beta.py"]


def test_problems_for_programs(zoo: Path) -> None:
    edit(zoo / "beta" / "modular_beta.py", "AlphaMLP)", "AlphaNothing)")
    edit(zoo / "beta" / "modular_beta.py", "AlphaMLP,", "AlphaNothing,")
    path = zoo / "beta" / "modular_beta.py"
    [found] = modular(zoo, "build", path, "--format", "json").json
    assert (found["file"], found["line"], found["rule"]) == (str(path), 9, "base-missing")
    sarif = modular(zoo, "build", path, "--format", "sarif").json
    [run] = sarif["runs"]
    assert sarif["version"] == "2.1.0"
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["base-missing"]
    [result] = run["results"]
    assert result["level"] == "error"
    assert result["locations"][0]["physicalLocation"]["region"]["startLine"] == 9


def test_a_circle_is_named(zoo: Path) -> None:
    modular(zoo, "build", zoo)
    edit(
        zoo / "beta" / "modular_beta.py",
        "from ..alpha.modeling_alpha",
        "from ..gamma.modeling_gamma import G\nfrom ..alpha.modeling_alpha",
    )
    done = modular(zoo, "build", zoo)
    assert done.code == 2
    assert "[circular-inheritance]" in done.err


def test_a_damaged_cache_costs_a_build(zoo: Path, tmp_path: Path) -> None:
    modular(zoo, "build", zoo)
    [record] = (tmp_path / "cache").glob("*.json")
    assert len(Records(record.parent, zoo.parent).builds) == 2
    record.write_text(record.read_text()[:100])
    assert "2 built" in modular(zoo, "build", zoo).out
    assert "0 built" in modular(zoo, "build", zoo).out


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").mkdir()
    with pytest.raises(OSError, match="b"):
        write_whole({tmp_path / "c" / "d": "new", tmp_path / "b": "new"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "name modular files"),
        (("pyproject.toml",), "is no modular file"),
        (("--package", "no_such_package_abc"), "no installed package"),
    ],
)
def test_wrong_usage(args: tuple[str, ...], said: str) -> None:
    done = rewire("modular", "build", *args)
    assert (done.code, done.out) == (2, "")
    assert said in " ".join(done.err.split())


def test_watch_builds_when_a_file_changes(zoo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rewire", "modular", "build", str(zoo), "--watch", "--cache", str(tmp_path / "c")]
    # In the background of a shell, interrupts are ignored, and children inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heed) as running:  # noqa: PLW1509
        try:
            assert running.stdout is not None
            assert "2 built" in running.stdout.readline()
            time.sleep(0.5)
            edit(zoo / "gamma" / "modular_gamma.py", "config.down", "config.lower")
            assert "1 built" in running.stdout.readline()
        finally:
            running.send_signal(signal.SIGINT)
    assert running.returncode == 0
    assert "config.lower" in (zoo / "gamma" / "modeling_gamma.py").read_text()


# ---------------------------------------------------------------- check


def test_check_finds_drift(zoo: Path) -> None:
    modular(zoo, "build", zoo)
    assert modular(zoo, "check", zoo).out == "2 modular files checked, 0 generated files differ\n"
    path = zoo / "beta" / "modeling_beta.py"
    edit(path, "return 2 * helper", "return 3 * helper") if "2 * helper" in path.read_text() else edit(
        path, "2 *", "3 *"
    )
    done = modular(zoo, "check", zoo)
    assert done.code == 1
    assert "-" in done.out
    assert "3 *" in done.out
    [found, *others] = modular(zoo, "check", zoo, "--format", "json").json
    assert found["rule"] == "drift"
    assert found["file"] == str(path)
    assert len(others) <= 1  # gamma, which inherits from what was changed


def test_check_finds_missing_and_left_over_files(zoo: Path) -> None:
    modular(zoo, "build", zoo)
    (zoo / "gamma" / "modeling_gamma.py").rename(zoo / "gamma" / "processing_gamma.py")
    done = modular(zoo, "check", zoo)
    assert done.code == 1
    assert f"{zoo / 'gamma' / 'modeling_gamma.py'}: missing (by modular_gamma.py)" in done.out
    assert f"{zoo / 'gamma' / 'processing_gamma.py'}: left over (by modular_gamma.py)" in done.out


def test_check_reports_errors(zoo: Path) -> None:
    (zoo / "beta" / "modular_beta.py").write_text("class Broken(:\n")
    done = modular(zoo, "check", zoo / "beta")
    assert done.code == 2
    assert "[syntax]" in done.err


# ---------------------------------------------------------------- graph


def test_graph(zoo: Path) -> None:
    modular(zoo, "build", zoo)
    assert rewire("modular", "graph", zoo).out == (
        "depth 0\n  beta <- (configuration_alpha), (modeling_alpha)\ndepth 1\n  gamma <- beta\n"
    )
    data = rewire("modular", "graph", zoo, "--format", "json").json
    assert (data["depth"], data["circular"]) == (2, [])
    assert data["files"][1]["inherits_from"] == [str(zoo / "beta" / "modular_beta.py")]
    picture = ET.fromstring(rewire("modular", "graph", zoo, "--format", "svg").out)
    assert [one.text for one in picture.iter("{http://www.w3.org/2000/svg}text")] == ["beta", "gamma"]


@pytest.mark.parametrize(
    ("changed", "affected"),
    [
        ("alpha/modeling_alpha.py", ["beta", "gamma"]),
        ("beta/modular_beta.py", ["beta", "gamma"]),
        ("beta/modeling_beta.py", ["gamma"]),
        ("gamma/modular_gamma.py", ["gamma"]),
        ("gamma/modeling_gamma.py", []),
    ],
)
def test_what_a_change_regenerates(zoo: Path, changed: str, affected: list[str]) -> None:
    modular(zoo, "build", zoo)
    out = rewire("modular", "graph", zoo, "--changed", zoo / changed).out
    assert out.splitlines() == [str(zoo / name / f"modular_{name}.py") for name in affected]


# ---------------------------------------------------------------- explain


def test_explain(zoo: Path) -> None:
    modular(zoo, "build", zoo)
    path = zoo / "gamma" / "modeling_gamma.py"
    [found] = rewire("modular", "explain", path, "GammaMLP", "--json").json
    assert found["modular"] == str(zoo / "gamma" / "modular_gamma.py")
    names = {entry["name"]: entry for entry in found["entries"]}
    assert list(names) == ["GammaMLP", "GammaMLP.__init__", "GammaMLP.forward"]
    files = [Path(origin["file"]).name for origin in names["GammaMLP.__init__"]["origins"]]
    assert files == ["modeling_beta.py", "modular_gamma.py"]
    assert names["GammaMLP.forward"]["origins"][0]["renamed"] == ["beta", "gamma"]
    table = rewire("modular", "explain", path).out
    assert "GammaMLP.__init__" in table
    assert "(beta -> gamma)" in table


def test_explain_beside_the_code(zoo: Path) -> None:
    modular(zoo, "build", zoo)
    path = zoo / "gamma" / "modeling_gamma.py"
    lines = rewire("modular", "explain", path, "--annotate").out.splitlines()
    assert [line.partition(" | ")[2].rstrip() for line in lines] == [
        one.rstrip() for one in path.read_text().splitlines()
    ]
    [line] = [line for line in lines if "self.down = config.down" in line]
    number = (zoo / "gamma" / "modular_gamma.py").read_text().splitlines().index("        self.down = config.down") + 1
    assert line.startswith(f"modular_gamma.py:{number}")


def test_explain_what_is_not_there(zoo: Path) -> None:
    modular(zoo, "build", zoo)
    done = rewire("modular", "explain", zoo / "gamma" / "modeling_gamma.py", "Nothing")
    assert (done.code, "has no Nothing" in done.err) == (2, True)
    done = rewire("modular", "explain", zoo / "alpha" / "modeling_alpha.py")
    assert (done.code, "is not generated" in done.err) == (2, True)


# ---------------------------------------------------------------- lint


def test_lint(zoo: Path) -> None:
    modular(zoo, "build", zoo)
    done = rewire("modular", "lint", zoo)
    assert (done.code, done.out) == (0, "")
    edit(zoo / "gamma" / "modular_gamma.py", "class GammaModel", "def unused():\n    pass\n\n\nclass GammaModel")
    edit(zoo / "gamma" / "modular_gamma.py", "config.down", "unheard_of(config)")
    edit(
        zoo / "beta" / "modeling_beta.py", "super().__init__()", 'super().__init__()\n        self.name = "a betatron"'
    )
    done = rewire("modular", "lint", zoo, "--format", "json")
    assert done.code == 1
    found = {(Path(one["file"]).name, one["rule"]): one["message"] for one in done.json}
    assert found["modular_gamma.py", "unused"] == "no class needs unused, so that no generated file has it"
    assert "uses unheard_of, which is neither defined nor imported" in found["modular_gamma.py", "undefined-name"]
    assert found["modeling_beta.py", "word-renamed"] == (
        "'betatron' becomes 'gammatron' in modeling_gamma.py (2 times)"
    )
    some = rewire("modular", "lint", zoo, "--ignore", "unused", "--ignore", "undefined-name")
    assert [line for line in some.out.splitlines() if line.endswith("]")] == [
        line for line in some.out.splitlines() if line.endswith("[word-renamed]")
    ]
    assert rewire("modular", "lint", zoo, "--ignore", "nothing").code == 2


# ---------------------------------------------------------------- new


@pytest.mark.parametrize("parent", ["llama", "bert", "clip"])
def test_new_builds_at_once(tmp_path: Path, parent: str) -> None:
    done = rewire("modular", "new", "my_model", "--from", parent, "--dir", tmp_path / "my_model")
    assert (done.code, done.err) == (0, "")
    path = tmp_path / "my_model" / "modular_my_model.py"
    assert f"from transformers.models.{parent}.modeling_{parent} import " in path.read_text()
    assert rewire("modular", "build", path, "--cache", tmp_path / "c").code == 0
    text = (tmp_path / "my_model" / "modeling_my_model.py").read_text()
    assert "class MyModelModel(MyModelPreTrainedModel):" in text
    assert parent not in text.lower().replace("my_model", "").replace("meta-llama", "").split("__all__")[1]
    assert rewire("modular", "lint", path, "--ignore", "word-renamed", "--ignore", "orphan").out == ""


def test_new_inside_a_package_imports_relatively(zoo: Path) -> None:
    done = rewire("modular", "new", "delta", "--from", "alpha", "--dir", zoo / "delta", "--package", "zoo")
    assert done.code == 0
    assert (zoo / "delta" / "modular_delta.py").read_text() == dedent(
        """\
        from ..alpha.configuration_alpha import AlphaConfig
        from ..alpha.modeling_alpha import AlphaModel


        class DeltaConfig(AlphaConfig):
            pass


        class DeltaModel(AlphaModel):
            pass


        __all__ = [
            "DeltaConfig",
            "DeltaModel",
        ]
        """
    )


@pytest.mark.parametrize(
    ("name", "parent", "said"),
    [("my", "lama", "nearest: llama"), ("My-Model", "llama", "is no name for files"), ("my", "llama", "exists")],
)
def test_new_refuses(tmp_path: Path, name: str, parent: str, said: str) -> None:
    if said == "exists":
        (tmp_path / "modular_my.py").touch()
    done = rewire("modular", "new", name, "--from", parent, "--dir", tmp_path)
    assert done.code == 2
    assert said in " ".join(done.err.split())
    assert len(list(tmp_path.iterdir())) == (said == "exists")


# ---------------------------------------------------------------- copies


def test_copies(zoo: Path) -> None:
    path = zoo / "alpha" / "modeling_copy.py"
    path.write_text("# Copied from zoo.models.alpha.modeling_alpha.helper\ndef helper(x):\n    return x + 1\n")
    done = rewire("modular", "copies", zoo)
    assert done.code == 1
    assert "-    return x + 1\n+    return x\n" in done.out
    assert done.out.endswith("1 markers: 1 drifted\n")
    assert rewire("modular", "copies", zoo, "--json").json["copies"][0]["status"] == "drifted"
    done = rewire("modular", "copies", zoo, "--fix")
    assert (done.code, done.out) == (0, "1 markers: 1 same\n1 file put right\n")
    assert path.read_text().endswith("def helper(x):\n    return x\n")


# ---------------------------------------------------------------- the library


def library_file(name: str) -> Path:
    """A file of the installed library."""
    package = installed("transformers")
    assert package is not None
    return package.root / "models" / name


def test_lines_of_the_library_are_traced_to_the_same_lines() -> None:
    """What is neither renamed nor an import stands word for word where it is said to come from."""
    [found] = explain(library_file("gemma2/modeling_gemma2.py"))
    lines = found.text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(("@", "class ")))
    end = next(number for number, line in enumerate(lines) if line.startswith("__all__"))
    traced = 0
    for line, origin in list(zip(lines, found.origins, strict=True))[start:end]:
        assert origin or not line
        is_written_anew = "super()" in line or line == "    pass"  # a base called by name; an empty body
        if origin and not origin.renamed and not is_written_anew:
            traced += 1
            assert origin.path.read_text("utf-8").splitlines()[origin.line - 1].strip() == line.strip()
    assert traced > 100
    assert {one.name for one in found.entries if not one.origins} == set()
    kinds = {one.kind for one in found.entries}
    assert kinds == {"class", "method", "attribute", "function", "assignment", "import"}


def test_words_cut_by_renaming_and_orphans_in_the_library() -> None:
    found = lint(library_file(name) for name in ("sam2/modular_sam2.py", "rf_detr/modular_rf_detr.py"))
    messages = [one.message for one in found if one.rule in ("word-renamed", "orphan", "undefined-name")]
    assert messages == [
        "'sample' becomes 'sam2ple' in image_processing_sam2.py (2 times)",
        "'sampled' becomes 'sam2pled' in image_processing_sam2.py (2 times)",
        "'same' becomes 'sam2e' in image_processing_sam2.py",
        "nothing in modeling_rf_detr.py uses repeat_kv",
    ]


@pytest.mark.parametrize(
    "args", [("build",), ("check",), ("graph",), ("lint",), ("copies",), ("explain", "modular_beta.py")], ids=" ".join
)
def test_nothing_heavy_is_loaded(zoo: Path, tmp_path: Path, args: tuple[str, ...]) -> None:
    cache = ("--cache", str(tmp_path / "cache")) if args[0] in ("build", "check") else ()
    place = zoo / "beta" / args[1] if len(args) > 1 else zoo / "beta"
    code, loaded = loaded_by("modular", args[0], str(place), *cache)
    assert code == (1 if args == ("check",) else 0)
    assert loaded == set()


@pytest.mark.sweep
def test_the_library_is_up_to_date(tmp_path: Path) -> None:
    package = installed("transformers")
    assert package is not None
    cache = ("--cache", tmp_path / "cache", "--reference-behaviour")
    done = rewire("modular", "check", "--package", "transformers", *cache)
    assert (done.code, done.err) == (0, "")
    start = time.perf_counter()
    assert rewire("modular", "check", "--package", "transformers", *cache).code == 0
    assert time.perf_counter() - start < 1
    data = json.loads(rewire("modular", "graph", "--package", "transformers", "--format", "json").out)
    assert (len(data["files"]), data["depth"]) == (326, 17)
