"""Where a plan is resolved: the untouched model on meta, and the tensors that its checkpoints hold."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewire import hf_conversions, hf_seam
from rewire.artefact import read_record
from rewire.checkpoint import open_checkpoint, torch_name
from rewire.errors import CheckpointError
from rewire.tensor_rules import Cast, CastBack, Rule, Shape, Step, invert, run_shapes

CONFIG = "config:"


@dataclass(frozen=True)
class Origin:
    """A model without weights, and the tensors that a checkpoint of it holds.

    Attributes:
        model: the untouched model, on meta.
        shapes: of the tensors in the checkpoint.
        dtypes: their types, as torch calls them; None where it has no name for one.
        reading: from these to the tensors of the model.
        dtype_key: what `config.json` calls the type of the model.
    """

    model: hf_seam.PreTrainedModel
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str | None]
    reading: Rule
    dtype_key: str = field(default="dtype")

    @property
    def read_dtypes(self) -> dict[str, str | None]:
        """Types after reading."""
        return run_dtypes(self.reading, self.dtypes)


def run_dtypes(steps: Rule, dtypes: Mapping[str, str | None]) -> dict[str, str | None]:
    """The types of the tensors after `steps`, given those before.

    >>> run_dtypes((Cast("a", "b", "float16", "float32"),), {"a": "float32", "c": "int64"})
    {'c': 'int64', 'b': 'float16'}
    """
    current = dict(dtypes)
    for step in steps:
        before = [current.pop(name, None) for name in step.inputs]
        current |= dict.fromkeys(step.outputs, _given(step, before[0] if before else None))
    return current


def _given(step: Step, before: str | None) -> str | None:
    return step.dtype if isinstance(step, Cast | CastBack) else before


def open_origin(source: str | os.PathLike[str] | Any) -> Origin:
    """A checkpoint folder, `config:TYPE`, a configuration, or a name on the Hub. Raises `CheckpointError`."""
    if not isinstance(source, str | os.PathLike):
        return _of_config(source)
    if isinstance(source, str) and source.startswith(CONFIG):
        return _of_config(hf_seam.model_config(source.removeprefix(CONFIG), {}))
    path = Path(source).expanduser()
    return _of_folder(path) if path.is_dir() else _of_hub(str(source))


def _of_config(config: Any) -> Origin:
    """The tensors are those that `save_pretrained` would write."""
    model = on_meta(config)
    shapes = hf_conversions.stored_shapes(model)
    state = model.state_dict()
    reading = invert(hf_conversions.writing_rule(model, shapes))
    dtypes: dict[str, str | None] = {name: str(state[name].dtype).removeprefix("torch.") for name in shapes}
    back = invert(reading)
    return Origin(model, run_shapes(back, shapes), run_dtypes(back, dtypes), reading)


def _of_folder(folder: Path) -> Origin:
    record = read_record(folder)
    if record is not None and record.layout == "edited":
        raise CheckpointError(
            f"{folder} holds a model that was edited already; bring it back first (rewire convert --revert), or "
            "resolve one plan with all edits for the original"
        )
    checkpoint = open_checkpoint(folder)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    dtypes = {name: torch_name(info.dtype) for name, info in checkpoint.tensors.items()}
    return _of_tensors(hf_seam.read_config(folder), checkpoint.config or {}, shapes, dtypes)


def _of_hub(name: str) -> Origin:
    """The local copy of a model on the Hub, or else the headers of its files alone."""
    from huggingface_hub import get_safetensors_metadata, snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        if any(folder.glob("*.safetensors")):
            return _of_folder(folder)
    except OSError:  # there is no local copy
        pass
    config = hf_seam.read_config(name)
    try:
        found = get_safetensors_metadata(name)
    except Exception as error:  # of the network, of the Hub, of the format
        raise CheckpointError(f"the tensors of {name} cannot be listed: {error}") from error
    tensors = {key: info for file in found.files_metadata.values() for key, info in file.tensors.items()}
    shapes = {key: tuple(info.shape) for key, info in tensors.items()}
    return _of_tensors(config, config.to_dict(), shapes, {key: torch_name(info.dtype) for key, info in tensors.items()})


def _of_tensors(
    config: Any, said: Mapping[str, Any], shapes: Mapping[str, Shape], dtypes: Mapping[str, str | None]
) -> Origin:
    model = on_meta(config)
    if "quantization_config" in said:
        packed = packed_weights(model, shapes)
        shapes, dtypes = {**packed, **shapes}, {**dict.fromkeys(packed), **dtypes}
    reading = hf_conversions.reading_rule(model, shapes)
    return Origin(model, shapes, dtypes, reading, "torch_dtype" if "torch_dtype" in said else "dtype")


_PACKED = re.compile(r"(?P<module>.+\.)qweight|(?P<tensor>.+?)(_packed|_blocks)")


def packed_weights(model: hf_seam.PreTrainedModel, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Weights of `model` that a quantised checkpoint does not hold as such, because others hold their values.

    A plan speaks of the weight; whoever changes the files finds what holds it (`x.qweight`, `x.scales`, …).
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."
    found: dict[str, Shape] = {}
    for match in filter(None, map(_PACKED.fullmatch, shapes)):
        name = match["tensor"] or f"{match['module']}weight"
        spelled = next((one for one in (name, prefix + name, name.removeprefix(prefix)) if one in wanted), None)
        if spelled is not None:
            found[name] = wanted[spelled]
    return found


def on_meta(config: Any) -> hf_seam.PreTrainedModel:
    """The model that was saved with `config`, without weights; of a quantised one, what it was before."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    loader = hf_seam.saved_class("", config=config)
    architecture = loader.__name__ if issubclass(loader, hf_seam.PreTrainedModel) else None
    return hf_seam.build(config, architecture=architecture, meta=True)
