"""A PostgreSQL server of the tests' own: in a temporary folder, on a socket there, gone afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER = "rewire"
SERVANTS = ("postgres", "nobody")
"""Users that may run the server where the tests run as root, which PostgreSQL refuses."""


class NoServer(Exception):
    """There can be no server here; the message says why."""


@contextmanager
def server() -> Iterator[Path]:
    """The folder with the socket of a running server, which goes by peer or trust. Raises `NoServer`."""
    initdb, control = (_program(name) for name in ("initdb", "pg_ctl"))
    folder = Path(tempfile.mkdtemp(prefix="rewire-pg-", dir="/tmp"))  # the path of a socket may be 107 bytes long
    data, log = folder / "data", folder / "log"
    try:
        servant = _servant(folder)
        _run(servant, initdb, "-D", data, "-U", USER, "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        settings = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off -c max_connections=50"
        _run(servant, control, "-D", data, "-l", log, "-w", "-o", settings, "start")
        try:
            yield folder
        finally:
            _run(servant, control, "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _program(name: str) -> str:
    known = [shutil.which(name), *sorted(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), reverse=True)]
    found = next((path for path in known if path is not None), None)
    if found is None:
        raise NoServer(
            f"no {name}: PostgreSQL's server is not installed (scripts/install_test_services.sh installs it)"
        )
    return found


def _servant(folder: Path) -> list[str]:
    """What runs a command as a user that the server accepts."""
    if os.name != "posix":
        raise NoServer("needs sockets of Unix")
    if os.geteuid() != 0:
        return []
    import pwd

    if shutil.which("setpriv") is None:
        raise NoServer("the tests run as root, PostgreSQL does not, and there is no setpriv to change the user")
    for name in SERVANTS:
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        os.chown(folder, user.pw_uid, user.pw_gid)
        return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    raise NoServer(f"the tests run as root, PostgreSQL does not, and there is no user {' or '.join(SERVANTS)}")


def _run(servant: list[str], *command: object) -> None:
    words = [*servant, *map(str, command)]
    done = subprocess.run(words, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise NoServer(f"{Path(words[-1]).name}: {' '.join(words)} said: {done.stdout.strip()}")
