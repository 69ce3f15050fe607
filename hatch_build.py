"""Builds the compiled kernels of `src/rewire/native` when Rewire is installed, where a C++ compiler is at hand.

The kernels make packed encoders faster and change no result, so that nothing here can fail an installation: without a
compiler, or with one that fails, the library is left out with a message and Rewire runs on torch alone.

The compiler is `CXX`, or the first of c++, g++ and clang++ on the path. `REWIRE_NATIVE=0` leaves the library out,
`REWIRE_NATIVE=1` makes its absence an error (for those who build wheels).
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path("src", "rewire", "native")
SUFFIX = {"Windows": ".dll", "Darwin": ".dylib"}.get(platform.system(), ".so")
LIBRARY = f"librewire{SUFFIX}"

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-DNDEBUG")
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
# The kernels are compiled for each of these; which serve is found out when the library runs. An instruction set that
# the compiler does not know, or another processor's, is left out.
KERNELS: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512bf16": (*AVX512, "-mavx512vnni", "-mavx512bf16"),
}


class BuildFailed(Exception):
    """No library came of it; the text says why."""


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the library to a wheel, and builds it in place for an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        wanted = os.environ.get("REWIRE_NATIVE", "")
        if self.target_name != "wheel" or wanted == "0":
            return
        target = Path(self.root) / SOURCES / LIBRARY
        try:
            build(Path(self.root) / SOURCES, target)
        except BuildFailed as problem:
            if wanted == "1":
                raise SystemExit(f"The compiled kernels could not be built: {problem}") from problem
            target.unlink(missing_ok=True)  # one of other sources would only be refused
            self.app.display_warning(f"Rewire without its compiled kernels: {problem}")
            return
        if version != "editable":
            build_data["force_include"][str(target)] = f"rewire/native/{LIBRARY}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag()}"

    def clean(self, versions: list[str]) -> None:
        (Path(self.root) / SOURCES / LIBRARY).unlink(missing_ok=True)


def build(sources: Path, target: Path) -> None:
    """Compiles the library to `target`, replacing it as a whole.

    Raises:
        BuildFailed: no compiler, or one that does not get through the portable kernels.
    """
    compiler = find_compiler()
    with tempfile.TemporaryDirectory() as folder:

        def compile_kernels(name: str, flags: tuple[str, ...]) -> str:
            what = (
                f"-DREWIRE_KERNELS={name}",
                "-c",
                str(sources / "kernels.cpp"),
                "-o",
                str(Path(folder, f"{name}.o")),
            )
            return run(*compiler, *FLAGS, *flags, *what)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            problems = dict(zip(KERNELS, threads.map(compile_kernels, KERNELS, KERNELS.values()), strict=True))
        if problems["portable"]:
            raise BuildFailed(problems["portable"])
        built = [name for name, problem in problems.items() if not problem]
        defined = (f"-DREWIRE_{name.upper()}" for name in built)
        objects = (str(Path(folder, f"{name}.o")) for name in built)
        made = Path(folder, LIBRARY)
        link = ("-shared", *objects, "-pthread", "-o", str(made))
        whole = (str(sources / name) for name in ("rewire.cpp", "copying.cpp"))
        problem = run(*compiler, *FLAGS, *defined, *whole, *link)
        if problem:
            raise BuildFailed(problem)
        put_in_place(made, target)


def find_compiler() -> list[str]:
    """The command that compiles.

    Raises:
        BuildFailed: there is none.
    """
    given = os.environ.get("CXX")
    if given:
        return shlex.split(given)
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return [found]
    raise BuildFailed("no C++ compiler found (c++, g++, clang++, or the one that CXX names)")


def run(*command: str) -> str:
    """What went wrong, in a few lines; empty when nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command[0]}: {error}"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
    return "\n".join([f"{command[0]} failed with status {done.returncode}", *lines[:3]])


def put_in_place(made: Path, target: Path) -> None:
    """By renaming: a process that has the old library loaded keeps it."""
    beside = target.with_suffix(".new")
    shutil.copyfile(made, beside)
    os.replace(beside, target)


def platform_tag() -> str:
    """What the library runs on, in the words of a wheel's name."""
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
