"""Casts in plain bytes give what torch gives, bit for bit."""

from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewire.errors import RuleError
from rewire.stream.casting import SIZES, Caster, cast_bytes, why_not

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}
WHOLE = 4096  # elements that fill vectors wholly, however many threads share a tensor
PAIRS = list(permutations(SIZES, 2))


def in_torch(data: bytes, casts: tuple[str, ...]) -> bytes:
    tensor = torch.frombuffer(bytearray(data), dtype=TORCH[casts[0]])
    for code in casts[1:]:
        tensor = tensor.to(TORCH[code])
    return tensor.view(torch.uint8).numpy().tobytes()


def vectors_agree() -> bool:
    """Whether this machine's torch writes the NaN that the casts here do."""
    return torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}


def check(data: bytes, casts: tuple[str, ...]) -> None:
    """Compares with torch: all values bit for bit; NaN too where torch is of one mind about it."""
    size = SIZES[casts[-1]]
    out = bytearray(len(data) // SIZES[casts[0]] * size)
    Caster(casts)(data, out)
    found, wanted = np.frombuffer(out, BITS[size]), np.frombuffer(in_torch(data, casts), BITS[size])
    if vectors_agree() and len(found) % WHOLE == 0:
        assert np.array_equal(found, wanted)
        return
    absent = torch.frombuffer(bytearray(wanted.tobytes()), dtype=TORCH[casts[-1]]).isnan().numpy()
    assert np.array_equal(torch.frombuffer(bytearray(out), dtype=TORCH[casts[-1]]).isnan().numpy(), absent)
    assert np.array_equal(found[~absent], wanted[~absent])


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if SIZES[pair[0]] == 2])
def test_every_half_precision_number_is_cast_as_torch_casts_it(pair: tuple[str, str]) -> None:
    check(np.arange(1 << 16, dtype=np.uint16).tobytes(), pair)


def near(values: np.ndarray, bits: type[np.unsignedinteger]) -> np.ndarray:
    """Bit patterns, each with its neighbours: what rounds up, what rounds down, what is a tie."""
    patterns = values.view(bits)
    steps = np.array([0, 1, 2, -1, -2], np.int64).astype(bits)
    return (patterns[:, None] + steps).ravel()


def hard(code: str, count: int) -> bytes:
    """Numbers of a wide type: random bits, and those on, between and beside numbers of the narrow types."""
    rng = np.random.default_rng(0)
    wide, bits = (np.float32, np.uint32) if code == "F32" else (np.float64, np.uint64)
    halves = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(all="ignore"):
        on = np.concatenate(
            [halves.view(np.float16).astype(wide), (halves.astype(np.uint32) << 16).view("f4").astype(wide)]
        )
        between = np.concatenate([(one + np.roll(one, -1)) / wide(2) for one in np.split(on, 2)])
    anything = rng.integers(0, np.iinfo(bits).max, count, dtype=bits, endpoint=True)
    usual = (rng.standard_normal(count) * 10.0 ** rng.uniform(-10, 6, count)).astype(wide).view(bits)
    found = np.concatenate([near(on, bits), near(between, bits), anything, usual])
    return found[: len(found) // WHOLE * WHOLE].tobytes()


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if SIZES[pair[0]] > 2])
def test_numbers_that_are_hard_to_round_are_cast_as_torch_casts_them(pair: tuple[str, str]) -> None:
    check(hard(pair[0], 200_000), pair)


@pytest.mark.sweep
@pytest.mark.parametrize("code", ["F16", "BF16"])
def test_single_precision_numbers_of_every_size_are_cast_as_torch_casts_them(code: str) -> None:
    for high in range(0, 1 << 32, 1 << 28):  # every 61st bit pattern; once, all of them were compared
        check((np.arange(0, WHOLE * 1074 * 61, 61, dtype=np.uint32) + np.uint32(high)).tobytes(), ("F32", code))


@given(st.lists(st.sampled_from([*SIZES]), min_size=2, max_size=4), st.integers(1, 300), st.integers(0, 1 << 32))
def test_chains_of_any_length_are_cast_link_by_link(codes: list[str], count: int, seed: int) -> None:
    casts = tuple(code for code, following in pairwise([*codes, ""]) if code != following)
    if len(casts) < 2:
        return
    values = np.random.default_rng(seed).standard_normal(count) * 1000
    data = torch.from_numpy(values).to(TORCH[casts[0]])
    check(data.view(torch.uint8).numpy().tobytes(), casts)


def test_a_caster_serves_many_calls_of_any_size() -> None:
    caster = Caster(("F32", "F16", "F32"))
    for count in (0, 1, 32 * 1024 - 1, 32 * 1024, 100_000, 3):
        data = np.random.default_rng(count).standard_normal(count, dtype=np.float32)
        out = np.empty_like(data)
        caster(memoryview(data), memoryview(out).cast("B"))
        assert np.array_equal(out, data.astype(np.float16).astype(np.float32))


def test_buffers_of_the_wrong_size_are_refused_before_anything_is_written() -> None:
    out = bytearray(b"\xaa" * 6)
    with pytest.raises(ValueError, match="2 values do not fill a buffer of 3"):
        cast_bytes(bytes(8), "F32", "BF16", out)
    assert out == b"\xaa" * 6


def test_other_types_are_refused_with_the_reason() -> None:
    assert why_not(("F16", "F32", "BF16")) is None
    assert why_not(()) is None
    with pytest.raises(RuleError, match="a cast from F32 to F8_E4M3 needs torch"):
        Caster(("F16", "F32", "F8_E4M3"))
    with pytest.raises(RuleError, match="1 types make no cast"):
        Caster(("F16",))
