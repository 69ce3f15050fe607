"""Vectors on disk while they are made: rows are added, and a run that was interrupted goes on.

```
vectors.npy.part        the rows so far, behind a header that is completed at the end
vectors.npy.part.json   how many of them are safe on disk, from which texts, with which settings
```
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import xxhash

from rewire.errors import EncodeError, OutputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

FORMATS = (".npy", ".parquet")
_HEADER = 128
"""Bytes in front of the rows; the numbers in it may grow to any size without moving them."""

_ROWS = 65_536
"""Rows in one group of a Parquet file."""


@dataclass(frozen=True)
class Progress:
    """What is safe on disk.

    Attributes:
        rows: vectors written.
        chunks: chunks of texts they come from.
        width: of a vector; 0 while there is none.
        texts: hash of the texts so far.
        settings: what the vectors depend on besides the texts.
    """

    rows: int
    chunks: int
    width: int
    texts: str
    settings: Mapping[str, Any]


class VectorFile:
    """A file of vectors in the making; `finish` gives it its name, anything else leaves what can be resumed.

    Raises `OutputError` where the file exists, cannot be written, or belongs to another run.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False):
        self.path = path
        self.part = path.with_name(f"{path.name}.part")
        self.note = path.with_name(f"{path.name}.part.json")
        self.hash = xxhash.xxh3_128()
        self.state = Progress(0, 0, 0, self.hash.hexdigest(), dict(settings))
        _check_name(path, overwrite)
        found = None if overwrite else self._found()
        if resume and found is not None:
            self._accept(found)
        elif found is not None:
            raise OutputError(
                f"{self.part} is there from a run that was interrupted after {found.rows:,} texts; go on with it "
                "(--resume), or begin anew (--overwrite)"
            )
        self._file = self._open()

    def _found(self) -> Progress | None:
        if not (self.part.is_file() and self.note.is_file()):
            return None
        try:
            return Progress(**json.loads(self.note.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise OutputError(f"{self.note} is damaged ({error}); begin anew (--overwrite)") from error

    def _accept(self, found: Progress) -> None:
        wanted = self.state.settings
        changed = sorted(key for key in {*wanted, *found.settings} if wanted.get(key) != found.settings.get(key))
        if changed:
            raise OutputError(
                f"{self.part} was made with another {', '.join(changed)}; use the same, or begin anew (--overwrite)"
            )
        if self.part.stat().st_size < _HEADER + found.rows * found.width * 4:
            raise OutputError(f"{self.part} is shorter than its note says; begin anew (--overwrite)")
        self.state = found

    def _open(self) -> IO[bytes]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.part.touch()
            file = self.part.open("r+b")
        except OSError as error:
            raise OutputError(f"cannot write {self.part}: {error.strerror or error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise OutputError(f"another run is writing {self.part} right now ({error.strerror})") from error
        file.truncate(_HEADER + self.state.rows * self.state.width * 4)
        file.seek(0, os.SEEK_END)
        return file

    def skip(self, texts: tuple[str, ...]) -> None:
        """Takes note of texts whose vectors are there already."""
        self._hash(texts)

    def check_skipped(self) -> None:
        """Raises `OutputError` if the texts that were skipped are not those the vectors were made of."""
        if self.hash.hexdigest() != self.state.texts:
            raise OutputError(f"{self.part} was made of other texts; give the same ones, or begin anew (--overwrite)")

    def add(self, texts: tuple[str, ...], vectors: Vectors) -> None:
        """Writes the vectors of one chunk of texts, `[texts, width]`; when it returns they are safe on disk."""
        width = self.state.width or vectors.shape[1]
        if vectors.shape != (len(texts), width):
            raise EncodeError(f"{len(texts)} texts gave vectors of shape {vectors.shape}, expected width {width}")
        self._hash(texts)
        try:
            self._file.write(vectors.astype("<f4", copy=False).tobytes())
            self._file.flush()
            os.fsync(self._file.fileno())
            rows = self.state.rows + len(texts)
            self.state = Progress(rows, self.state.chunks + 1, width, self.hash.hexdigest(), self.state.settings)
            _write_whole(self.note, json.dumps(asdict(self.state)))
        except OSError as error:
            raise OutputError(
                f"cannot write {self.part}: {error.strerror or error}; what is there can be resumed (--resume)"
            ) from error

    def _hash(self, texts: tuple[str, ...]) -> None:
        for text in texts:
            data = text.encode("utf-8", "surrogatepass")
            self.hash.update(len(data).to_bytes(8, "little") + data)

    def finish(self) -> None:
        """Completes the file and gives it its name."""
        try:
            self._file.seek(0)
            self._file.write(_header(self.state.rows, self.state.width))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            if self.path.suffix == ".parquet":
                _to_parquet(self.part, self.path)
                self.part.unlink()
            else:
                self.part.replace(self.path)
            self.note.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}; resume with --resume") from error

    def close(self) -> None:
        """Leaves the file as it is."""
        with contextlib.suppress(OSError):
            self._file.close()
        if not self.state.rows:  # nothing to go on with
            for path in (self.part, self.note):
                path.unlink(missing_ok=True)


def _check_name(path: Path, overwrite: bool) -> None:
    if path.suffix not in FORMATS:
        raise OutputError(f"{path} must end in {' or '.join(FORMATS)}")
    if path.suffix == ".parquet":
        _parquet()
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; choose another name, or allow overwriting it (--overwrite)")


def _header(rows: int, width: int) -> bytes:
    """The head of an .npy file (format 1.0) of float32 rows, `_HEADER` bytes."""
    said = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    text = said.ljust(_HEADER - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("ascii")


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise OutputError("writing Parquet needs pyarrow: pip install 'rewire[parquet]', or write .npy") from error
    return pyarrow


def _to_parquet(rows: Path, path: Path) -> None:
    """Writes the rows of an .npy file as a column `vector`, a group at a time; the file appears whole."""
    import numpy as np

    arrow = _parquet()
    vectors = np.load(rows, mmap_mode="r")
    width = int(vectors.shape[1])
    schema = arrow.schema([("vector", arrow.list_(arrow.float32(), width or 1))])
    beside = path.with_name(f"{path.name}.new")
    with arrow.parquet.ParquetWriter(beside, schema) as writer:
        for start in range(0, len(vectors), _ROWS):
            values = arrow.array(np.ascontiguousarray(vectors[start : start + _ROWS]).reshape(-1))
            column = arrow.FixedSizeListArray.from_arrays(values, width)
            writer.write_table(arrow.Table.from_arrays([column], schema=schema))
    beside.replace(path)
