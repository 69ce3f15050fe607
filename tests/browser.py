"""Headless Chromium, as far as the tests of pages need it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SCHEMES = {"dark": 0, "light": 1}


def find() -> str | None:
    """The program; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


def dom(program: str, page: Path, folder: Path, *options: str) -> str:
    """The document of a page after it was loaded, without a network."""
    command = [
        *(program, "--headless", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder / 'profile'}"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files", "--virtual-time-budget=5000"),
        *(["--no-sandbox"] if os.geteuid() == 0 else []),  # it has none as root
        *(*options, "--dump-dom", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def measured(program: str, page: Path, folder: Path, script: str, *, width: int, scheme: str = "light") -> Any:
    """What a function `script` of the document gives, in a frame of `width` pixels."""
    outer = folder / "frame.html"
    outer.write_text(
        f'<iframe id="f" style="border:0;width:{width}px;height:900px" src="{escape(page.as_uri())}"></iframe>'
        f"<script>f.onload = () => {{ const found = ({script})(f.contentDocument, f.contentWindow);"
        ' document.title = "found:" + JSON.stringify(found) }</script>',
        "utf-8",
    )
    text = dom(program, outer, folder, f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}")
    found = re.search("<title>found:(.*?)</title>", text, re.DOTALL)
    assert found is not None, text[:500]
    return json.loads(unescape(found[1]))
