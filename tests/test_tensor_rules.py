"""Every step has an exact inverse, in torch and numpy alike, and its shapes are what it really gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewire.errors import RuleError
from rewire.tensor_rules import (
    STEPS,
    Cast,
    Drop,
    JoinRows,
    KeepRows,
    PermuteRows,
    Rename,
    Rule,
    SplitRows,
    Stack,
    Transpose,
    Unstack,
    components,
    from_record,
    invert,
    kept,
    run,
    run_shapes,
    to_record,
    visible,
)

sizes = st.integers(1, 5)


def numbered(*shape: int) -> np.ndarray[Any, Any]:
    """An array whose elements are all different."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def check(rule: Rule, tensors: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Runs a rule there and back with both libraries; returns the result."""
    there = run(rule, tensors, np)
    back = run(invert(rule), there, np)
    assert visible(back).keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)
    in_torch = run(rule, {name: torch.from_numpy(array) for name, array in tensors.items()}, torch)
    assert in_torch.keys() == there.keys()
    assert all(np.array_equal(in_torch[name].numpy(), there[name]) for name in there)
    again = run(invert(rule), in_torch, torch)
    assert all(np.array_equal(again[name].numpy(), tensors[name]) for name in tensors)
    shapes = run_shapes(rule, {name: array.shape for name, array in tensors.items()})
    assert shapes == {name: array.shape for name, array in visible(there).items()}
    assert tuple(map(from_record, map(to_record, rule))) == rule
    return there


@st.composite
def row_layouts(draw: st.DrawFn) -> tuple[SplitRows, tuple[int, ...]]:
    groups, dim = draw(sizes), draw(st.integers(0, 2))
    per_group = draw(st.lists(sizes, min_size=1, max_size=4))
    shape = [draw(sizes) for _ in range(draw(st.integers(dim + 1, 3)))]
    shape[dim] = groups * sum(per_group)
    names = tuple(f"p{n}" for n in range(len(per_group)))
    return SplitRows("w", names, tuple(groups * n for n in per_group), groups, dim), tuple(shape)


@given(row_layouts())
def test_split_and_join_are_inverse_for_any_layout(case: tuple[SplitRows, tuple[int, ...]]) -> None:
    step, shape = case
    parts = check((step,), {"w": numbered(*shape)})
    check((step.inverse(),), {name: parts[name] for name in step.parts})


@given(row_layouts())
def test_split_takes_the_rows_that_the_layout_says(case: tuple[SplitRows, tuple[int, ...]]) -> None:
    step, shape = case
    whole = numbered(*shape)
    parts = run((step,), {"w": whole}, np)
    rows = [[] for _ in step.parts]  # type: ignore[var-annotated]
    row = 0
    for _ in range(step.groups):
        for part, count in enumerate(step.group_sizes):
            rows[part] += range(row, row + count)
            row += count
    for name, wanted in zip(step.parts, rows, strict=True):
        assert np.array_equal(parts[name], whole.take(wanted, axis=step.dim))


@given(sizes, sizes, sizes)
def test_stack_and_unstack(count: int, rows: int, columns: int) -> None:
    names = tuple(f"e{n}" for n in range(count))
    whole = check((Stack("w", names),), {name: numbered(rows, columns) + n for n, name in enumerate(names)})["w"]
    assert whole.shape == (count, rows, columns)
    check((Unstack("w", names),), {"w": whole})


@given(st.permutations([0, 1, 2]), st.tuples(sizes, sizes, sizes), sizes, st.integers(0, 1))
def test_permute(order: list[int], grid: tuple[int, ...], other: int, dim: int) -> None:
    rows = int(np.prod(grid))
    shape = (rows, other) if dim == 0 else (other, rows)
    after = check((PermuteRows("w", "x", grid, tuple(order), dim),), {"w": numbered(*shape)})["x"]
    index = np.arange(rows).reshape(grid).transpose(order).ravel()
    assert np.array_equal(after, numbered(*shape).take(index, axis=dim))


def test_permute_turns_rotary_rows() -> None:
    after = run((PermuteRows("w", "w", (1, 2, 3), (0, 2, 1)),), {"w": numbered(6)}, np)["w"]
    assert after.tolist() == [0, 3, 1, 4, 2, 5]


@given(st.data(), st.integers(1, 8), st.integers(0, 1))
def test_keep_rows(data: st.DataObject, total: int, dim: int) -> None:
    rows = data.draw(st.lists(st.integers(0, total - 1), unique=True, min_size=1))
    shape = (total, 3) if dim == 0 else (3, total)
    check((KeepRows("w", "x", tuple(rows), total, dim),), {"w": numbered(*shape)})


@given(sizes, sizes, sizes)
def test_transpose_turns_the_last_two_dimensions(count: int, rows: int, columns: int) -> None:
    check((Transpose("w", "x"),), {"w": numbered(count, rows, columns)})


def test_a_chain_of_steps_is_undone_in_reverse() -> None:
    rule = (
        Transpose("c.weight", "c.weight"),
        SplitRows("c.weight", ("q", "k"), (4, 2)),
        Rename("q", "query"),
        Stack("both", ("k", "extra")),
        Drop("unused"),
    )
    check(rule, {"c.weight": numbered(3, 6), "extra": numbered(2, 3), "unused": numbered(2)})


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_a_narrowing_cast_comes_back_bit_for_bit(values: list[float]) -> None:
    rule = (Cast("w", "w", "bfloat16", "float32"),)
    before = torch.tensor(values, dtype=torch.float32)
    after = run(rule, {"w": before}, torch)
    assert after["w"].dtype == torch.bfloat16
    assert torch.equal(run(invert(rule), after, torch)["w"], before)


def test_a_value_changed_since_the_cast_stays_changed() -> None:
    rule = (Cast("w", "w", "bfloat16", "float32"),)
    after = run(rule, {"w": torch.tensor([1.0001, 2.0001])}, torch)
    after["w"][1] = 5
    assert run(invert(rule), after, torch)["w"].tolist() == [torch.tensor(1.0001).item(), 5.0]


def test_a_widening_cast_needs_nothing_put_aside() -> None:
    rule = (Cast("w", "w", "float32", "bfloat16"),)
    before = torch.tensor([1.5, -2.25], dtype=torch.bfloat16)
    after = run(rule, {"w": before}, torch)
    assert list(after) == ["w"]
    assert torch.equal(run(invert(rule), after, torch)["w"], before)


@pytest.mark.parametrize(
    ("rule", "tensors", "message"),
    [
        ((Rename("a", "b"),), {}, "no tensor named a"),
        ((Rename("a", "b"),), {"a": 1, "b": 2}, "b exists already"),
        ((SplitRows("w", ("q", "k"), (2, 2)),), {"w": numbered(5, 1)}, r"no dimension 0 of 2 \+ 2 = 4 rows"),
        ((SplitRows("w", ("q", "k"), (2, 2), dim=1),), {"w": numbered(4)}, "no dimension 1"),
        ((JoinRows("w", ("q", "k"), (1, 1)),), {"q": numbered(1, 2), "k": numbered(1, 3)}, "k has shape"),
        ((Stack("w", ("q", "k")),), {"q": numbered(1), "k": numbered(2)}, "shapes differ"),
        ((Unstack("w", ("q", "k")),), {"w": numbered(3, 1)}, "does not hold 2 slices"),
        ((Transpose("w", "w"),), {"w": numbered(3)}, "at least two dimensions"),
        ((PermuteRows("w", "w", (2, 2), (1, 0)),), {"w": numbered(5)}, "of 4 rows"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_the_tensor(rule: Rule, tensors: Any, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        run(rule, tensors, np)


def test_uneven_groups_are_refused_when_the_step_is_made() -> None:
    with pytest.raises(RuleError, match="do not divide by 2 groups"):
        SplitRows("w", ("q", "k"), (4, 3), groups=2)


def test_what_was_not_kept_cannot_come_back() -> None:
    after = visible(run((Drop("a"),), {"a": numbered(1)}, np))
    with pytest.raises(RuleError, match="no tensor named kept:a"):
        run((Drop("a").inverse(),), after, np)


def test_components_run_on_their_own() -> None:
    rule = (
        SplitRows("a", ("b", "c"), (1, 1)),
        Rename("x", "y"),
        JoinRows("d", ("b", "y"), (1, 1)),
        Rename("m", "n"),
    )
    parts = {part.sources: part for part in components(rule)}
    assert set(parts) == {("a", "x"), ("m",)}
    assert set(parts["a", "x"].targets) == {"c", "d"}
    result = run(parts["a", "x"].steps, {"a": numbered(2), "x": numbered(1)}, np)
    assert result["d"].tolist() == [0.0, 0.0]


def test_records_reject_what_is_no_step() -> None:
    for record in ({}, {"step": "nonsense"}, {"step": "rename", "source": "a"}, {"step": "drop", "path": "x"}):
        with pytest.raises(RuleError, match="not a step"):
            from_record(record)


def test_every_step_is_registered_and_documented() -> None:
    assert all(step.__doc__ and kind == step.kind for kind, step in STEPS.items())
    assert kept("a") not in visible({kept("a"): 1, "a": 2})
