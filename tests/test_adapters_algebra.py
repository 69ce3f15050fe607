"""Carrying factors is exact: whatever a rule does to a weight, it does to `scaling * B @ A`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rewire.adapters.advance import advance
from rewire.adapters.folding import Folded, fold, settle, unfold, with_origins
from rewire.adapters.lowrank import LowRank, Shift, Term, join
from rewire.adapters.scaling import Scaling, common
from rewire.errors import RefusedError, RuleError
from rewire.tensor_rules import (
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
    invert,
    run,
    visible,
)


def dense(change: LowRank) -> Tensor:
    """The whole change. Small whole numbers make the products exact, so that results can be compared by their bits."""
    total = torch.zeros(change.shape, dtype=torch.float64)
    for term in change.terms:
        flat = term.columns.reshape(*term.columns.shape[: change.batch + 1], -1)
        total += (term.rows @ flat).reshape(change.shape) * term.scaling.value
    return total


def whole(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matrix(rows: int, columns: int, rank: int, seed: int = 0, *, alpha: int = 8, batch: int = 0) -> LowRank:
    stack = (batch,) if batch else ()
    term = Term(whole(seed, *stack, rows, rank), whole(seed + 1, *stack, rank, columns), Scaling(alpha, rank))
    return LowRank((*stack, rows, columns), (term,), len(stack), len(stack))


def check(rule: Rule, held: dict[str, LowRank], shapes: dict[str, tuple[int, ...]]) -> dict[str, LowRank]:
    """The rule on the factors gives what the rule on the tensors gives, and its inverse the factors."""
    tensors = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    tensors |= {name: dense(change) for name, change in held.items()}
    expected = visible(run(rule, tensors, torch))
    after = changes(advance(rule, held))
    for name, tensor in expected.items():
        assert torch.equal(dense(after[name]) if name in after else torch.zeros_like(tensor), tensor), name
    return after


def changes(held: Any) -> dict[str, LowRank]:
    return {name: one for name, one in held.items() if isinstance(one, LowRank)}


SPLIT = SplitRows("w", ("q", "k", "v"), (8, 4, 4), groups=2)
JOIN = JoinRows("w", ("q", "k", "v"), (8, 4, 4), groups=4)
PARTS = {"q": (8, 5), "k": (4, 5), "v": (4, 5)}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_split_rows_of_every_layout(groups: int, transposed: bool) -> None:
    steps: Rule = (replace(SPLIT, groups=groups),)
    change = matrix(16, 5, 2)
    if transposed:
        change = changes(advance((Transpose("w", "w"),), {"w": change}))["w"]
        steps = (Transpose("w", "w"), *steps)
    after = check(steps, {"w": change}, {})
    assert {one.rank for one in after.values()} == {2}
    assert torch.equal(after["q"].terms[0].columns, after["v"].terms[0].columns)


def test_split_and_join_give_the_same_term_back() -> None:
    change = matrix(16, 5, 2)
    back = changes(advance((SPLIT, *invert((SPLIT,))), {"w": change}))["w"]
    assert len(back.terms) == 1
    assert torch.equal(back.terms[0].rows, change.terms[0].rows)
    assert torch.equal(back.terms[0].columns, change.terms[0].columns)


@pytest.mark.parametrize("present", ["q", "kv", "qkv"])
def test_join_with_parts_missing(present: str) -> None:
    held = {
        name: matrix(*PARTS[name], rank, rank) for name, rank in zip("qkv", (1, 2, 4), strict=True) if name in present
    }
    after = check((JOIN,), held, PARTS)
    assert after["w"].rank == sum(one.rank for one in held.values())


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_join_and_split_of_stacks(dim: int) -> None:
    shape = [4, 6, 8]
    halves = {"a": list(shape), "b": list(shape)}
    for half in halves.values():
        half[dim] //= 2
    held = {name: matrix(half[1], half[2], 2, seed, batch=half[0]) for seed, (name, half) in enumerate(halves.items())}
    rule = (JoinRows("w", ("a", "b"), (shape[dim] // 2,) * 2, dim=dim),)
    after = check(rule, held, {})
    check(invert(rule), after, {})


def test_experts_are_unstacked_and_stacked() -> None:
    rule = (
        Transpose("moe", "moe"),
        SplitRows("moe", ("gate", "up"), (6, 6), groups=6, dim=1),
        Unstack("gate", ("0.gate", "1.gate")),
        Unstack("up", ("0.up", "1.up")),
    )
    change = matrix(5, 12, 2, batch=2)
    after = check(rule, {"moe": change}, {})
    assert {one.shape for one in after.values()} == {(6, 5)}
    back = changes(advance(invert(rule), after))["moe"]
    assert len(back.terms) == 1
    assert torch.equal(back.terms[0].rows, change.terms[0].rows)


def test_stack_of_experts_with_other_ranks_or_none() -> None:
    held = {"0": matrix(6, 5, 2), "2": matrix(6, 5, 2, 5), "3": matrix(6, 5, 4, 9)}
    after = check((Stack("w", ("0", "1", "2", "3")),), held, {"1": (6, 5)})
    assert after["w"].rank == 2 + 4


def test_rows_and_columns_are_permuted_and_kept() -> None:
    rule = (
        PermuteRows("w", "w", (2, 2, 4), (0, 2, 1)),
        PermuteRows("w", "w", (2, 3), (1, 0), dim=1),
        KeepRows("w", "w", (3, 0, 7), 16),
        KeepRows("w", "w", (5, 1), 6, dim=1),
        Rename("w", "x"),
        Cast("x", "x", "float16", "float32"),
    )
    kept = [step for step in rule if not isinstance(step, Cast)]
    check(tuple(kept), {"w": matrix(16, 6, 2)}, {})
    assert changes(advance(rule, {"w": matrix(16, 6, 2)}))["x"].terms[0].rows.dtype == torch.float64


def test_kernels_of_convolutions() -> None:
    change = LowRank((8, 3, 5), (Term(whole(0, 8, 2), whole(1, 2, 3, 5), Scaling(4, 2)),))
    check((Transpose("w", "w"), SplitRows("w", ("a", "b"), (6, 2), groups=2)), {"w": change}, {})


@st.composite
def rules(draw: st.DrawFn) -> tuple[Rule, dict[str, LowRank], dict[str, tuple[int, ...]]]:
    """Matrices joined along either dimension, then turned, permuted and split another way."""
    dim = draw(st.integers(0, 1))
    sizes = draw(st.lists(st.sampled_from([2, 4]), min_size=2, max_size=4))
    other = draw(st.sampled_from([2, 4]))
    names = tuple(f"p{number}" for number in range(len(sizes)))
    shapes = {name: (size, other) if dim == 0 else (other, size) for name, size in zip(names, sizes, strict=True)}
    present = draw(st.sets(st.sampled_from(names), min_size=1))
    held = {
        name: matrix(
            *shapes[name], draw(st.sampled_from([1, 2])), draw(st.integers(0, 3)), alpha=draw(st.integers(1, 4))
        )
        for name in names
        if name in present
    }
    steps: list[Any] = [JoinRows("w", names, tuple(sizes), draw(st.sampled_from([1, 2])), dim)]
    if draw(st.booleans()):
        steps.append(Transpose("w", "w"))
        dim = 1 - dim
    total = sum(sizes)
    if draw(st.booleans()):
        steps.append(PermuteRows("w", "w", (2, total // 2), (1, 0), dim))
    cut = draw(st.integers(1, total // 2 - 1)) * 2 if total > 2 else 1
    steps.append(SplitRows("w", ("a", "b"), (cut, total - cut), draw(st.sampled_from([1, 2])), dim))
    return tuple(steps), held, shapes


@given(rules())
def test_any_rule_on_the_factors_is_the_rule_on_the_weight(case: tuple[Rule, Any, Any]) -> None:
    rule, held, shapes = case
    after = check(rule, held, shapes)
    folded = {name: fold(change) for name, change in after.items()}
    for name, one in folded.items():
        torch.testing.assert_close(dense(one.change), dense(after[name]), rtol=1e-14, atol=1e-14)
        if not one.rounded:
            assert torch.equal(dense(one.change), dense(after[name]))


@given(rules())
def test_the_way_back_gives_every_bit(case: tuple[Rule, Any, Any]) -> None:
    rule, held, _ = case
    folded = {name: fold(one) for name, one in changes(advance(rule, with_origins(held))).items()}
    back = returned(rule, folded)
    assert set(back) == set(held)
    for name, change in held.items():
        (mine,), (theirs,) = change.terms, back[name].terms
        assert torch.equal(mine.rows, theirs.rows)
        assert torch.equal(mine.columns, theirs.columns)
        assert mine.scaling == theirs.scaling


def returned(rule: Rule, folded: dict[str, Folded]) -> dict[str, LowRank]:
    unfolded = {name: unfold(one.change, one.blocks) for name, one in folded.items()}
    moved = changes(advance(invert(rule), unfolded))
    return {name: one for name, change in moved.items() if (one := settle(name, change)) is not None}


def test_folding_keeps_what_it_rounds() -> None:
    q, k = matrix(4, 5, 2, alpha=6), matrix(4, 5, 2, 7, alpha=2)
    q = replace(q, terms=(replace(q.terms[0], rows=torch.rand(4, 2, dtype=torch.float32)),))
    k = replace(k, terms=(replace(k.terms[0], rows=torch.rand(4, 2, dtype=torch.float32)),))
    joined = join(JoinRows("w", ("q", "k"), (4, 4)), with_origins({"q": q, "k": k}))
    folded = fold(joined)
    assert folded.rounded
    assert [block.factor for block in folded.blocks] == [1.0, 1 / 3]
    parts = returned((JoinRows("w", ("q", "k"), (4, 4)),), {"w": folded})
    assert torch.equal(parts["k"].terms[0].rows, k.terms[0].rows)


def test_a_block_trained_since_comes_back_with_its_values() -> None:
    held = with_origins({"q": matrix(4, 5, 2), "k": matrix(4, 5, 2, 7)})
    rule: Rule = (JoinRows("w", ("q", "k"), (4, 4)),)
    folded = fold(changes(advance(rule, held))["w"])
    (term,) = folded.change.terms
    trained = replace(folded, change=replace(folded.change, terms=(replace(term, rows=term.rows + 1),)))
    back = returned(rule, {"w": trained})
    assert {one.rank for one in back.values()} == {4}
    together = torch.cat([dense(back["q"]), dense(back["k"])])
    assert torch.equal(together, dense(trained.change))


def test_biases_and_magnitudes_follow_the_outputs() -> None:
    change = replace(matrix(16, 5, 2), magnitude=whole(3, 16), shift=Shift(whole(4, 16), Scaling(8, 2)))
    vectors = run((SPLIT,), {"w": whole(3, 16)}, torch)
    parts = changes(advance((SPLIT,), {"w": change}))
    for name, part in parts.items():
        assert part.magnitude is not None
        assert torch.equal(part.magnitude, vectors[name])
    back = changes(advance(invert((SPLIT,)), parts))["w"]
    assert back.magnitude is not None
    assert back.shift is not None
    assert torch.equal(back.magnitude, whole(3, 16))
    assert torch.equal(back.shift.values, whole(4, 16))
    turned = changes(advance((Transpose("w", "w"),), {"w": change}))["w"]
    assert turned.outputs == 1
    assert turned.side == "columns"


def test_shifts_of_other_scalings_are_joined() -> None:
    q = replace(matrix(4, 5, 2, alpha=8), shift=Shift(whole(1, 4), Scaling(8, 2)))
    k = replace(matrix(4, 5, 2, alpha=2), shift=Shift(whole(2, 4), Scaling(2, 2)))
    joined = fold(join(JoinRows("w", ("q", "k", "v"), (4, 4, 2)), {"q": q, "k": k})).change
    assert joined.shift is not None
    given_out = joined.shift.values * joined.terms[0].scaling.value
    assert torch.equal(given_out, torch.cat([whole(1, 4) * 4, whole(2, 4), torch.zeros(2, dtype=torch.float64)]))


REFUSED = {
    "columns of a layer with a bias": (
        SplitRows("w", ("a", "b"), (2, 3), dim=1), replace(matrix(4, 5, 2), shift=Shift(whole(1, 4), Scaling(8, 2))),
        "lora_bias",
    ),
    "columns of a layer with magnitudes": (
        SplitRows("w", ("a", "b"), (2, 3), dim=1), replace(matrix(4, 5, 2), magnitude=whole(1, 4)), "magnitude",
    ),
    "a matrix in vectors": (Unstack("w", ("a", "b")), matrix(2, 5, 1), "matrices only"),
    "a dropped tensor": (Drop("w"), matrix(4, 5, 2), "drops a tensor"),
    "rows that were dropped": (KeepRows("x", "w", (0, 1), 4).inverse(), None, "brings rows back"),
    "magnitudes of a part are missing": (
        JoinRows("x", ("w", "v"), (4, 4)), replace(matrix(4, 5, 2), magnitude=whole(1, 4)), "magnitude.*none for v",
    ),
    "a part that was trained as a whole": (Stack("x", ("w", "v")), torch.zeros(4, 5), "nothing of v"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_step_and_the_reason(name: str) -> None:
    step, held, message = REFUSED[name]
    source = step.inputs[0]
    with pytest.raises(RefusedError, match=f"(?s){step.kind} of {source}.*{message}.*Nothing was written"):
        advance((step,), {source: matrix(2, 5, 1) if held is None else held})


def test_a_layer_and_a_transposed_one_are_not_joined() -> None:
    turned = replace(matrix(4, 5, 2), outputs=1)
    with pytest.raises(RuleError, match="along different dimensions"):
        join(JoinRows("w", ("q", "k"), (4, 4)), {"q": matrix(4, 5, 2), "k": turned})


def test_a_low_rank_and_a_whole_tensor_are_not_joined() -> None:
    with pytest.raises(RefusedError, match="trained as a whole and one changed by low rank"):
        advance((JoinRows("w", ("q", "k"), (4, 4)),), {"q": matrix(4, 5, 2), "k": torch.zeros(4, 5)})


@given(st.integers(1, 512), st.integers(1, 64), st.integers(1, 256), st.booleans())
def test_a_scaling_at_another_rank_has_the_same_value(alpha: int, rank: int, other: int, root: bool) -> None:
    scaling = Scaling(alpha, rank, root)
    new = scaling.at(other)
    assert new.value == pytest.approx(scaling.value, rel=4e-16)
    if not root and other % rank == 0:
        assert new.value == scaling.value


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([1, 2, 4, 8])), min_size=1), st.booleans())
def test_the_common_scaling_is_one_of_them(pairs: list[tuple[int, int]], root: bool) -> None:
    scalings = [Scaling(alpha, rank, root) for alpha, rank in pairs]
    target = common(scalings)
    assert target in scalings
    if target.alpha:
        for one in scalings:
            assert target.value * one.over(target).value == pytest.approx(one.value)
