"""The compiled part of the copy engine (`native/copying.cpp`), where the installation has it.

It is optional: everything it does numpy and Python do too, transposes two to three times more slowly.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewire.stream.kernels import Array

WIDTH = 2
"""Bytes of the units that are transposed."""

_POINTER, _SIZE, _HANDLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_CHECK = (40, 71)  # rows and columns that are no whole blocks


class Compiled:
    """The functions of the library. Raises `AttributeError` if it was built without them."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._transpose = library.rewire_transpose
        self._transpose.argtypes = (_POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE)
        self._transpose.restype = None
        self._read = library.rewire_read
        self._read.argtypes = (_HANDLE, _POINTER, *(_SIZE,) * 5)
        self._read.restype = _SIZE

    def transpose(self, given: Array, taken: Array) -> Callable[[], object]:
        """What copies `taken.T` to `given`, two matrices of 2-byte units whose rows lie together."""
        arguments = (address(taken), taken.strides[0], address(given), given.strides[0], *taken.shape)
        return lambda: self._transpose(*arguments)

    def read(self, file: int, to: int, pitch: int, length: int, starts: range) -> int:
        """Reads pieces of `length` bytes to places `pitch` apart from the address `to` on; how many it has read."""
        return int(self._read(file, to, pitch, length, starts.start, starts.step, len(starts)))


def address(array: Array) -> int:
    """Where the first element of an array lies in memory."""
    return int(array.__array_interface__["data"][0])


def library_path() -> Path:
    """Where the build leaves the library."""
    suffix = {"Windows": ".dll", "Darwin": ".dylib"}.get(platform.system(), ".so")
    return Path(__file__).parents[1] / "native" / f"librewire{suffix}"


def compiled() -> Compiled | None:
    """The compiled part; None where there is none, or one that does not give what numpy gives."""
    try:
        found = Compiled(ctypes.CDLL(str(library_path())))
    except (OSError, AttributeError):
        return None
    return found if _is_right(found) else None


def _is_right(found: Compiled) -> bool:
    import numpy as np

    taken = np.arange(_CHECK[0] * _CHECK[1], dtype=np.uint16).reshape(_CHECK)
    given = np.zeros(_CHECK[::-1], np.uint16)
    found.transpose(given, taken)()
    return np.array_equal(given, taken.T)
