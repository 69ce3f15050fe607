"""What answers without PyTorch: help, versions, plans."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cli_runner import rewire

HEAVY = ("torch", "transformers", "peft", "accelerate")
COMMANDS = [
    [],
    ["inspect"],
    ["apply"],
    ["adapters"],
    ["prove"],
    ["coverage"],
    ["demo"],
    ["encode"],
    ["perplexity"],
    ["quality"],
    ["anatomy"],
    ["bench"],
    *(["bench", one] for one in ("run", "list", "show", "compare", "gate", "export", "report", "dashboard")),
    ["bisect"],
    ["bisect", "plan"],
    ["bisect", "commits"],
    ["bisect", "versions"],
    ["plan"],
    ["plan", "check"],
    ["plan", "show"],
    ["plan", "resolve"],
    ["plan", "schema"],
    ["modular"],
    ["modular", "build"],
    ["modular", "check"],
    ["modular", "graph"],
    ["modular", "explain"],
    ["modular", "lint"],
    ["modular", "new"],
    ["modular", "copies"],
]
PLANS = sorted((Path(__file__).parents[1] / "examples" / "plans").glob("*.yaml"))


def loaded_by(*args: str) -> tuple[int, set[str]]:
    """Exit code of a command in a process of its own, and which heavy packages it loaded."""
    code = (
        "import sys\n"
        "from rewire.cli import main\n"
        f"sys.argv = ['rewire', *{list(args)!r}]\n"
        "try:\n    main()\n"
        f"finally:\n    print('LOADED', *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    line = next(line for line in done.stderr.splitlines() if line.startswith("LOADED"))
    return done.returncode, set(line.split()[1:])


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["apply", "--help"],
        ["--version"],
        ["plan", "check", *map(str, PLANS)],
        ["plan", "show", str(PLANS[0])],
        ["plan", "schema"],
        ["modular", "--help"],
        ["modular", "build", "--help"],
    ],
    ids=" ".join,
)
def test_this_loads_neither_torch_nor_transformers(args: list[str]) -> None:
    assert loaded_by(*args) == (0, set())


@pytest.mark.parametrize("args", [["inspect", "/nowhere/at/all"], ["apply", "m", "--out", "o"], ["prove", "a"]])
def test_wrong_usage_is_told_before_torch_is_loaded(args: list[str]) -> None:
    assert loaded_by(*args) == (2, set())


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: list[str]) -> None:
    done = rewire(*command, "--help")
    assert done.code == 0
    assert "Usage: " in done.out
    assert done.err == ""


GROUPS = ([], ["bench"], ["bisect"], ["plan"], ["modular"])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in GROUPS], ids=" ".join)
def test_every_command_shows_an_example(command: list[str]) -> None:
    assert f"Example: rewire {' '.join(command)} " in rewire(*command, "--help").out


@pytest.mark.parametrize("command", [[], ["inspect"], ["apply"], ["prove"], ["demo"]], ids=" ".join)
def test_exit_codes_are_documented(command: list[str]) -> None:
    shown = " ".join(rewire(*command, "--help").out.split())
    assert "0 done · 1 the proof failed · 2 wrong usage, bad input, refused plan" in shown


def test_versions() -> None:
    done = rewire("--version")
    assert done.code == 0
    assert done.out.startswith("rewire ")
    assert "torch 2" in done.out


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "rewire", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("rewire ")


@pytest.mark.parametrize("command", ["plan schema", f"plan show {PLANS[0]}"])
def test_a_reader_that_stops_reading_is_no_failed_proof(command: str) -> None:
    shell = f"set -o pipefail; {sys.executable} -m rewire {command} | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141)  # 0 where all was written before the reader went
    assert done.stderr == ""
