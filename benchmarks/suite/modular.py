"""`rewire modular` on every modular file of the installed Transformers, against the least that has to be done.

The baseline parses and tokenizes every file that a conversion has to read, once: no converter can do without that.
Every variant runs in a process of its own, so that nothing is kept from round to round; its start is part of its time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from suite.results import Result, Verdict, results
from suite.timing import Effort, Variant, interleave

GROUP = "modular"
LEAST = "ast.parse + tokenize of every file read"
DISK, NOTHING = "parents on disk", "from nothing"
CASES = {
    f"{DISK}, 1 worker": ("disk", 1),
    f"{NOTHING}, 1 worker": ("memory", 1),
    f"{DISK}, 2 workers": ("disk", 2),
    f"{NOTHING}, 2 workers": ("memory", 2),
}
AIMS = dict.fromkeys(list(CASES)[:2], 2.5)
HERE = Path(__file__).parents[1]


def run(effort: Effort) -> Iterator[Result]:
    yield from _corpus(effort)
    yield from _command(effort)


def _corpus(effort: Effort) -> Iterator[Result]:
    """The whole corpus, converted and formatted, but not written."""
    found: dict[str, Mapping[str, int]] = {}

    def variant(name: str, *arguments: object) -> Variant:
        return Variant(name, lambda: found.update({name: _in_process(*arguments)}))

    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as files:
        print(*_lines("read", "-")[:-1], sep="\n", file=files, flush=True)
        variants = [variant(LEAST, "least", files.name), *(variant(name, *case) for name, case in CASES.items())]
        samples = interleave(variants, 0, least=1 if effort.quick else 3, warm_up=False)
    verdicts = {name: _judge(found[name]) for name in CASES}
    alone = {name: one for name, one in found.items() if "2 workers" not in name}  # workers have memory of their own
    notes = {name: {"peak memory": f"{one['megabytes']} MB"} for name, one in alone.items()}
    case = f"{found[LEAST]['files']} files read"
    yield from results(GROUP, case, samples, aims=AIMS, verdicts=verdicts, notes=notes)


def _judge(found: Mapping[str, int]) -> Verdict:
    text = f"{found['same']} of {found['expected']} generated files byte-identical"
    return Verdict(text, found["same"] == found["expected"])


def _in_process(*arguments: object) -> Mapping[str, int]:
    answer: Mapping[str, int] = json.loads(_lines(*arguments)[-1])
    return answer


def _lines(*arguments: object) -> list[str]:
    command = [sys.executable, "-m", "suite.modular_work", *map(str, arguments)]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.splitlines()


# ---------------------------------------------------------------- the command


def _command(effort: Effort) -> Iterator[Result]:
    """What a contributor waits for: help, nothing to do, one file changed. On a copy of the tree."""
    with tempfile.TemporaryDirectory() as folder:
        models, cache = _copied(Path(folder)), Path(folder, "cache")
        build = ("modular", "build", str(models), "--reference-behaviour", "--cache", str(cache))
        _rewire(*build)
        changed = models / "gemma" / "modular_gemma.py"
        variants = (
            Variant("python -c pass", lambda: subprocess.run([sys.executable, "-c", "pass"], check=True)),
            Variant("rewire modular --help", lambda: _rewire("modular", "--help")),
            Variant("build, nothing changed", lambda: _rewire(*build)),
            Variant("build, one file changed", lambda: _rewire(*build), lambda: _touch(changed)),
        )
        samples = interleave(variants, effort.seconds(15), least=3)
    yield from results(GROUP, "the command on the whole tree", samples)


def _copied(folder: Path) -> Path:
    found = importlib.util.find_spec("transformers")
    assert found is not None
    assert found.origin is not None
    package = Path(found.origin).parent
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    return Path(shutil.copytree(package, folder / "transformers", ignore=ignored)) / "models"


def _touch(path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("# changed\n")


def _rewire(*arguments: str) -> None:
    command = [str(Path(sys.executable).with_name("rewire")), *arguments]
    subprocess.run(command, capture_output=True, check=True, env=os.environ | {"COLUMNS": "100"})
