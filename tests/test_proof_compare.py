"""Nested outputs, relative differences, tolerances."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from rewire.errors import ProofError
from rewire.proof import cases_for
from rewire.proof.cases import as_cases
from rewire.proof.compare import at_positions, compare_outputs, flatten, largest, relative_difference
from rewire.proof.execution import forward
from rewire.proof.tolerances import Tolerances, check_promise, coarsest_dtype
from test_proof_models import build


def test_caches_are_flattened_by_layer() -> None:
    names = set(forward(build("llama"), cases_for(build("llama"))[0]))
    assert {"logits", "hidden_states[0]", "past_key_values.0.key", "past_key_values.1.value"} <= names


def test_caches_of_encoder_decoders_are_flattened() -> None:
    names = set(forward(build("bart"), cases_for(build("bart"))[0]))
    assert "past_key_values.self_attention_cache.0.key" in names
    assert "past_key_values.cross_attention_cache.1.value" in names


def test_state_caches_are_flattened() -> None:
    names = forward(build("mamba"), cases_for(build("mamba"))[0])
    assert [name for name in names if name.startswith(("past_key_values", "cache_params"))]


def test_dataclasses_and_plain_objects_are_entered() -> None:
    @dataclass
    class Inner:
        first: torch.Tensor
        note: str

    assert sorted(flatten([Inner(torch.zeros(1), "x"), {"b": torch.zeros(1)}, None, 3])) == ["[0].first", "[1].b"]


def test_a_circle_of_objects_ends() -> None:
    class Node:
        def __init__(self) -> None:
            self.me = self
            self.tensor = torch.zeros(1)

    assert "tensor" in flatten(Node())


def test_differences_are_relative_to_the_largest_value() -> None:
    tiny = torch.tensor([1e-19, 2e-19])
    assert relative_difference(tiny, tiny * 1.5) == pytest.approx(0.5)


def test_equal_infinities_and_nan_agree() -> None:
    special = torch.tensor([math.inf, -math.inf, math.nan, 2.0])
    assert relative_difference(special, special.clone()) == 0
    assert relative_difference(special, torch.tensor([math.inf, -math.inf, math.nan, 3.0])) == 0.5
    assert relative_difference(special, torch.tensor([0.0, -math.inf, math.nan, 2.0])) == math.inf
    assert relative_difference(special, torch.tensor([math.inf, -math.inf, 0.0, 2.0])) == math.inf


def test_fillers_do_not_set_the_scale() -> None:
    filled = torch.tensor([torch.finfo(torch.float32).min, 1.0, 4.0])
    assert largest(filled) == 4
    assert relative_difference(filled, torch.tensor([torch.finfo(torch.float32).min, 1.0, 5.0])) == 0.25


def test_shapes_and_whole_numbers_must_agree() -> None:
    assert relative_difference(torch.zeros(2), torch.zeros(3)) == math.inf
    assert relative_difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf
    assert relative_difference(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0
    assert relative_difference(torch.zeros(0), torch.zeros(0)) == 0


def test_another_data_type_is_compared_by_value() -> None:
    values = torch.tensor([1.0, 1.01])
    assert 0 < relative_difference(values, values.to(torch.bfloat16)) < 0.01


def test_zero_on_one_side_only_is_infinitely_far() -> None:
    assert relative_difference(torch.zeros(2), torch.full((2,), 1e-30)) == math.inf


def test_padded_positions_are_apart() -> None:
    mask = torch.tensor([[True, True, False]])
    before = torch.ones(1, 3, 4)
    after = before.clone()
    after[:, 2] = 2
    (found,) = compare_outputs({"h": before}, {"h": after}, mask)
    assert (found.real, found.padded, found.bit_equal) == (0, 1, False)


def test_positions_of_caches_are_the_third_dimension() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    key = torch.arange(2 * 2 * 2 * 5.0).reshape(2, 2, 2, 5)
    real = at_positions("past_key_values.0.key", key, mask, real=True)
    assert real is not None
    assert real.shape == (3, 2, 5)
    assert torch.equal(real[0], key[0, :, 0])


def test_outputs_without_positions_are_real() -> None:
    mask = torch.tensor([[True, False]])
    (found,) = compare_outputs({"pooled": torch.ones(1, 7)}, {"pooled": torch.zeros(1, 7)}, mask)
    assert (found.real, found.padded) == (1, None)


def test_tensors_of_one_side_only_are_reported() -> None:
    found = {one.name: one.real for one in compare_outputs({"a": torch.ones(1)}, {"b": torch.ones(1)})}
    assert found == {"a": math.inf, "b": math.inf}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_exact_is_tighter_than_rounding(dtype: torch.dtype) -> None:
    exact, rounding, additive = (Tolerances(promise, dtype).outputs for promise in ("exact", "rounding", "additive"))
    assert exact < rounding
    assert additive == rounding
    assert exact < Tolerances("exact", dtype).gradients < math.inf


def test_lossy_is_not_judged_unless_told() -> None:
    assert Tolerances("lossy", torch.float32).outputs == math.inf
    assert Tolerances("lossy", torch.float32, {torch.float32: 0.2}).outputs == 0.2


def test_promises_are_a_closed_set() -> None:
    with pytest.raises(ProofError, match="exact, rounding, lossy, additive"):
        check_promise("approximately")


def test_the_coarsest_type_rules() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half())
    assert coarsest_dtype([model]) == torch.float16
    assert coarsest_dtype([nn.ReLU()]) == torch.float32


def test_inputs_of_a_caller_become_cases() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    first, second = as_cases([{"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}])
    assert first.mask is None
    assert second.is_padded
    with pytest.raises(ProofError, match="empty"):
        as_cases([])
    with pytest.raises(ProofError, match=r"inputs\[0\] is a Tensor"):
        as_cases([ids])  # type: ignore[list-item]


def test_rows_pooled_from_padding_count_as_padded() -> None:
    mask = torch.tensor([[True, True], [False, True]])
    before, after = torch.ones(2, 5), torch.ones(2, 5)
    after[1] = 3
    (found,) = compare_outputs({"pooler_output": before}, {"pooler_output": after}, mask)
    assert (found.real, found.padded) == (0, 2)
