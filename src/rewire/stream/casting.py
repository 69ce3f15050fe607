"""Floating-point types changed in plain bytes, with numpy and without torch, bit for bit as torch does it.

Rounding is to the nearest value, ties to even; what is too large becomes infinite, and subnormal values stay. As in
torch, F64 reaches F16 and BF16 by way of F32.

NaN stays NaN. Its bits are those that torch gives for whole vectors on x86 processors (AVX2 and later). torch
itself is not of one mind there: other processors, and for some pairs the last few elements of a tensor, get others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from rewire.errors import RuleError

if TYPE_CHECKING:
    import numpy as np

    Vector = np.ndarray[tuple[int], np.dtype[Any]]
    Buffer = memoryview | bytearray | bytes | Vector

SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
"""Bytes per element of the types that can be cast."""

_STORED = {"F16": "<u2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
_AT_ONCE = 32 * 1024
"""Elements per round: all that a round touches, up to 0.7 MB, stays in the second-level cache."""

# Bits of numbers as F32.
_INFINITY = 0x7F80_0000
_LEAST_NORMAL = 0x3880_0000  # 2**-14, the smallest normal F16
_INFINITE_HALF = 0x4780_0000  # 65536, infinite as F16


def why_not(casts: Sequence[str]) -> str | None:
    """Why values cannot be led through the types `casts` here; None if they can.

    >>> why_not(("F32", "F8_E4M3"))
    'a cast from F32 to F8_E4M3 needs torch; without it only F16, BF16, F32, F64 are cast'
    """
    for pair in pairwise(casts):
        if not set(pair) <= SIZES.keys():
            return f"a cast from {pair[0]} to {pair[1]} needs torch; without it only {', '.join(SIZES)} are cast"
    return None


def cast_bytes(data: Buffer, from_code: str, to_code: str, out: Buffer) -> None:
    """Writes the values in `data` to `out`, which has room for just as many; see `Caster`.

    >>> out = bytearray(4)
    >>> cast_bytes(bytes.fromhex("0000803f 00008fc2"), "F32", "BF16", out)  # 1.0 and -71.5
    >>> out.hex()
    '803f8fc2'
    """
    Caster((from_code, to_code))(data, out)


class Caster:
    """Leads values through the types `casts`, safetensors codes, the source's first.

    It keeps its working memory, so one caster should serve many calls, and one thread only. Raises `RuleError`
    for a type that is not cast here.
    """

    def __init__(self, casts: Sequence[str]) -> None:
        import numpy as np

        reason = why_not(casts)
        if reason or len(casts) < 2:
            raise RuleError(reason or f"{len(casts)} types make no cast")
        self.casts = tuple(casts)
        self._links = [_Link(*pair) for pair in pairwise(casts)]
        self._between = [np.empty(_AT_ONCE, _STORED[code]) for code in self.casts[1:-1]]

    def __call__(self, data: Buffer, out: Buffer) -> None:
        """Casts all values in `data`; `out` is writable and has room for just as many."""
        import numpy as np

        source = np.frombuffer(data, _STORED[self.casts[0]])
        target = np.frombuffer(out, _STORED[self.casts[-1]])
        if len(source) != len(target):
            raise ValueError(f"{len(source)} values do not fill a buffer of {len(target)}")
        with np.errstate(all="ignore"):  # overflow and NaN are what they are
            for start in range(0, len(source), _AT_ONCE):
                self._cast(source[start : start + _AT_ONCE], target[start : start + _AT_ONCE])

    def _cast(self, source: Vector, target: Vector) -> None:
        stages = [source, *(between[: len(source)] for between in self._between), target]
        for link, (before, after) in zip(self._links, pairwise(stages), strict=True):
            link(before, after)


class _Work(NamedTuple):
    """What narrowing needs beside its operands: two vectors to overwrite, a constant one, the NaN to write."""

    first: Vector
    second: Vector
    least: Vector
    nan: int


class _Link:
    """One cast: a widening to F32, a narrowing from it, or one after the other."""

    def __init__(self, before: str, after: str) -> None:
        import numpy as np

        self._widen = None if before == "F32" else _TO_F32[before]
        self._narrow = None if after == "F32" else _FROM_F32[after]
        # torch casts F16 to BF16 value by value, in code that writes another NaN.
        self._nan = 0x7FC0 if before == "F16" else 0xFFFF
        self._wide = np.empty(_AT_ONCE, np.float32)
        self._scratch = np.empty((2, _AT_ONCE), np.uint32)
        self._least = np.full(_AT_ONCE, _LEAST_NORMAL, np.uint32)  # numpy is slow at a maximum with one number

    def __call__(self, source: Vector, target: Vector) -> None:
        if self._widen:
            wide = self._wide[: len(source)] if self._narrow else target
            self._widen(source, wide)
            source = wide
        if self._narrow:
            count = len(source)
            work = _Work(self._scratch[0, :count], self._scratch[1, :count], self._least[:count], self._nan)
            self._narrow(source, target, work)


# ---------------------------------------------------------------- to F32: (source, target)


def _from_float64(source: Vector, target: Vector) -> None:
    import numpy as np

    np.copyto(target, source, casting="unsafe")


def _from_bfloat16(source: Vector, target: Vector) -> None:
    import numpy as np

    bits = target.view(np.uint32)
    np.copyto(bits, source)
    np.left_shift(bits, 16, out=bits)


def _from_float16(source: Vector, target: Vector) -> None:
    """The exponent and mantissa are moved into place; a product then corrects the exponent, subnormal or not."""
    import numpy as np

    bits = target.view(np.int32)
    np.copyto(bits, source.view(np.int16))  # bits 15 … 31 are now copies of the sign
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, -0x7000_2000, out=bits)  # sign, five bits of exponent, mantissa
    np.multiply(target, 2.0**112, out=target)
    exponent = np.bitwise_and(source, 0x7C00)
    if exponent.max() == 0x7C00:
        special = exponent == 0x7C00
        sign, mantissa = source[special] & np.uint32(0x8000), source[special] & np.uint32(0x03FF)
        quiet = np.where(mantissa > 0, np.uint32(0x0040_0000), np.uint32(0))
        target.view(np.uint32)[special] = sign << 16 | _INFINITY | mantissa << 13 | quiet


# ---------------------------------------------------------------- from F32: (source, target, work)


def _to_float64(source: Vector, target: Vector, work: _Work) -> None:
    import numpy as np

    np.copyto(target, source)


def _to_bfloat16(source: Vector, target: Vector, work: _Work) -> None:
    """Half of the last place kept, less one, is added, and one more if the last place is odd."""
    import numpy as np

    bits, rounded = source.view(np.uint32), work.first
    np.right_shift(bits, 16, out=rounded)
    np.bitwise_and(rounded, 1, out=rounded)
    np.add(rounded, bits, out=rounded)
    np.add(rounded, 0x7FFF, out=rounded)
    np.right_shift(rounded, 16, out=rounded)
    np.copyto(target, rounded, casting="unsafe")
    if np.isnan(source.max()):  # the quickest way to see that there is any
        target[np.isnan(source)] = work.nan


def _to_float16(source: Vector, target: Vector, work: _Work) -> None:
    """The processor rounds: a power of two is added that pushes all below the last place kept out of the mantissa.

    For a value of exponent e, at least that of the smallest normal F16, this is 2**(e + 13). What is left of the
    sum without that power is the mantissa in units of the last place, its leading one included.
    """
    import numpy as np

    bits, size, power = source.view(np.uint32), work.first, work.second
    np.bitwise_and(bits, 0x7FFF_FFFF, out=size)
    largest = size.max()
    if largest > _INFINITE_HALF:
        np.minimum(size, _INFINITE_HALF, out=size)
    np.bitwise_and(size, _INFINITY, out=power)
    np.maximum(power, work.least, out=power)
    np.add(power, 13 << 23, out=power)
    np.add(size.view(np.float32), power.view(np.float32), out=size.view(np.float32))
    np.subtract(size, power, out=size)
    np.right_shift(power, 13, out=power)
    np.add(size, power, out=size)
    np.subtract(size, 126 << 10, out=size)
    np.right_shift(bits, 16, out=power)
    np.bitwise_and(power, 0x8000, out=power)
    np.bitwise_or(size, power, out=size)
    np.copyto(target, size, casting="unsafe")
    if largest > _INFINITY:
        absent = bits[np.isnan(source)]
        target[np.isnan(source)] = absent >> 16 & 0x8000 | 0x7E00 | absent >> 13 & 0x01FF


_TO_F32: Mapping[str, Callable[[Vector, Vector], None]] = {
    "F16": _from_float16,
    "BF16": _from_bfloat16,
    "F64": _from_float64,
}

_FROM_F32: Mapping[str, Callable[[Vector, Vector, _Work], None]] = {
    "F16": _to_float16,
    "BF16": _to_bfloat16,
    "F64": _to_float64,
}
