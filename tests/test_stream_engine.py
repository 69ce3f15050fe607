"""The copy engine writes what numpy says, whatever the copies look like and however the system behaves."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewire.checkpoint import DTYPES
from rewire.errors import CheckpointError, RuleError
from rewire.moves import Axis, Made, Move, compile_rule
from rewire.stream import boxes, compiled, direct, files, passes, ranges
from rewire.stream.engine import OUTPUT, Place, Range, Target, cost, verify, write
from rewire.stream.files import Buffer, Joiner, shift
from rewire.tensor_rules import (
    JoinRows,
    KeepRows,
    PermuteRows,
    Rename,
    Rule,
    SplitRows,
    Stack,
    Transpose,
    Unstack,
    run,
    visible,
)

Arrays = dict[str, np.ndarray[Any, Any]]
WIDTHS = {1: "U8", 2: "BF16", 4: "F32", 8: "I64"}


def random_array(shape: Sequence[int], width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    data = np.random.default_rng(seed).bytes(prod(shape) * width)
    return np.frombuffer(data, f"u{width}").reshape(shape)


@dataclass
class Files:
    """Two source files with tensors in them, and the output."""

    sources: list[int]
    out: int
    places: dict[str, Place]

    def write(self, targets: Sequence[Target], **options: Any) -> list[Range]:
        return write(targets, self.places, self.sources, self.out, **options)

    def verify(self, found: Sequence[Range]) -> list[Range]:
        return verify(found, self.sources, self.out)


@contextmanager
def laid_out(arrays: Mapping[str, np.ndarray[Any, Any]], gap: int = 8) -> Iterator[Files]:
    """The arrays in two files in turn, `gap` bytes before each."""
    with TemporaryDirectory() as folder, ExitStack() as opened:
        paths = [Path(folder, name) for name in ("a", "b", "out")]
        handles = [opened.enter_context(path.open("wb+")) for path in paths]
        places = {}
        for (name, array), number in zip(arrays.items(), itertools.cycle((0, 0, 1)), strict=False):
            handles[number].write(b"\xff" * gap)
            places[name] = Place(number, handles[number].tell(), WIDTHS[array.itemsize])
            handles[number].write(array.tobytes())
        for handle in handles:
            handle.flush()
        yield Files([handle.fileno() for handle in handles[:2]], handles[2].fileno(), places)


def placed(made: Mapping[str, Made], start: int = 16, gap: int = 0) -> list[Target]:
    targets = []
    for one in made.values():
        targets.append(Target(one, start))
        start += prod(one.shape) * DTYPES[one.dtype] // 8 + gap
    return targets


def check_rule(rule: Rule, arrays: Arrays, *, gap: int = 0, start: int = 16, **options: Any) -> list[Range]:
    """Carries a rule out on files, compares with numpy, and gives the ranges."""
    infos = {name: (WIDTHS[array.itemsize], array.shape) for name, array in arrays.items()}
    targets = placed(compile_rule(rule, infos), start, gap)
    expected = visible(run(rule, arrays, np))
    counts: list[int] = []
    with laid_out(arrays, gap or 8) as on_disk:
        found = on_disk.write(targets, advance=counts.append, **options)
        for target in targets:
            wanted = np.ascontiguousarray(expected[target.made.name]).tobytes()
            assert os.pread(on_disk.out, len(wanted), target.start) == wanted, target.made.name
        assert sum(counts) == sum(array.nbytes for array in expected.values())
        assert on_disk.verify(found) == []
    written = sum(one.bytes for one in found if one.file == OUTPUT)
    assert written == (sum(counts) if options.get("checksums", True) else 0)
    return found


@contextmanager
def shrunk(least: int = 48, block: int = 64, stage: int = 128) -> Iterator[None]:
    """Small tensors take the ways of large ones."""
    with ExitStack() as stack:
        for module, name, value in (
            (direct, "LEAST", least),
            (direct, "_FEW", 2),
            (direct, "BLOCK", block),
            (files, "BLOCK", block),
            (ranges, "BLOCK", block),
            (files, "GRAIN", block // 2),
            (boxes, "STAGE", stage),
            (direct, "LONGEST", 8 * block),
            (ranges, "LONGEST", 8 * block),
            (ranges, "_FEW", 10),
            (ranges, "_MOST_OPEN", 4),
        ):
            stack.enter_context(patch.object(module, name, value))
        yield


@pytest.fixture(params=["numpy", "compiled"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled part of the engine, where there is one, and without."""
    if request.param == "numpy":
        monkeypatch.setattr(compiled, "library_path", lambda: Path("no such library"))
    elif compiled.compiled() is None:
        pytest.skip("the compiled part is not installed")


# ---------------------------------------------------------------- what is written


def columns(parts: int, groups: int, width: int) -> tuple[str, Rule]:
    names = tuple(f"p{number}" for number in range(parts))
    return f"{parts} parts, {groups} groups", (SplitRows("w", names, (width // parts,) * parts, groups, 1),)


RULES: dict[str, tuple[tuple[int, ...], Rule]] = {
    "rename": ((64, 96), (Rename("w", "x"),)),
    "rows in order": ((96, 64), (SplitRows("w", ("q", "k", "v"), (32, 32, 32)),)),
    "heads": ((96, 64), (SplitRows("w", ("q", "k", "v"), (32, 32, 32), groups=4),)),
    "columns": ((64, 96), (SplitRows("w", ("q", "k", "v"), (32, 32, 32), dim=1),)),
    "uneven columns by groups": ((64, 96), (SplitRows("w", ("q", "k"), (64, 32), groups=4, dim=1),)),
    "alternating columns": ((64, 96), (SplitRows("w", ("g", "u"), (48, 48), groups=48, dim=1),)),
    "transpose": ((64, 96), (Transpose("w", "t"),)),
    "odd transpose": ((37, 101), (Transpose("w", "t"),)),
    "batched transpose": ((5, 64, 96), (Transpose("w", "t"),)),
    "alternating and transposed": (
        (64, 96),
        (SplitRows("w", ("g", "u"), (48, 48), groups=48, dim=1), Transpose("g", "a"), Transpose("u", "b")),
    ),
    "transposed and split": ((64, 96), (Transpose("w", "t"), SplitRows("t", ("q", "k", "v"), (32, 32, 32)))),
    "rotary rows": ((128, 48), (PermuteRows("w", "x", (4, 2, 16), (0, 2, 1)),)),
    "rotary columns": ((48, 128), (PermuteRows("w", "x", (4, 2, 16), (0, 2, 1), dim=1),)),
    "experts": ((6, 32, 48), (Unstack("w", tuple("abcdef")), Transpose("c", "x"))),
    "some rows": ((200, 24), (KeepRows("w", "x", (*range(5, 50, 3), 7, 199, *range(90, 60, -1)), 200),)),
    "some columns": ((24, 200), (KeepRows("w", "x", tuple(range(0, 200, 7)), 200, dim=1),)),
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", RULES)
def test_rules_give_what_numpy_gives(name: str, width: int) -> None:
    shape, rule = RULES[name]
    arrays = {"w": random_array(shape, width), "other": random_array((7,), width, 1)}
    check_rule(rule, arrays)
    with shrunk():
        check_rule(rule, arrays, memory=4096)
        check_rule(rule, arrays, memory=512, checksums=False)


JOINS: dict[str, Rule] = {
    "rows": (JoinRows("w", ("a", "b", "c"), (32, 32, 32)),),
    "rows by groups": (JoinRows("w", ("a", "b", "c"), (32, 32, 32), groups=4),),
    "columns": (JoinRows("w", ("a", "b", "c"), (40, 40, 40), dim=1),),
    "alternating columns": (JoinRows("w", ("a", "b", "c"), (40, 40, 40), groups=40, dim=1),),
    "columns, transposed": (JoinRows("w", ("a", "b", "c"), (40, 40, 40), dim=1), Transpose("w", "t")),
    "rows, transposed": (JoinRows("w", ("a", "b", "c"), (32, 32, 32)), Transpose("w", "t")),
    "stack": (Stack("w", ("a", "b", "c")), Transpose("w", "t")),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", JOINS)
def test_joins_give_what_numpy_gives(name: str, width: int) -> None:
    arrays = {part: random_array((32, 40), width, number) for number, part in enumerate("abc")}
    check_rule(JOINS[name], arrays)
    with shrunk():
        check_rule(JOINS[name], arrays, memory=2048)


@pytest.mark.parametrize("start", [1, 7, 4095])
def test_nothing_needs_to_be_aligned(start: int) -> None:
    for name in ("rename", "transpose", "alternating columns"):
        shape, rule = RULES[name]
        check_rule(rule, {"w": random_array(shape, 4)}, start=start, gap=start)


@st.composite
def cut_and_turned(draw: st.DrawFn) -> tuple[Made, tuple[int, ...], int]:
    """A tensor whose axes are those of its source in any order, some parts of it only, in any number of moves."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    order = draw(st.permutations(range(len(shape))))
    width = draw(st.sampled_from([*WIDTHS]))
    cut = draw(st.integers(0, len(order) - 1))
    rows = shape[order[cut]]
    bounds = sorted({0, rows, *draw(st.lists(st.integers(0, rows), max_size=3))})
    turned = tuple(shape[axis] for axis in order)
    moves = [_part(shape, order, cut, *bound) for bound in itertools.pairwise(bounds)]
    return Made("x", turned, WIDTHS[width], tuple(draw(st.permutations(moves)))), tuple(shape), width


def _part(shape: Sequence[int], order: Sequence[int], cut: int, low: int, high: int) -> Move:
    sources = [prod(shape[axis + 1 :]) for axis in order]
    turned = [shape[axis] for axis in order]
    targets = [prod(turned[at + 1 :]) for at in range(len(turned))]
    counts = [high - low if at == cut else count for at, count in enumerate(turned)]
    axes = zip(counts, sources, targets, strict=True)
    kept = tuple(Axis(*axis) for axis in axes if axis[0] > 1)
    return Move("w", low * sources[cut], low * targets[cut], kept)


@given(cut_and_turned(), st.integers(64, 2048), st.integers(1, 70))
@settings(max_examples=150)
def test_any_loops_are_carried_out(case: tuple[Made, tuple[int, ...], int], memory: int, gap: int) -> None:
    made, shape, width = case
    array = random_array(shape, width)
    axes = {move.axes for move in made.moves}
    assert axes
    with shrunk(least=16), laid_out({"w": array}, gap) as on_disk:
        found = on_disk.write([Target(made, gap)], memory=memory)
        expected = np.zeros(prod(shape), array.dtype)
        for move in made.moves:
            _carry_out(move, array.ravel(), expected)
        assert os.pread(on_disk.out, array.nbytes, gap) == expected.tobytes()
        assert on_disk.verify(found) == []


def _carry_out(move: Move, source: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> None:
    for steps in itertools.product(*(range(axis.count) for axis in move.axes)):
        at = sum(step * axis.target for step, axis in zip(steps, move.axes, strict=True))
        taken = sum(step * axis.source for step, axis in zip(steps, move.axes, strict=True))
        target[move.target_start + at] = source[move.source_start + taken]


@st.composite
def rules(draw: st.DrawFn) -> tuple[Rule, Arrays]:
    """Random steps one after the other on two matrices."""
    width = draw(st.sampled_from([*WIDTHS]))
    rows, cols = draw(st.integers(1, 4)) * 4, draw(st.integers(1, 4)) * 4
    arrays = {name: random_array((rows, cols), width, seed) for seed, name in enumerate("ab")}
    steps: list[Any] = []
    if draw(st.booleans()):
        dim = draw(st.integers(0, 1))
        size = (rows, cols)[dim]
        groups = draw(st.sampled_from([one for one in (1, 2, 4, size) if size % one == 0]))
        steps.append(JoinRows("w", ("a", "b"), (size, size), groups, dim))
    else:
        steps.append(Stack("w", ("a", "b")))
        steps.append(Transpose("w", "w"))
        steps += [Unstack("w", ("w", "z"))]
    for _ in range(draw(st.integers(0, 4))):
        steps.append(draw(st.sampled_from([Transpose("w", "w"), None])) or _reordered(draw, steps, arrays))
    return tuple(steps), arrays


def _reordered(draw: st.DrawFn, steps: Sequence[Any], arrays: Arrays) -> PermuteRows | KeepRows:
    shape = run(steps, arrays, np)["w"].shape
    dim = draw(st.integers(0, 1))
    if draw(st.booleans()):
        kept = draw(st.permutations(range(shape[dim])))[: draw(st.integers(1, shape[dim]))]
        return KeepRows("w", "w", tuple(kept), shape[dim], dim)
    outer = draw(st.sampled_from([one for one in range(1, shape[dim] + 1) if shape[dim] % one == 0]))
    return PermuteRows("w", "w", (outer, shape[dim] // outer), (1, 0), dim)


@given(rules(), st.integers(64, 4096))
@settings(max_examples=150)
def test_random_rules_give_what_numpy_gives(case: tuple[Rule, Arrays], memory: int) -> None:
    rule, arrays = case
    with shrunk(least=16):
        check_rule(rule, arrays, memory=memory)


def test_scalars_and_empty_tensors() -> None:
    arrays = {"s": random_array((), 4), "e": random_array((0, 4), 4), "x": random_array((3,), 4)}
    check_rule((Rename("s", "t"), Rename("e", "f")), arrays)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(31, 33), (32, 64), (100, 1), (3, 65, 130)])
def test_transposes_of_any_size(shape: tuple[int, ...]) -> None:
    check_rule((Transpose("w", "t"),), {"w": random_array(shape, 2)})


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", [(700, 300), (3, 211, 170), (1000, 129)])
def test_tall_matrices_are_transposed_in_two_passes(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], width: int
) -> None:
    """The first pass deals columns out to panels; no record or count of it is left."""
    monkeypatch.setattr(passes, "_GAIN", 1e9)  # whether it takes less time or not
    turned = counted(monkeypatch, "preadv", bytes_read)
    array = random_array(shape, width)
    memory = 200 * shape[-2]  # lines of three, less one, of a column of rows
    check_rule((Transpose("w", "t"),), {"w": array}, memory=memory, checksums=False)
    assert sum(turned) == 2 * array.nbytes
    check_rule((Transpose("w", "t"),), {"w": array}, memory=memory)


@pytest.mark.usefixtures("way")
def test_large_tensors_in_parts() -> None:
    """Larger than every buffer, through each of the ways."""
    check_rule((Transpose("w", "t"),), {"w": random_array((1500, 2100), 2)}, memory=1 << 20)
    check_rule((SplitRows("w", ("a", "b"), (1050, 1050), 1050, 1),), {"w": random_array((1500, 2100), 2)})
    check_rule((Rename("w", "x"),), {"w": random_array((1500, 2100), 2)}, checksums=False)


def test_elements_of_less_than_a_byte() -> None:
    packed = random_array((4, 6), 1)  # 4 rows of 12 elements of 4 bits
    rows = Made("x", (2, 12), "F4", (Move("w", 12, 0, (Axis(2, 24, 12), Axis(12, 1, 1))),))
    with laid_out({"w": packed}) as on_disk:
        on_disk.places["w"] = replace(on_disk.places["w"], dtype="F4")
        on_disk.write([Target(rows, 0)])
        assert os.pread(on_disk.out, 12, 0) == packed[1::2].tobytes()
        odd = Made("x", (3,), "F4", (Move("w", 1, 0, (Axis(3, 1, 1),)),))
        with pytest.raises(RuleError, match="x takes parts of bytes out of w"):
            on_disk.write([Target(odd, 0)])


def test_types_that_differ_need_a_cast() -> None:
    made = Made("x", (4,), "F32", (Move("w", 0, 0, (Axis(4, 1, 1),)),))
    with laid_out({"w": random_array((4,), 2)}) as on_disk, pytest.raises(RuleError, match=r"F32.*BF16"):
        on_disk.write([Target(made, 0)])


CASTS = {
    ("F32", "BF16"): 0.02,
    ("F32", "F16"): 0.002,
    ("F32", "F64"): 0.0,
    ("F64", "F32"): 1e-6,
    ("F32", "F64", "F32"): 0.0,
}
"""How far values may be off."""


@pytest.mark.parametrize("casts", CASTS, ids=" ".join)
@pytest.mark.parametrize("name", ["rename", "columns", "alternating columns", "transpose", "rotary columns"])
def test_values_are_cast_on_the_way(name: str, casts: tuple[str, ...]) -> None:
    shape, rule = RULES[name]
    types = {"F32": "f4", "F64": "f8", "F16": "f2"}
    array = np.random.default_rng(0).standard_normal(shape).astype(types[casts[0]])
    plain = compile_rule(rule, {"w": (casts[0], shape)})
    targets = placed({key: replace(made, dtype=casts[-1], casts=casts) for key, made in plain.items()})
    expected = run(rule, {"w": array}, np)
    with shrunk(), laid_out({"w": array}) as on_disk:
        on_disk.places["w"] = replace(on_disk.places["w"], dtype=casts[0])
        found = on_disk.write(targets, memory=4096)
        for target in targets:
            size = prod(target.made.shape) * DTYPES[casts[-1]] // 8
            data = os.pread(on_disk.out, size, target.start)
            if casts[-1] == "BF16":
                values = (np.frombuffer(data, "u2").astype("u4") << 16).view("f4")
            else:
                values = np.frombuffer(data, types[casts[-1]])
            assert np.allclose(
                values.reshape(target.made.shape), expected[target.made.name], CASTS[casts], CASTS[casts]
            )
        assert on_disk.verify(found) == []


def test_a_cast_that_needs_torch_is_refused() -> None:
    made = Made("x", (8,), "F8_E4M3", (Move("w", 0, 0, (Axis(8, 1, 1),)),), ("F32", "F8_E4M3"))
    with laid_out({"w": random_array((8,), 4)}) as on_disk, pytest.raises(RuleError, match="F32 to F8_E4M3"):
        on_disk.write([Target(made, 0)])


# ---------------------------------------------------------------- how much is read, called and recorded


def counted(monkeypatch: pytest.MonkeyPatch, name: str, size: Callable[..., int]) -> list[int]:
    calls: list[int] = []
    real = getattr(os, name)

    def call(*arguments: Any) -> int:
        calls.append(size(*arguments))
        return int(real(*arguments))

    monkeypatch.setattr(os, name, call)
    return calls


def bytes_read(file: int, views: Sequence[memoryview], start: int) -> int:
    return sum(map(len, views))


def test_a_split_in_order_is_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    array = random_array((384, 1024), 4)
    rule = (SplitRows("w", ("q", "k", "v"), (128, 128, 128)), Rename("n", "m"))
    writes = counted(monkeypatch, "pwrite", lambda file, data, start: len(data))
    found = check_rule(rule, {"w": array, "n": random_array((64,), 4)}, start=0, gap=0)
    first = next(one for one in found if one.file == OUTPUT)
    assert (first.start, first.bytes) == (0, array.nbytes)
    assert len(writes) == -(-array.nbytes // files.BLOCK) + 1
    assert max(writes) <= files.BLOCK


@pytest.mark.parametrize(("dim", "groups"), [(1, 1), (1, 64), (1, 3072)])
def test_parts_of_the_same_rows_read_them_once(monkeypatch: pytest.MonkeyPatch, dim: int, groups: int) -> None:
    array = random_array((256, 9216), 2)
    rule = (SplitRows("w", ("q", "k", "v"), (3072, 3072, 3072), groups, dim),)
    reads = counted(monkeypatch, "preadv", bytes_read)
    found = check_rule(rule, {"w": array}, checksums=False)
    assert found == []
    assert sum(reads) == array.nbytes
    assert len(reads) < 32


def test_many_scattered_rows_make_few_records() -> None:
    rows = tuple(np.random.default_rng(0).permutation(4000).tolist())
    found = check_rule((KeepRows("w", "x", rows, 4000),), {"w": random_array((4000, 16), 2)})
    assert len(found) < 20


def test_records_are_few_and_cover_what_was_read() -> None:
    array = random_array((1024, 1536), 2)
    for rule in ((Transpose("w", "t"),), (SplitRows("w", ("a", "b", "c"), (512, 512, 512), 8, 1),)):
        found = check_rule(rule, {"w": array}, memory=1 << 20)
        assert sum(one.bytes for one in found if one.file == 0) == array.nbytes
        assert len(found) < 20


def test_cost_counts_ranges_and_bytes() -> None:
    infos = {"w": ("BF16", (12, 8))}
    made = compile_rule((SplitRows("w", ("a", "b"), (8, 4), groups=2),), infos)
    found = cost(Target(made["b"], 0), {"w": Place(0, 0, "BF16")})
    assert (found.ranges, found.bytes) == (2, 4 * 8 * 2)
    cast = replace(made["b"], dtype="F32", casts=("BF16", "F32"))
    assert cost(Target(cast, 0), {"w": Place(0, 0, "BF16")}) == found


# ---------------------------------------------------------------- systems that misbehave


@pytest.fixture
def miserly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads and writes do less than they are asked for, as is their right."""
    preadv, pwrite, in_kernel = os.preadv, os.pwrite, os.copy_file_range

    def short_read(file: int, views: Sequence[memoryview], start: int) -> int:
        return preadv(file, [views[0][: len(views[0]) // 2 + 1]], start)

    def short_write(file: int, data: memoryview, start: int) -> int:
        return pwrite(file, data[: len(data) // 3 + 1], start)

    def short_copy(source: int, out: int, count: int, start: int, target: int) -> int:
        return in_kernel(source, out, count // 3 + 1, start, target)

    monkeypatch.setattr(os, "preadv", short_read)
    monkeypatch.setattr(os, "pwrite", short_write)
    monkeypatch.setattr(os, "copy_file_range", short_copy)


@pytest.mark.usefixtures("miserly", "way")
@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_short_reads_and_writes(name: str, checksums: bool) -> None:
    shape, rule = RULES[name]
    check_rule(rule, {"w": random_array(shape, 2)}, checksums=checksums)
    check_rule((Rename("w", "x"),), {"w": random_array((1 << 19,), 2)}, checksums=checksums, start=8)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_file_systems_that_cannot_copy_by_themselves(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    calls: list[int] = []

    def refuse(*arguments: int) -> int:
        calls.append(1)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    arrays = {name: random_array((1 << 20,), 1) for name in ("a", "b")}
    check_rule((Rename("a", "x"),), arrays, checksums=False, start=8)
    assert calls == [1]  # then it is not asked again


def test_systems_without_copying_in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "copy_file_range")
    check_rule((Rename("a", "x"),), {"a": random_array((1 << 20,), 1)}, checksums=False, start=8)


@pytest.mark.parametrize("name", ["rename", "transpose", "columns"])
def test_a_full_disk_is_reported_as_it_is(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shape, rule = RULES[name]
    array = random_array(shape, 4)
    targets = placed(compile_rule(rule, {"w": ("F32", shape)}))
    with laid_out({"w": array}) as on_disk:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left") as caught:
            on_disk.write(targets)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_a_source_that_ends_early_is_named(name: str, checksums: bool) -> None:
    shape, rule = RULES[name]
    array = random_array(shape, 4)
    targets = placed(compile_rule(rule, {"w": ("F32", shape)}))
    with laid_out({"w": array}) as on_disk:
        os.ftruncate(on_disk.sources[0], 1000)
        with pytest.raises(CheckpointError, match=r"/a ends at byte"):
            on_disk.write(targets, checksums=checksums)


def test_a_source_cut_short_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    array = random_array((1 << 20,), 4)
    with laid_out({"w": array}) as on_disk:
        written: list[int] = []

        def cut(count: int) -> None:
            written.append(count)
            os.ftruncate(on_disk.sources[0], 1 << 20)

        targets = placed(compile_rule((), {"w": ("F32", array.shape)}))
        with pytest.raises(CheckpointError, match=r"/a ends at byte 1,048,576"):
            on_disk.write(targets, advance=cut)
    assert 0 < sum(written) < array.nbytes


# ---------------------------------------------------------------- checksums


@pytest.mark.parametrize("name", RULES)
def test_a_flipped_byte_is_found_wherever_it_is(name: str) -> None:
    shape, rule = RULES[name]
    array = random_array(shape, 2)
    targets = placed(compile_rule(rule, {"w": ("BF16", shape)}))
    with laid_out({"w": array}) as on_disk:
        found = on_disk.write(targets, memory=4096)
        size = os.fstat(on_disk.out).st_size
        for at in (16, size // 2, size - 1):
            with flipped(on_disk.out, at):
                wrong = on_disk.verify(found)
                assert {one.file for one in wrong} == {OUTPUT}
        with flipped(on_disk.sources[0], on_disk.places["w"].start + targets[0].made.moves[0].source_start * 2):
            assert {one.file for one in on_disk.verify(found)} == {0}
        assert on_disk.verify(found) == []
        os.ftruncate(on_disk.out, size - 1)
        assert on_disk.verify(found)


@contextmanager
def flipped(file: int, at: int) -> Iterator[None]:
    before = os.pread(file, 1, at)
    os.pwrite(file, bytes([before[0] ^ 1]), at)
    try:
        yield
    finally:
        os.pwrite(file, before, at)


@given(st.integers(-1, 9), st.integers(0, 99), st.integers(0, 99), st.integers(0, 2**64 - 1), st.integers(1, 9))
def test_ranges_go_into_a_journal_and_come_back(file: int, start: int, size: int, found: int, count: int) -> None:
    one = Range(file, start, start + size, found, count, 200 if count > 1 else 0)
    assert Range.from_list(one.to_list()) == one


# ---------------------------------------------------------------- parts


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 300)), max_size=20), st.integers(0, 200))
def test_joined_writes_leave_out_and_double_nothing(parts: list[tuple[int, int]], start: int) -> None:
    """Pieces of any length that mostly follow each other, with gaps now and then."""
    with TemporaryDirectory() as folder, Path(folder, "out").open("wb+") as file, shrunk(block=128):
        joiner, expected, at = Joiner(file.fileno()), bytearray(), start
        for number, (gap, size) in enumerate(parts):
            at += gap if gap > 1 else 0
            data = bytes([number + 1]) * size
            joiner.write(memoryview(data), at)
            expected = expected.ljust(at, b"\0") + data
            at += size
        joiner.flush()
        assert os.pread(file.fileno(), 10_000, 0) == bytes(expected)


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_buffers_are_put_where_copying_is_fast(source: int, target: int) -> None:
    at = shift(source, target)
    assert (at - source) % 4096 not in range(1, 64)
    assert (target - at) % 4096 not in range(1, 64)


def test_a_buffer_begins_with_a_page() -> None:
    assert np.frombuffer(Buffer(100).memory, np.uint8).ctypes.data % 4096 == 0


def test_calls_side_by_side_do_not_disturb_each_other() -> None:
    shape = (512, 768)
    names = ["transpose", "columns", "rename"]
    arrays = {name: random_array(shape, 2, seed) for seed, name in enumerate(names)}
    failures: list[BaseException] = []

    def work(name: str) -> None:
        rules = {
            "transpose": (Transpose("w", "t"),),
            "columns": (SplitRows("w", ("a", "b"), (384, 384), dim=1),),
            "rename": (Rename("w", "x"),),
        }
        try:
            check_rule(rules[name], {"w": arrays[name]}, memory=1 << 18)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in names * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


MEMORY_PROBE = """
import os, sys, tempfile
from pathlib import Path
from rewire.moves import compile_rule
from rewire.stream.engine import Place, Target, write
from rewire.tensor_rules import Rename, SplitRows, Transpose

rows, columns, kind = int(sys.argv[1]), 3072, sys.argv[2]
rule = {
    "direct": (Rename("w", "x"),),
    "columns": (SplitRows("w", ("a", "b"), (1536, 1536), 1, 1),),
    "transpose": (Transpose("w", "t"),),
}[kind]
size = rows * columns * 2
with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as out:
    os.truncate(source.fileno(), size)
    targets, start = [], 0
    for made in compile_rule(rule, {"w": ("BF16", (rows, columns))}).values():
        targets.append(Target(made, start))
        start += size // 2
    write(targets, {"w": Place(0, 0, "BF16")}, [source.fileno()], out.fileno())
# Unlike `ru_maxrss` this leaves out what the process was before it became Python.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024, "numpy" in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kind", "most"), [("direct", 40e6), ("columns", 64e6), ("transpose", 64e6)])
def test_memory_does_not_grow_with_the_tensor(kind: str, most: float) -> None:
    def peak(rows: int) -> tuple[int, bool]:
        command = [sys.executable, "-c", MEMORY_PROBE, str(rows), kind]
        size, numpy = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return int(size), numpy == "True"

    small, large = peak(8192), peak(24576)
    assert large[0] < min(most, small[0] + 4e6)
    assert large[1] == (kind != "direct")
