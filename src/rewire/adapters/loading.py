"""`load_adapter`: puts a carried adapter into an edited model."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from rewire import hf_seam
from rewire.adapters import folder as folder_of
from rewire.adapters import layout
from rewire.adapters.settings import Settings, check_kind, module_names, parameter_names
from rewire.errors import CheckpointError


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], name: str = "default", *, trainable: bool = False
) -> None:
    """Puts the adapter in `folder` into `model` under `name`, as the `load_adapter` of a Transformers model does.

    That method, and peft's `from_pretrained`, do the same for most models. For types whose experts Transformers stacks
    since version 5 (Qwen-MoE, DeepSeek, …) they take `gate_proj` and the like for parts of the stacked tensor; this
    takes names for what they are, so that it works for experts taken apart.

    Args:
        model: an edited model.
        folder: an adapter made for it, by `rewire.carry_adapter` or by training.
        name: what it is called in the model.
        trainable: whether its weights are to be trained further.

    Raises:
        CheckpointError: the adapter cannot be read, or does not fit the model.
    """
    adapter = folder_of.read(Path(folder))
    check_kind(adapter.config)
    if not hasattr(model, "peft_config"):
        _check_fit(adapter, model)
    hf_seam.attach_adapter(model, Path(folder), name, trainable=trainable)


def _check_fit(adapter: folder_of.Adapter, model: nn.Module) -> None:
    """Raises `CheckpointError` unless file, configuration and model agree; peft notices when the model is changed."""
    settings = Settings(adapter.config)
    homes = layout.read(adapter.tensors, model, settings).homes.values()
    reached = {*settings.modules(module_names(model)), *settings.parameters(parameter_names(model))}
    differing = sorted(reached ^ {of.key for of in homes})
    if differing:
        raise CheckpointError(
            f"{adapter.folder} does not fit the model: its adapter_config.json and its tensors disagree about "
            f"{', '.join(differing[:3])}"
        )
