"""Every model type of Transformers, small: all projections split and joined, same outputs, and all the way back.

`make sweep` runs all types; an ordinary run a sample. A type that cannot be made small is skipped with the reason, and
so is one of which only a part could be checked: a pass means that outputs, the way back and loading were all compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

import rewire
from rewire import families, probe
from rewire.plan import Edit, Join, Plan, Split
from rewire.proof import cases_for
from tiny import same, snapshot, tree

SAMPLE = (
    "albert", "aria_text", "bart", "bert", "bloom", "blip_vision_model", "codegen", "deberta-v2", "deepseek_v2",
    "dinov2", "distilbert", "electra", "ernie4_5", "esm", "falcon", "gemma2", "glm", "gpt2", "gpt_bigcode", "gpt_neox",
    "jamba", "llama", "lilt", "mamba", "mistral", "mixtral", "modernbert", "moonshine", "mpt", "olmo2", "opt",
    "persimmon", "phi3", "qwen2", "qwen3_moe", "roberta", "siglip_vision_model", "stablelm", "t5", "vit", "whisper",
    "xglm", "yolos", "zamba",
)  # fmt: skip
MAX_PARAMETERS = 15_000_000


def models() -> Iterator[Any]:
    for model_type in sorted(MODEL_MAPPING_NAMES):
        yield pytest.param(model_type, marks=() if model_type in SAMPLE else (pytest.mark.sweep,))


def small(model_type: str) -> nn.Module:
    """A small model with strong weights; skips the test where there can be none."""
    try:
        config = CONFIG_MAPPING[model_type]()
        for part in probe._parts(config):
            widths = (getattr(part, name, None) for name in probe._HIDDEN)
            probe._small_heads(part, 2, next((width for width in widths if isinstance(width, int)), 0))
        with torch.device("meta"):
            count = sum(p.numel() for p in AutoModel.from_config(copy.deepcopy(config)).parameters())
        if count > MAX_PARAMETERS:
            pytest.skip(f"{model_type} stays at {count:,} parameters")
        torch.manual_seed(0)
        model = AutoModel.from_config(config).eval()
    except Exception as error:  # a configuration that cannot be shrunk like this, or a library that is absent
        pytest.skip(f"{model_type} cannot be made small: {str(error).strip().splitlines()[:1]}")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator)
            scaled = 1 + 0.2 * noise if noise.ndim < 2 else noise * noise.shape[-1] ** -0.5
            parameter.data = scaled.to(parameter.dtype)
    return model  # type: ignore[no-any-return]


def everything(model: nn.Module) -> Plan:
    """A plan that splits all that is fused and joins all that is separate."""
    edits: list[Edit] = [
        Split(found.path) for found in families.fused_projections(model) if isinstance(found, families.FusedProjection)
    ]
    for number, separate in enumerate(families.separate_projections(model)):
        if not any(edit.target.startswith(f"{separate.path}.") for edit in edits if isinstance(edit, Split)):
            edits.append(Join(separate.path, parts=separate.parts, name=f"joined{number}"))
    return Plan(edits)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif hasattr(value, "items"):
        for _, item in value.items():
            yield from tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


def run(model: nn.Module, kwargs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)  # some models draw masks or noise
    with torch.no_grad():
        return [tensor.clone() for tensor in tensors(model(**kwargs))]


@pytest.mark.parametrize("model_type", list(models()))
def test_every_projection(model_type: str, tmp_path: Path) -> None:
    model = small(model_type)
    plan = everything(model)
    if not plan.edits:
        pytest.skip(f"{model_type} has no projections to split or join")
    try:
        kwargs = dict(cases_for(model, (0,))[0].kwargs)
        expected = run(model, kwargs)
    except Exception:  # no simple inputs: the weights are still checked
        kwargs, expected = {}, []
    unchecked = [] if expected else ["outputs"]
    before, modules = snapshot(model), tree(model)  # now: BigBird changes its attention in its own forward

    rewire.apply_(model, plan)

    for first, second in zip(expected, run(model, kwargs) if expected else [], strict=True):
        if first.is_floating_point() and first.numel():
            scale = float(first.abs().nan_to_num().max()) or 1.0
            torch.testing.assert_close(second / scale, first / scale, rtol=0, atol=1e-4, equal_nan=True)
    rewire.revert_(model)
    assert same(snapshot(model), before)
    assert tree(model) == modules
    unchecked += [] if _check_loading(model, plan, tmp_path) else ["loading"]
    if unchecked:
        pytest.skip(f"checked in part, without {' and '.join(unchecked)}: {model_type}")


def _check_loading(model: Any, plan: Plan, folder: Path) -> bool:
    """Loading with the plan gives the tensors of loading first and editing then; False if it cannot be tried."""
    try:
        model.save_pretrained(folder)
        plain = type(model).from_pretrained(folder)
    except Exception:  # some shrunk configurations cannot be read back
        return False
    rewire.apply_(plain, plan)
    loaded = rewire.load(folder, plan, model_class=type(model))
    assert same(snapshot(loaded), snapshot(plain))
    return True
