"""The folder of an adapter, as peft writes it, with what Rewire needs for the way back.

```
folder/
  adapter_config.json, adapter_model.safetensors     as peft writes them
  rewire_adapter.json                                the plan, the configuration before, what ranks consist of
  rewire_adapter.safetensors                         originals of the factors that had to be rounded, if any
```
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rewire import hf_seam
from rewire.adapters.folding import Block, Folded
from rewire.adapters.layout import PREFIX
from rewire.artefact import new_folder, side_files
from rewire.errors import CheckpointError, OutputError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RECORD = "rewire_adapter.json"
KEPT = "rewire_adapter.safetensors"


@dataclass(frozen=True)
class Record:
    """What is needed to carry an adapter back.

    Attributes:
        plan: the plan that it was carried across.
        plan_hash: its hash.
        config: `adapter_config.json` as it was.
        blocks: by the names of the tensors now, what the ranks of their adapters consist of.
    """

    plan: Mapping[str, Any]
    plan_hash: str
    config: Mapping[str, Any]
    blocks: Mapping[str, Sequence[Block]]


@dataclass(frozen=True)
class Adapter:
    """An adapter, read."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    record: Record | None


def read(folder: Path) -> Adapter:
    """Reads an adapter. Raises `CheckpointError` for one that is damaged, pickled or none."""
    config = folder / CONFIG
    if not config.is_file():
        raise CheckpointError(f"{folder} is no adapter: it has no {CONFIG}")
    weights = folder / WEIGHTS
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise CheckpointError(
            f"{folder} holds its weights in adapter_model.bin; pickled weights can run code when they are read, so "
            "Rewire does not. Where you trust them, load the adapter with peft and save it: "
            "PeftModel.from_pretrained(model, folder).save_pretrained(new_folder)"
            if pickled
            else f"{folder} has no {WEIGHTS}"
        )
    tensors = hf_seam.read_safetensors(weights)
    foreign = [name for name in tensors if not name.startswith(PREFIX)]
    if foreign:
        raise CheckpointError(
            f"{weights} has a tensor {foreign[0]}, a name that peft does not give; load it with peft and save it again"
        )
    return Adapter(folder, _json(config), tensors, _record(folder))


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged: it holds no mapping")
    return data


def _record(folder: Path) -> Record | None:
    path = folder / RECORD
    if not path.is_file():
        return None
    data = _json(path)
    if data.get("rewire") != 1:
        raise CheckpointError(f"{path} is of another version of Rewire ({data.get('rewire')!r})")
    if data.get("reverted"):
        return None
    kept = hf_seam.read_safetensors(folder / KEPT) if (folder / KEPT).is_file() else {}
    try:
        blocks = {
            name: tuple(
                Block(rank, tuple(origins), alpha, of_rank, factor, kept.get(f"{name}/{number}"))
                for number, (rank, origins, alpha, of_rank, factor) in enumerate(found)
            )
            for name, found in data["blocks"].items()
        }
        return Record(data["plan"], data["plan_hash"], data["config"], blocks)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); without it the way back needs a plan (--plan)") from error


def write(
    destination: Path,
    adapter: Adapter,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    record: tuple[Mapping[str, Any], str, Mapping[str, Folded]],
    *,
    reverted: bool,
    overwrite: bool,
) -> None:
    """Writes the carried adapter, with the side files of the one it was. Raises `OutputError`.

    `record`: the plan, its hash, and the tensors with their blocks.
    """
    if destination.exists() and os.path.samefile(destination, adapter.folder):
        raise OutputError(f"{destination} is the adapter itself; choose another folder")
    plan, digest, blocks = record
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with new_folder(destination, overwrite=overwrite, needed_bytes=needed) as building:
        for path in side_files(adapter.folder):
            if path.name not in {RECORD, CONFIG}:
                shutil.copy2(path, building / path.name)
        _write_json(building / CONFIG, config)
        hf_seam.write_safetensors(building / WEIGHTS, tensors)
        data = {"rewire": 1, "reverted": reverted, "plan": plan, "plan_hash": digest}
        if reverted:
            _write_json(building / RECORD, data)
            return
        kept = {
            f"{name}/{number}": block.kept
            for name, folded in blocks.items()
            for number, block in enumerate(folded.blocks)
            if block.kept is not None
        }
        if kept:
            hf_seam.write_safetensors(building / KEPT, kept)
        listed = {name: [_listed(block) for block in folded.blocks] for name, folded in blocks.items()}
        _write_json(building / RECORD, {**data, "config": adapter.config, "blocks": listed})


def _listed(block: Block) -> list[Any]:
    return [block.rank, list(block.origins), block.alpha, block.of_rank, block.factor]


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=path.name == CONFIG) + "\n", "utf-8")
