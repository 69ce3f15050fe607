"""The beginning of a new modular file: every public class of a model, inherited as it is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from rewire.errors import OutputError, RewireError
from rewire.source.build import build
from rewire.source.cache import write_whole
from rewire.source.modules import LIBRARY, Package, installed, package_around
from rewire.source.names import names_of
from rewire.source.rename import Renaming
from rewire.source.tidy import find_ruff, tidy

KINDS = ("configuration", "modeling")
"""The files that a new model usually needs of its own."""


def start(
    name: str,
    parent: str,
    folder: str | Path,
    *,
    kinds: tuple[str, ...] = KINDS,
    package: str = LIBRARY,
    ruff: str | None = None,
) -> tuple[Path, dict[str, str]]:
    """Writes a modular file for the model `name` that inherits all public classes of the model `parent`.

    Returns its path, and the files that it gives: it is built at once, and taken away again if that fails.

    Args:
        name: the new model, as files carry it: `my_llama`.
        parent: a model of the package: `llama`.
        folder: where the file is to lie; made if need be. Inside the package imports are relative.
        kinds: the types of files to inherit, as far as the parent has them.
        package: a package with a folder `models`: the one around the folder, or an installed one.

    Raises `RewireError` if there is no such model, if its classes would keep their names, or if the file exists.
    """
    path = Path(folder).resolve() / f"modular_{name}.py"
    if path.exists():
        raise OutputError(f"{path} exists")
    text = scaffold(name, parent, path.parent, kinds=kinds, package=package, ruff=ruff)
    is_new_folder = not path.parent.exists()
    write_whole({path: text})
    try:
        return path, build(path, ruff=ruff)
    except BaseException:
        path.unlink(missing_ok=True)
        if is_new_folder:
            path.parent.rmdir()
        raise


def scaffold(
    name: str,
    parent: str,
    folder: Path,
    *,
    kinds: tuple[str, ...] = KINDS,
    package: str = LIBRARY,
    ruff: str | None = None,
) -> str:
    """The text of such a file. Nothing is written."""
    if not name.isidentifier() or name != name.lower():
        raise RewireError(f"{name!r} is no name for files: small letters, digits and underscores, such as my_llama")
    around = package_around(folder / "x") or package_around(folder)
    is_inside = around is not None and around.name == package
    found = around if is_inside else installed(package)
    if found is None:
        raise RewireError(f"there is no package {package}")
    start = ".." if is_inside else f"{found.name}.models."
    text = _text(name, parent, kinds, found, start)
    return tidy({"modular.py": text}, find_ruff(ruff))["modular.py"]


def _text(name: str, parent: str, kinds: tuple[str, ...], package: Package, start: str) -> str:
    names = names_of(package.root)
    renaming = Renaming(parent, name, names)
    imports, classes, exported = [], [], []
    for module, found in _files(package, parent, kinds):
        imports.append(f"from {start}{parent}.{module} import {', '.join(found)}\n")
        for base in found:
            new = renaming.word(base)
            if new == base:
                raise RewireError(f"{base} would keep its name: it does not begin with {names.cased(parent)}")
            classes.append(f"class {new}({base}):\n    pass\n\n\n")
            exported.append(f'    "{new}",\n')
    return f"{''.join(imports)}\n\n{''.join(classes)}__all__ = [\n{''.join(exported)}]\n"


def _files(package: Package, parent: str, kinds: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Modules of the parent with their public classes."""
    folder = package.root / "models" / parent
    files = [folder / f"{kind}_{parent}.py" for kind in kinds]
    if not any(file.is_file() for file in files):
        models = sorted(one.name for one in (package.root / "models").glob("*/"))
        raise RewireError(f"{package.name} has no model {parent!r}{_nearest(parent, models)}")
    for file in files:
        if file.is_file() and (classes := list(_public_classes(file))):
            yield file.stem, classes


def _nearest(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=4, cutoff=0.6)
    return f"; nearest: {', '.join(close)}" if close else ""


def _public_classes(file: Path) -> Iterator[str]:
    """Classes that `__all__` names and the file defines, in the order of the file."""
    tree = ast.parse(file.read_text("utf-8"))
    exported = {
        element.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id == "__all__"
        for element in node.value.elts
        if isinstance(element, ast.Constant) and isinstance(element.value, str)
    }
    yield from (node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name in exported)
