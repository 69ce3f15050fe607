"""The element types of the safetensors format: their codes, their widths and what torch calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from rewire.errors import CheckpointError

# Code → (bits of an element, torch's name). F6 has no counterpart in torch. Torch counts two F4 elements as one
# `float4_e2m1fn_x2`, so the last dimension of such a tensor is half as long there as in the file.
_FACTS: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"),
    "F4": (4, "float4_e2m1fn_x2"),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
}
_CODES = {name: code for code, (_, name) in _FACTS.items() if name is not None}
_MOST = 2**64 - 1  # sizes are unsigned 64-bit numbers in the format's own library

DTYPES: Mapping[str, int] = MappingProxyType({code: bits for code, (bits, _) in _FACTS.items()})
"""Bits of one element, by the code that stands in a header."""


def torch_name(code: str) -> str | None:
    """What torch calls the element type; None if it has none.

    >>> torch_name("BF16"), torch_name("F6_E2M3")
    ('bfloat16', None)
    """
    return _FACTS[code][1]


def code_of(name: str) -> str:
    """The code of a torch element type. Raises `CheckpointError` if the format has none.

    >>> code_of("bfloat16"), code_of("torch.float8_e4m3fn")
    ('BF16', 'F8_E4M3')
    """
    plain = name.removeprefix("torch.")
    if plain not in _CODES:
        raise CheckpointError(f"safetensors has no element type for {name}; it has {', '.join(sorted(_CODES))}")
    return _CODES[plain]


def elements(shape: Sequence[int]) -> int:
    """How many elements a shape holds. Raises `OverflowError` once the count needs more than 64 bits.

    Multiplied from the front and given up at once, so a hostile shape of a million dimensions costs nothing.

    >>> elements((2, 3)), elements(()), elements((2, 0))
    (6, 1, 0)
    """
    count = 1
    for length in shape:
        count *= length
        if count > _MOST:
            raise OverflowError("more than 2**64 elements")
    return count


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor. Raises `OverflowError` beyond 64 bits and `ValueError` for a part of a byte.

    >>> tensor_bytes("BF16", (2, 3)), tensor_bytes("F4", (4,))
    (12, 2)
    """
    bits = elements(shape) * DTYPES[dtype]
    if bits > _MOST:
        raise OverflowError("more than 2**64 bits")
    if bits % 8:
        raise ValueError(f"{bits} bits are no whole number of bytes")
    return bits // 8
