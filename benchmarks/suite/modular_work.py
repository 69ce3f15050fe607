"""One conversion of the whole corpus in this process, and what it is measured against.

`python -m suite.modular_work disk|memory WORKERS`, `read -` (the list of the files read), `least LIST`.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import sys
import tokenize
from pathlib import Path

from rewire.source import build_many, modular_files, workspace


def main() -> None:
    kind, argument = sys.argv[1:]
    found = importlib.util.find_spec("transformers")
    assert found is not None
    assert found.origin is not None
    models = Path(found.origin).parent / "models"
    if kind == "read":
        answer = read(models)
    else:
        answer = least(Path(argument)) if kind == "least" else converted(models, kind, int(argument))
    print(json.dumps({**answer, "megabytes": peak_kilobytes() // 1024}))


def peak_kilobytes() -> int:
    """The largest resident memory of this process. (`getrusage` counts that of whoever started it, too.)"""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def read(models: Path) -> dict[str, int]:
    """How many files a conversion reads, and their names on stdout."""
    shop = workspace(models)
    files: dict[str, None] = {}
    for path in modular_files(models):
        files |= dict.fromkeys(map(str, (path, *(parent.path for parent in shop.convert(path).parents))))
    print("\n".join(files))
    return {"files": len(files)}


def least(files: Path) -> dict[str, int]:
    """Parses and tokenizes the files that a list names."""
    names = files.read_text("utf-8").splitlines()
    for name in names:
        text = Path(name).read_text("utf-8")
        ast.parse(text)
        for _ in tokenize.generate_tokens(io.StringIO(text).readline):
            pass
    return {"files": len(names)}


def converted(models: Path, parents: str, workers: int) -> dict[str, int]:
    """Builds everything and compares it with what is there."""
    paths = list(modular_files(models))
    built = build_many(paths, parents=parents, jobs=workers)
    have = {(path, name): text for path, one in built.items() for name, text in one.texts.items()}
    expected = {(path, one.name): one for path in paths for one in path.parent.glob("*.py") if is_made_from(one, path)}
    same = sum(have.get(key) == path.read_text("utf-8") for key, path in expected.items())
    return {"same": same, "expected": max(len(expected), len(have))}


def is_made_from(path: Path, modular: Path) -> bool:
    """Whether a file says at its top that it was generated from that modular file."""
    top = path.read_text("utf-8")[:1000]
    return path != modular and "automatically generated from" in top and f"{modular.name}." in top


if __name__ == "__main__":
    main()
