"""Replacements change the length of lines: drifted copies are laid out anew, so that a diff shows what matters."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

from rewire.source.copies import indented, outdented

if TYPE_CHECKING:
    from rewire.source.copies_check import Copy

_LINE_LENGTH = 119


def formatted(copies: Sequence[Copy]) -> list[Copy]:
    """The copies, what drifted ones should be as ruff (of any version) lays it out; as it is where there is no ruff."""
    drifted = [number for number, one in enumerate(copies) if one.status == "drifted"]
    ruff = _ruff() if drifted else None
    if ruff is None:
        return list(copies)
    with tempfile.TemporaryDirectory(prefix="rewire-") as folder:
        for number in drifted:
            (Path(folder) / f"{number}.py").write_text(_nested(copies[number]), "utf-8")
        settings = ["--isolated", "--no-cache", "--quiet", f"--line-length={_LINE_LENGTH}"]
        subprocess.run([ruff, "format", *settings, folder], check=False, capture_output=True)
        texts = {number: (Path(folder) / f"{number}.py").read_text("utf-8") for number in drifted}
    return [replace(one, should=_unnested(one, texts[n])) if n in texts else one for n, one in enumerate(copies)]


def _nested(copy: Copy) -> str:
    """The text as deep as it stands in its file."""
    depth = len(copy.marker.indent.expandtabs()) // 4
    heads = "".join(f"{'    ' * level}class _:\n" for level in range(depth))
    return heads + indented(copy.should, 4 * depth)


def _unnested(copy: Copy, text: str) -> str:
    depth = len(copy.marker.indent.expandtabs()) // 4
    return outdented("".join(text.splitlines(keepends=True)[depth:]), 4 * depth)


def _ruff() -> str | None:
    beside = Path(sys.executable).with_name("ruff")
    return str(beside) if beside.is_file() else which("ruff")
