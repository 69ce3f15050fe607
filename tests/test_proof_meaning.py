"""A split whose parts are not what they are called: no output shows it, and the proof catches it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import rewire
from rewire.modules import SplitProjection
from rewire.tensor_rules import SplitRows, invert, run
from tiny import ids, output, same, snapshot, tiny


def split_by_hand(model: nn.Module, path: str, parts: tuple[str, ...], sizes: tuple[int, ...], groups: int) -> Any:
    """Splits every place of the pattern `path` without asking what its rows are; returns the rule."""
    rule = []
    for layer in (0, 1):
        place = path.replace("*", str(layer))
        fused = model.get_submodule(place)
        bias = fused.bias is not None
        new = SplitProjection(fused.in_features, parts, sizes, groups, bias)
        for tensor in ("weight", "bias") if bias else ("weight",):
            step = SplitRows(f"{place}.{tensor}", tuple(f"{place}.{p}.{tensor}" for p in parts), sizes, groups)
            rule.append(step)
            for name, value in run((step,), {step.whole: getattr(fused, tensor).data}, torch).items():
                new.get_parameter(name.removeprefix(f"{place}.")).data = value.contiguous()
        parent, _, leaf = place.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return tuple(rule)


@pytest.mark.parametrize(
    ("model_type", "path", "parts", "sizes", "groups", "right"),
    [
        ("gpt_neox", "layers.*.attention.query_key_value", ("q", "k", "v"), (32, 32, 32), 4, True),
        ("gpt_neox", "layers.*.attention.query_key_value", ("q", "k", "v"), (32, 32, 32), 1, False),
        ("gpt_neox", "layers.*.attention.query_key_value", ("k", "q", "v"), (32, 32, 32), 4, False),
        ("phi3", "layers.*.self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj"), (32, 16, 16), 1, True),
        ("phi3", "layers.*.self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj"), (32, 16, 16), 2, False),
        ("phi3", "layers.*.mlp.gate_up_proj", ("gate_proj", "up_proj"), (64, 64), 1, True),
        ("phi3", "layers.*.mlp.gate_up_proj", ("up_proj", "gate_proj"), (64, 64), 1, False),
    ],
)
def test_names_of_parts(
    model_type: str, path: str, parts: tuple[str, ...], sizes: tuple[int, ...], groups: int, right: bool
) -> None:
    before = tiny(model_type)
    after = copy.deepcopy(before)
    rule = split_by_hand(after, path, parts, sizes, groups)

    # Nothing else can tell: the same outputs, and it even saves back byte for byte.
    torch.testing.assert_close(output(after, input_ids=ids()), output(before, input_ids=ids()), rtol=1e-5, atol=1e-5)
    assert same(snapshot(before), {name: run(invert(rule), snapshot(after), torch)[name] for name in snapshot(before)})

    proof = rewire.prove(before, after, rules=rule)
    assert proof.passed is right
    failed = [check.name for check in proof.checks if not check.passed]
    assert failed == ([] if right else ["names of parts"])


def test_names_that_say_nothing_are_not_judged() -> None:
    before = tiny("phi3")
    after = copy.deepcopy(before)
    rule = split_by_hand(after, "layers.*.self_attn.qkv_proj", ("a", "b"), (32, 32), 1)
    proof = rewire.prove(before, after, rules=rule)
    assert proof.passed
    assert not any(check.name == "names of parts" for check in proof.checks)
