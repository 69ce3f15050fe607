"""For models of every kind: the steps of a resolved plan make, of the files, what loading with the plan makes.

`make sweep` goes through all types.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewire import hf_seam
from rewire.coverage.plans import PLACES
from rewire.explicit import resolve_plan, written_rule
from rewire.loading import load
from rewire.plan import Plan
from rewire.proof.weights import same_bits
from rewire.saving import save
from rewire.stream import convert
from rewire.tensor_rules import invert, run
from rewire.zoo import Unavailable, tiny_model

#: Fused and separate, stacked and separate experts, tied weights, legacy names, converters of every kind.
SAMPLE = (
    "bert", "gpt2", "t5", "phi3", "falcon", "mixtral", "gpt_oss", "deepseek_v3", "llama4", "qwen2_5_vl", "clip",
    "ernie4_5_vl_moe", "zamba", "kimi_k25", "inkling_mm_model", "sam3_tracker", "nllb-moe",
)  # fmt: skip


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(same_bits(first[name], second[name]) for name in first)


def check_type(model_type: str, folder: Path) -> list[str]:
    """Resolves, converts and brings back; the edits that had a place."""
    model = tiny_model(model_type)
    with hf_seam.quiet():
        model.save_pretrained(folder / "source")
        return [edit for edit in PLACES if _check_edit(edit, model, folder)]


def _check_edit(edit: str, model: hf_seam.PreTrainedModel, folder: Path) -> bool:
    places = PLACES[edit](model)
    plans = {"general": places.general, "places": places.plan} if places.count else {"general": places.general}
    found = [_check_plan(plan, model, folder, f"{edit}-{name}") for name, plan in plans.items()]
    return any(found)


def _check_plan(plan: Plan, model: hf_seam.PreTrainedModel, folder: Path, name: str) -> bool:
    source = folder / "source"
    resolved = resolve_plan(plan, source)
    assert resolved.resolved is not None
    assert Plan.from_yaml(resolved.to_yaml()) == resolved
    if not resolved.resolved.steps:
        return False
    stored = hf_seam.read_tensors(source)
    edited = load(source, plan, model_class=type(model))
    save(edited, folder / name, layout="edited")
    wanted = hf_seam.read_tensors(folder / name)
    made = run(resolved.resolved.rule, stored, torch)
    assert same(made, wanted), f"{name}: the steps do not make what loading with the plan makes"
    assert same(run(invert(resolved.resolved.rule), made, torch), stored), f"{name}: the steps do not lead back"
    assert same(run(invert(written_rule(folder / name)), wanted, torch), stored), f"{name}: no way back from the folder"
    _check_files(resolved, folder, name, stored, wanted, edited)
    return True


def _check_files(
    plan: Plan,
    folder: Path,
    name: str,
    stored: dict[str, Tensor],
    wanted: dict[str, Tensor],
    edited: hf_seam.PreTrainedModel,
) -> None:
    """The same through files."""
    convert(folder / "source", folder / f"{name}-converted", plan)
    assert same(hf_seam.read_tensors(folder / f"{name}-converted"), wanted), f"{name}: convert makes something else"
    again = load(folder / f"{name}-converted", model_class=type(edited))
    assert same(again.state_dict(), edited.state_dict()), f"{name}: the converted folder loads as another model"
    for made in (f"{name}-converted", name):
        convert(folder / made, folder / f"{made}-back", revert=True)
        assert same(hf_seam.read_tensors(folder / f"{made}-back"), stored), f"{made}: not brought back"


@pytest.mark.parametrize("model_type", SAMPLE)
def test_steps_make_what_loading_makes(model_type: str, tmp_path: Path) -> None:
    assert check_type(model_type, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", hf_seam.auto_model_types())
def test_steps_make_what_loading_makes_everywhere(model_type: str, tmp_path: Path) -> None:
    try:
        check_type(model_type, tmp_path)
    except Unavailable as missing:
        pytest.skip(str(missing))
