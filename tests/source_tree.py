"""Small trees of modular files and their parents, for the tests of `rewire.source`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

import pytest

from rewire.source import FormatterError, build, find_ruff

MODELS = {"llama": "Llama", "gemma": "Gemma", "gemma_text": "GemmaText", "clip": "CLIP", "sam": "Sam", "sam2": "Sam2"}
VERSION = "5.24.0"


def suitable_ruff() -> str | None:
    try:
        return find_ruff()
    except FormatterError:
        return None


RUFF = suitable_ruff()
needs_ruff = pytest.mark.skipif(RUFF is None, reason="no ruff from 0.13.1 to 0.14, which Transformers' bytes need")


def write_tree(folder: Path, files: Mapping[str, str], version: str = VERSION) -> Path:
    """Writes a package `transformers` with model files, named `llama/modeling_llama.py`; returns its model folder."""
    root = folder / "transformers"
    pairs = ", ".join(f'("{lower}", "{cased}Config")' for lower, cased in MODELS.items())
    base = {
        "__init__.py": f'__version__ = "{version}"\n',
        "models/__init__.py": "",
        "models/auto/__init__.py": "",
        "models/auto/auto_mappings.py": f"CONFIG_MAPPING_NAMES = OrderedDict([{pairs}])\n",
    }
    for name, text in (base | {f"models/{name}": text for name, text in files.items()}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text).lstrip("\n"), "utf-8")
        (path.parent / "__init__.py").touch()
    return root / "models"


def gemma_from_llama(folder: Path, parent: str, modular: str, *, kind: str = "modeling", version: str = VERSION) -> str:
    """What `modular_gemma.py` gives over `<kind>_llama.py`, from the imports on.

    The modular file has the import of every name that begins with `Llama` written for it.
    """
    names = sorted({word.strip("(),:") for word in modular.replace("(", " ").split() if word.startswith("Llama")})
    imports = f"from ..llama.{kind}_llama import {', '.join(names)}\n"
    files = {f"llama/{kind}_llama.py": parent, "gemma/modular_gemma.py": imports + dedent(modular)}
    models = write_tree(folder, files, version)
    texts = build(models / "gemma" / "modular_gemma.py", ruff=RUFF)
    return body_of(texts[f"{kind}_gemma.py"])


def body_of(text: str) -> str:
    """A generated file without its banner and without blank lines around it."""
    return "\n".join(text.split("\n")[6:]).strip() + "\n"
