"""Every operation of Transformers' loader, told in steps, does to tensors what the operation itself does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import core_model_loading as loader
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter

from rewire.errors import CheckpointError
from rewire.hf_conversions.operations import OPERATIONS, Trace, Values, first_of
from rewire.hf_conversions.order import Part, in_order
from rewire.tensor_rules import Rename, SplitRows, invert, run

CONFIG = SimpleNamespace(
    num_attention_heads=2,
    vision_config=SimpleNamespace(num_attention_heads=4),
    get_text_config=lambda: SimpleNamespace(shards=3),
)
ROTARY = {"permute_layer_names": ["q", "k"]}
QKV = ["q", "k", "v"]
LISTS = ["e.*.g", "e.*.u"]


def shaped(*shape: int) -> tuple[int, ...]:
    return shape


#: Operation, patterns it reads with the shapes found for each, patterns it makes.
CASES: list[tuple[Any, dict[str, list[tuple[int, ...]]], list[str]]] = [
    (loader.Chunk(0), {"qkv": [shaped(12, 3)]}, QKV),
    (loader.Chunk(1), {"qkv": [shaped(2, 10)]}, QKV),
    (loader.Chunk(-1), {"qkv": [shaped(2, 12)]}, QKV),
    (loader.Chunk(0, num_shards_attribute="shards"), {"w": [shaped(7, 2)]}, ["shard_*"]),
    (loader.Chunk(0), {"w": [shaped(4, 2)]}, ["only"]),
    (loader.Split(0), {"qkv": [shaped(8, 3)]}, QKV),
    (loader.Concatenate(0), {"q": [shaped(4, 3)], "k": [shaped(2, 3)], "v": [shaped(2, 3)]}, ["qkv"]),
    (loader.Concatenate(1), {"shard_*": [shaped(2, 3), shaped(2, 3), shaped(2, 1)]}, ["w"]),
    (loader.Interleave(1), {"w": [shaped(3, 8)]}, ["v"]),
    (loader.Interleave(0, inverse=True), {"w": [shaped(8, 3)]}, ["v"]),
    (loader.MergeModulelist(0), {"e.*.w": [shaped(2, 3)] * 5}, ["e.w"]),
    (loader.MergeModulelist(0), {name: [shaped(2, 3)] * 2 for name in LISTS}, ["e.gu"]),
    (loader.SplitModulelist(0), {"e.w": [shaped(3, 2, 5)]}, ["e.*.w"]),
    (loader.SplitModulelist(0), {name: [shaped(3, 2, 5)] for name in LISTS}, ["e.gu"]),
    (loader.Transpose(0, 1), {"w": [shaped(2, 5)]}, ["v"]),
    (loader.Transpose(1, 2), {"w": [shaped(4, 2, 5)]}, ["v"]),
    (loader.Transpose(1, 2, check_dims=True), {"w": [shaped(4, 2, 5)]}, ["v"]),
    (loader.PermuteForRope(), {"w": [shaped(8, 3)]}, ["v"]),
    (loader.PermuteForRope(inverse=True), {"w": [shaped(8)]}, ["v"]),
    (loader.PermuteForRope(subconfig_key="vision_config", **ROTARY), {n: [shaped(8, 3)] for n in QKV}, ["qkv"]),
    (loader.VisionFuseAndPermuteForRope(**ROTARY), {n: [shaped(8, 3)] for n in QKV}, ["qkv"]),
    (loader.VisionUnfuseAndPermuteForRope(**ROTARY), {"qkv": [shaped(24, 3)]}, QKV),
    (loader.ErnieFuseAndSplitTextVisionExperts(), {name: [shaped(2, 3)] * 6 for name in LISTS}, ["text", "vision"]),
    (loader.ErnieSplitAndDecoupleTextVisionExperts(), {name: [shaped(4, 6, 3)] for name in ("text", "vision")}, LISTS),
    (loader.Conv3dToLinear(1, (1, 2, 2)), {"w": [shaped(3, 4)]}, ["v"]),
]  # fmt: skip


class Model:
    """What operations ask of a model."""

    config = CONFIG

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty({"q": (4, 3), "k": (2, 3), "v": (2, 3)}[name])


@pytest.mark.parametrize(("op", "shapes", "targets"), CASES, ids=lambda value: type(value).__name__)
def test_steps_do_what_the_operation_does(
    op: Any, shapes: dict[str, list[tuple[int, ...]]], targets: list[str]
) -> None:
    names = {pattern: [f"{pattern}:{n}" for n in range(len(found))] for pattern, found in shapes.items()}
    tensors = {
        name: torch.randn(shape) for p, found in shapes.items() for name, shape in zip(names[p], found, strict=True)
    }
    converter = SimpleNamespace(source_patterns=list(shapes), target_patterns=targets)
    model: Any = Model()
    trace = Trace(targets[0], model, converter, {n: tuple(t.shape) for n, t in tensors.items()})  # type: ignore[arg-type]
    values: Values = dict(names)
    made = {target: first_of(value) for target, value in trace.run(op, values).items()}
    part = trace.finished(made)
    found = run(part.steps, tensors, torch)
    wanted = op.convert(
        {pattern: [tensors[name] for name in listed] for pattern, listed in names.items()},
        source_patterns=list(shapes), target_patterns=targets, full_layer_name=targets[0], model=model, config=CONFIG,
    )  # fmt: skip
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor[0] if isinstance(tensor, list) else tensor), name
    assert run(invert(part.steps), found, torch).keys() == tensors.keys()


def test_every_operation_that_is_registered_is_known() -> None:
    used = {
        type(op).__name__
        for entries in _build_checkpoint_conversion_mapping().values()
        for entry in entries
        if isinstance(entry, WeightConverter)
        for one in (entry, entry.reverse_transform())
        for op in one.operations
    }
    assert used <= set(OPERATIONS)
    assert {type(op).__name__ for op, _, _ in CASES} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("op", "shape", "said"),
    [
        (loader.LinearToConv3d(1, (1, 2, 2)), (3, 4), "is read with LinearToConv3d, which cannot be told"),
        (loader.Conv3dToLinear(1, (1, 2, 2)), (3, 1, 1, 2, 2), "flattens a kernel"),
        (loader.Transpose(0, 1), (2, 3, 4), "swaps dimensions 0 and 1 of 3"),
        (loader.SplitModulelist(1), (2, 3, 4), "along dimension 1, not the first"),
    ],
)
def test_what_no_step_can_do_is_refused(op: Any, shape: tuple[int, ...], said: str) -> None:
    converter = SimpleNamespace(source_patterns=["w"], target_patterns=["v.*"])
    trace = Trace("v", Model(), converter, {"w:0": shape})  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=said):
        trace.run(op, {"w": ["w:0"]})


def test_a_stranger_of_a_known_name_is_not_trusted() -> None:
    class Chunk(loader.Chunk):
        """Does something else."""

    converter = SimpleNamespace(source_patterns=["w"], target_patterns=["v"])
    trace = Trace("v", Model(), converter, {"w:0": (2, 2)})  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="is read with Chunk"):
        trace.run(Chunk(0), {"w": ["w:0"]})


@given(st.permutations(range(8)), st.integers(0, 8))
def test_any_exchange_of_names_is_carried_out(order: list[int], moved: int) -> None:
    pairs = [(str(old), str(new) if old < moved else f"new{new}") for old, new in enumerate(order)]
    pairs = [(old, new) for old, new in pairs if old != new]
    kept = {str(n) for n in range(8)} - {old for old, _ in pairs}
    if kept & {new for _, new in pairs}:
        return  # two tensors of one name
    rule = in_order([Part([Rename(old, new)]) for old, new in pairs])
    assert run(rule, {str(n): n for n in range(8)}, torch) == {
        **{name: int(name) for name in kept}, **{new: int(old) for old, new in pairs}
    }  # fmt: skip


def test_a_name_is_freed_before_it_is_given_anew() -> None:
    chain = in_order([Part([SplitRows("w", ("w", "v"), (1, 1))]), Part([Rename("v", "u")])])
    assert [step.kind for step in chain] == ["rename", "split"]
