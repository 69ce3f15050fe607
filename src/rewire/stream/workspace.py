"""The folder in which a job works until its result is whole: `.NAME.rewire-convert` beside the destination.

```
.NAME.rewire-convert/
  model/                the result; becomes NAME by one rename
  lock                  held by whoever writes (all parts together, or one job for itself)
  part-3-of-16.lock     held by the process that writes this part
  part-3-of-16.jsonl    its journal
```
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rewire.errors import OutputError
from rewire.stream.journal import Journal

WHOLE = (1, 1)
"""The part that is everything."""

_JOURNAL = re.compile(r"part-(\d+)-of-(\d+)\.jsonl")


class Workspace:
    """The work folder of one destination."""

    def __init__(self, destination: Path) -> None:
        self.destination = destination
        self.root = destination.parent / f".{destination.name}.rewire-convert"
        self.model = self.root / "model"

    def journal(self, part: tuple[int, int]) -> Journal:
        """The journal of a part."""
        return Journal(self.root / f"part-{part[0]}-of-{part[1]}.jsonl")

    def journals(self) -> dict[tuple[int, int], Journal]:
        """All journals that have a first line, by their parts."""
        if not self.root.is_dir():
            return {}
        matches = (_JOURNAL.fullmatch(name) for name in sorted(os.listdir(self.root)))
        parts = [(int(match[1]), int(match[2])) for match in matches if match]
        found = {part: self.journal(part) for part in parts}
        return {part: journal for part, journal in found.items() if journal.heading() is not None}

    @contextmanager
    def locked(self, part: tuple[int, int] | None) -> Iterator[None]:
        """Keeps other writers away; `part` None: from the whole.

        Raises:
            OutputError: somebody else is writing there.
        """
        self._make()
        with ExitStack() as held:
            alone = part is None or part == WHOLE
            held.enter_context(self._lock("lock", exclusive=alone))
            if not alone:
                assert part is not None
                held.enter_context(self._lock(f"part-{part[0]}-of-{part[1]}.lock", exclusive=True))
            self.model.mkdir(exist_ok=True)
            yield
        self._tidy()

    def _make(self) -> None:
        self.root.parent.mkdir(parents=True, exist_ok=True)
        self.root.mkdir(exist_ok=True)
        if self.root.is_symlink():
            raise OutputError(f"{self.root} is a link; take it away")

    @contextmanager
    def _lock(self, name: str, *, exclusive: bool) -> Iterator[None]:
        handle = self._open_locked(name, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        try:
            if exclusive:
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            yield
        finally:
            os.close(handle)

    def _open_locked(self, name: str, kind: int) -> int:
        """A lock file that is locked and still lies there: whoever finishes a job takes its folder away."""
        while True:
            handle = self._open_lock(name)
            try:
                self._take(handle, kind)
                if _same_file(handle, self.root / name):
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)
            self._make()

    def _open_lock(self, name: str) -> int:
        while True:
            try:
                return os.open(self.root / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:
                self._make()

    def _take(self, handle: int, kind: int) -> None:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{self.destination} is being written by {self._holders() or 'another process'}; wait for it to end"
            ) from None
        except OSError as error:
            raise OutputError(
                f"the file system of {self.root.parent} knows no locks ({error.strerror}), so two writers could not be "
                "told apart; write to another one and move the folder"
            ) from error

    def _holders(self) -> str:
        return ", ".join(dict.fromkeys(filter(None, map(_holder, sorted(self.root.glob("*lock"))))))

    def clear(self) -> None:
        """Forgets everything that was written, but not who holds the locks."""
        for path in self.root.iterdir():
            if not path.name.endswith("lock"):
                _take_away(path)
        self.model.mkdir(exist_ok=True)

    def remove(self) -> None:
        """Takes the folder away; the locks go last, so that nobody else begins in the meantime."""
        if self.root.is_dir():
            for path in sorted(self.root.iterdir(), key=lambda path: path.name.endswith("lock")):
                _take_away(path)
            self._tidy()

    def _tidy(self) -> None:
        """On NFS a lock that is still held leaves a file behind until it is let go."""
        with suppress(OSError):
            self.root.rmdir()


def _take_away(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _holder(path: Path) -> str:
    """Who holds a lock for himself. One that was killed holds none, though the file still names him."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read(1000).decode("utf-8", "replace").strip()
    return ""


@contextmanager
def enough_space(work: Workspace) -> Iterator[None]:
    """Raises `OutputError` where the system says that nothing more can be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise
        raise OutputError(
            f"nothing more can be written to {work.root} ({error.strerror}). The shards that are done are kept: make "
            "room and go on with resume=True (--resume)"
        ) from error


def _same_file(handle: int, path: Path) -> bool:
    try:
        found, held = os.stat(path, follow_symlinks=False), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


def sync_folder(folder: Path) -> None:
    """Has the names in a folder on disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
