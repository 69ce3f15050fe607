"""Small checkpoints for the tests of `rewire.convert`, and what their results should be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewire import tensor_rules
from rewire.plan import Plan

INDEX = "model.safetensors.index.json"

SPLIT = {
    "step": "split",
    "whole": "h.{0}.qkv.weight",
    "parts": ["h.{0}.q.weight", "h.{0}.kv.weight"],
    "sizes": [12, 4],
    "groups": 2,
    "each": ["0..3"],
}
"""A step on every layer of `model_tensors`."""


def plan_of(*steps: Mapping[str, Any], **resolved: Any) -> Plan:
    """A plan that is nothing but tensor steps."""
    return Plan.from_dict({"rewire": 1, "edits": [], "resolved": {"steps": list(steps), **resolved}})


def model_tensors(layers: int = 4, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Tensors of several types: fused weights, a table, a vector, a scalar, an empty one."""
    random = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    found = {f"h.{layer}.qkv.weight": some(16, 6).to(dtype) for layer in range(layers)}
    found |= {f"h.{layer}.norm.weight": some(6) for layer in range(layers)}
    return found | {"table": some(10, 6).to(dtype), "scalar": some(), "empty": some(0, 6), "steps": torch.arange(5)}


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A model folder with a tokenizer, as Transformers writes one."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [list(tensors)[number::shards] for number in range(shards)]
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
        weight_map = {name: file for file, group in zip(files, names, strict=True) for name in group}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    for file, group in zip(files, names, strict=True):
        save_file({name: tensors[name].contiguous() for name in group}, folder / file, metadata or {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "heads": 4, **(config or {})}, indent=2))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "generation_config.json").write_text("{}")
    return folder


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by the real library; its index must agree with its files."""
    files = sorted(folder.glob("*.safetensors"))
    found = {file.name: load_file(file) for file in files}
    if (folder / INDEX).exists():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        assert weight_map == {name: file for file, tensors in found.items() for name in tensors}
    else:
        assert [file.name for file in files] == ["model.safetensors"]
    return {name: tensor for tensors in found.values() for name, tensor in tensors.items()}


def expected(tensors: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """What the steps of a plan make of tensors in memory."""
    assert plan.resolved is not None
    return tensor_rules.visible(tensor_rules.run(plan.resolved.rule, tensors, torch))


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Same names, types, shapes and bytes."""
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bytes_of(found[name]) == bytes_of(tensor), name


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor of any type."""
    data: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


def files_of(folder: Path, leave_out: Sequence[str] = ()) -> dict[str, bytes]:
    """Everything in a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in leave_out]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
