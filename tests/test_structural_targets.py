"""`@attention` and `@mlp` mean what detection finds, so that one plan serves many models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rewire
from rewire.errors import NoMatchError
from rewire.plan import Freeze, Join, Lora, Plan, Split, Unfreeze
from tiny import ids, output, same, snapshot, tiny

EVERY_FUSED = Plan([Split("@attention", optional=True), Split("@mlp", optional=True)])


@pytest.mark.parametrize(
    ("model_type", "values", "places"),
    [
        ("phi3", {}, 4),
        ("gpt_neox", {}, 2),
        ("gpt2", {}, 2),
        ("bloom", {}, 2),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, 2),
        ("codegen", {}, 2),
        ("llama", {}, 0),
    ],
)
def test_split_of_everything_fused(model_type: str, values: dict[str, Any], places: int) -> None:
    model = tiny(model_type, **values)
    before, tensors = output(model, input_ids=ids()), snapshot(model)
    receipt = rewire.apply_(model, EVERY_FUSED)
    assert receipt.count("changed") == places
    torch.testing.assert_close(output(model, input_ids=ids()), before, rtol=1e-4, atol=1e-5)
    if places:
        rewire.revert_(model)
    assert same(snapshot(model), tensors)


def test_a_narrowed_target() -> None:
    model = tiny("phi3")
    receipt = rewire.apply_(model, Split("@attention(layers.1.**)"))
    assert [decision.path for decision in receipt.decisions] == ["layers.1.self_attn.qkv_proj"]


def test_join_takes_the_parents_that_have_the_parts() -> None:
    model = tiny("llama")
    assert rewire.apply_(model, Join("@attention", parts=("q_proj", "k_proj", "v_proj"))).count("changed") == 2
    assert rewire.apply_(model, Join("@mlp", parts=("gate_proj", "up_proj"))).count("changed") == 2


def test_freezing_all_but_the_attentions() -> None:
    model = tiny("bert")
    rewire.apply_(model, Plan([Freeze("**"), Unfreeze("@attention")]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".attention." in name for name in trained)


def test_an_adapter_on_the_parts_of_every_attention() -> None:
    model = tiny("gpt_neox")
    receipt = rewire.apply_(model, Plan([Split("@attention", into=("q", "k", "v")), Lora(("q", "v"), r=2)]))
    assert receipt.after.trainable == 2 * 2 * 2 * (32 + 32)


def test_nothing_found_is_an_error() -> None:
    with pytest.raises(NoMatchError, match="@attention"):
        rewire.apply_(tiny("llama"), Split("@attention"))


@pytest.mark.parametrize(
    ("model_type", "target", "where"),
    [
        ("phi3", "@mlp", ".mlp."),
        ("phi3", "@attention", ".self_attn."),
        ("llama", "@mlp", ".mlp."),
        ("llama", "@attention", ".self_attn."),
    ],
)
def test_freezing_one_kind(model_type: str, target: str, where: str) -> None:
    model = tiny(model_type)
    rewire.apply_(model, Freeze(target))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert all(where in name for name in frozen)
    assert not any(where in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_a_kind_that_the_model_does_not_have() -> None:
    for target in ("@mlp", "@experts"):
        with pytest.raises(NoMatchError):
            rewire.apply_(tiny("gpt2"), Freeze(target))
    with pytest.raises(NoMatchError):
        rewire.apply_(tiny("llama"), Join("@mlp", parts=("q_proj", "k_proj")))
