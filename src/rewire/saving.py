"""Saves an edited model: in the original layout, which anyone can load, or as it is."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewire import hf_seam, tensor_rules
from rewire.artefact import ADAPTERS, LAYOUTS, Record, copy_side_files, new_folder, write_record
from rewire.errors import OutputError
from rewire.live import hashed
from rewire.plan import Lora, Plan
from rewire.receipts import Done, Edited, edited
from rewire.surgery import SwapBack
from rewire.tensor_rules import Rule, invert


def save(
    model: hf_seam.PreTrainedModel,
    folder: str | os.PathLike[str],
    layout: str = "original",
    *,
    overwrite: bool = False,
    merge_adapters: bool = False,
    side_files_from: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Path:
    """Writes `model` to `folder`; the folder appears whole or not at all.

    Args:
        model: an edited model (or an untouched one).
        folder: where to; must be new or empty.
        layout: `"original"`: names and shapes of the untouched model, for plain `from_pretrained`;
            `"edited"`: as the model is now. `rewire.load(folder)` brings the edited model back from both.
        overwrite: whether an existing folder may be replaced; its files that are not the model's are kept.
        merge_adapters: whether LoRA adapters are merged into the weights instead of being saved in peft's format
            under `adapter/`.
        side_files_from: a folder whose tokenizer and other side files are copied along.
        **kwargs: for `save_pretrained`, `max_shard_size` for instance.

    Raises:
        OutputError: the folder is not empty, or the disk is full; what was there is untouched.
        PlanError: the plan holds a class that cannot be named by an import path.
    """
    if layout not in LAYOUTS:
        raise OutputError(f"layout {layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
    if not isinstance(model, hf_seam.PreTrainedModel):
        raise OutputError(f"{type(model).__name__} is not a PreTrainedModel; save its base model")
    state = edited(model)
    adapters = () if merge_adapters else tuple(getattr(model, "peft_config", {}))
    record = _record(model, state, layout, merge_adapters)
    tensors = _tensors(model, state, layout, merge_adapters)
    if any(tensor.is_meta for tensor in tensors.values()):
        raise OutputError(
            "some weights are offloaded or were never loaded; load the whole model into memory to save it"
        )
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with new_folder(Path(folder), overwrite=overwrite, needed_bytes=needed) as building:
        if side_files_from is not None:
            copy_side_files(Path(side_files_from), building)
        # Names of an edited model mean nothing to Transformers' own conversions, which go by patterns.
        kwargs.setdefault("save_original_format", layout == "original")
        hf_seam.write_pretrained(model, building, tensors, **kwargs)
        for name in adapters:
            hf_seam.save_adapter(model, building / ADAPTERS / name, name)
        if record is not None:
            write_record(building, record)
    return Path(folder)


def _record(model: hf_seam.PreTrainedModel, state: Edited | None, layout: str, merged: bool) -> Record | None:
    if state is None:
        return None
    # An adapter that was merged is no longer to be put on; one that somebody else put on is not the plan's.
    plan = Plan([edit for edit in state.plan.edits if not (merged and isinstance(edit, Lora))], state.plan.name)
    adapters = tuple(edit.adapter for edit in plan.edits if isinstance(edit, Lora))
    found = hashed(model)
    assert found is not None
    return Record(layout, plan.to_dict(), found.to_dict(), adapters)


def _tensors(model: hf_seam.PreTrainedModel, state: Edited | None, layout: str, merge: bool) -> dict[str, Tensor]:
    """The tensors to write, by the names of the layout."""
    tensors = {**(_merged(model) if merge else {})}
    tensors = {name: tensors.get(name, tensor) for name, tensor in model.state_dict().items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not _ADAPTER_TENSOR.search(name)}
    done = state.done if state else []
    ours = {name for one in done for step in one.rule for name in step.outputs}
    tensors = {name if name in ours else _unwrapped(name): tensor for name, tensor in tensors.items()}
    if layout == "original":
        return _shared(_rewritten(tensors, invert(_rule(done, leave_out={"cast"})), _aside(done)), done)
    adapters_out = invert(_rule(done, leave_out={"cast"}))
    if not any(one.kind == "lora" for one in done):
        return tensors
    original = _rewritten(tensors, adapters_out, _aside(done))
    return _rewritten(original, _rule(done, leave_out={"cast", "lora"}), {})


_ADAPTER_TENSOR = re.compile(r"\.(lora_\w+|modules_to_save)\.")


def _unwrapped(name: str) -> str:
    """The name without the wrapping of an adapter that was not put on by a plan."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _rule(done: list[Done], leave_out: set[str]) -> Rule:
    return tuple(step for one in done if one.kind not in leave_out for step in one.rule)


def _aside(done: list[Done]) -> dict[str, Tensor]:
    """What rules put aside, for the way back."""
    return {name: tensor for one in done if isinstance(one.undo, SwapBack) for name, tensor in one.undo.aside.items()}


def _shared(tensors: dict[str, Tensor], done: list[Done]) -> dict[str, Tensor]:
    """`tensors` of the untouched model, in which those that shared modules hold are one tensor again."""
    shared = dict(tensors)
    for one in done:
        if isinstance(one.undo, SwapBack):
            shared |= one.undo.twins.shared(shared, invert(one.rule))
    return shared


def _rewritten(tensors: dict[str, Tensor], rule: Rule, aside: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        made = tensor_rules.visible(tensor_rules.run(rule, {**tensors, **aside}, torch))
    return {name: tensor.contiguous() for name, tensor in made.items()}


def _merged(model: hf_seam.PreTrainedModel) -> dict[str, Tensor]:
    """The weights of adapted layers with their adapters merged in; the model itself is not changed."""
    merged: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            layer = copy.deepcopy(module)
            layer.merge()
            merged |= {f"{path}.base_layer.{name}": tensor for name, tensor in layer.base_layer.state_dict().items()}
        elif hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            trained = module.modules_to_save[module.active_adapter[0]]
            merged |= {f"{path}.original_module.{name}": t for name, t in trained.state_dict().items()}
    return merged
