"""The index of a sharded checkpoint: which tensor is in which file. Read as hostile, and compared with the files."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Collection, Mapping

from rewire.checkpoint.faults import Faults
from rewire.checkpoint.header import LONGEST
from rewire.checkpoint.reading import read_bytes
from rewire.checkpoint.records import TensorInfo
from rewire.checkpoint.strict_json import JsonError, expect_end, read_object, read_value, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

REPAIR = "--repair-index (repair_index=True) makes the index anew from the shards; the folder itself is left alone."
_FETCH = "A file that is missing has to be downloaded or saved again."
_NUMBERED = re.compile(r"model-([0-9]{5,})-of-([0-9]{5,})\.safetensors")


def shard_name(number: int, count: int) -> str:
    """What Transformers calls shard `number` (from 1) of `count`.

    >>> shard_name(1, 1), shard_name(2, 3)
    ('model.safetensors', 'model-00002-of-00003.safetensors')
    """
    return SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def shard_number(name: str) -> tuple[int, int] | None:
    """The number and the count in a shard's name; None for other names.

    >>> shard_number("model-00002-of-00003.safetensors"), shard_number("model.safetensors")
    ((2, 3), None)
    """
    found = _NUMBERED.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None


def index_bytes(weight_map: Mapping[str, str], total_size: int, total_parameters: int | None = None) -> bytes:
    """The text of an index as Transformers writes it.

    Args:
        weight_map: the file of every tensor.
        total_size: bytes of all tensors together.
        total_parameters: elements of all parameters; Transformers 5 records them too.

    >>> print(index_bytes({"w": "model-00001-of-00002.safetensors"}, 4, 1).decode(), end="")
    {
      "metadata": {
        "total_parameters": 1,
        "total_size": 4
      },
      "weight_map": {
        "w": "model-00001-of-00002.safetensors"
      }
    }
    """
    metadata = {"total_size": total_size}
    if total_parameters is not None:
        metadata["total_parameters"] = total_parameters
    index = {"metadata": metadata, "weight_map": dict(weight_map)}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def read_index(handle: int, faults: Faults) -> dict[str, str] | None:
    """The weight map of an open index; None if it cannot be read. What else an index says is not needed."""
    size = os.fstat(handle).st_size
    if size > LONGEST:
        faults.add(f"has {size:,} bytes; {LONGEST:,} are the most", file=INDEX, advice=REPAIR)
        return None
    try:
        text = read_bytes(handle, 0, size, INDEX).decode("utf-8")
        return _weight_map(text)
    except UnicodeDecodeError as error:
        faults.add(f"is no UTF-8 (byte {error.start})", file=INDEX, advice=REPAIR)
    except JsonError as error:
        faults.add(f"is damaged: {error}", file=INDEX, advice=REPAIR)
    return None


def _weight_map(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    seen: set[str] = set()

    def entry(name: str, at: int) -> int:
        file, end = read_value(text, at)
        if not isinstance(file, str):
            raise JsonError(f"the file of tensor {shown(name)} is {shown(file)}, no text")
        if name in found:
            raise JsonError(f"tensor {shown(name)} is listed twice")
        found[name] = sys.intern(file)  # a few names of files for many tensors
        return end

    def member(key: str, at: int) -> int:
        if key in seen:
            raise JsonError(f"the key {shown(key)} is given twice")
        seen.add(key)
        return read_object(text, at, entry) if key == "weight_map" else read_value(text, at)[1]

    expect_end(text, read_object(text, 0, member))
    if "weight_map" not in seen:
        raise JsonError("it has no weight_map")
    if not found:
        raise JsonError("its weight_map names no tensor")
    return found


def name_problem(name: str) -> str:
    """Why a name from an index is no shard's; nothing if it is. A shard lies beside its index, nowhere else.

    >>> name_problem("../other/model.safetensors")
    'leads out of the folder; such an index is hostile'
    """
    parts = re.split(r"[/\\]", name)
    if ".." in parts or "\0" in name or re.match(r"[/\\]|[A-Za-z]:", name):
        return "leads out of the folder; such an index is hostile"
    if len(parts) > 1:
        return "lies in a folder of its own; shards lie beside their index"
    if not name.endswith(".safetensors"):
        return "is no safetensors file"
    return ""


def check_named(weight_map: Mapping[str, str], present: Collection[str], faults: Faults) -> list[str]:
    """The files that an index names and that are there; those that must not be named or are missing are faults."""
    tensors: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        tensors.setdefault(file, []).append(tensor)
    for file, names in tensors.items():
        problem = name_problem(file)
        if problem:
            faults.add(f"names {shown(file)} for {_some(names)}; that {problem}", file=INDEX)
        elif file not in present:
            faults.add(f"is missing; the index expects {_some(names)} in it", file=file, advice=_FETCH)
    return [file for file in tensors if file in present and not name_problem(file)]


def check_against(
    weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], files: Mapping[str, int], faults: Faults
) -> None:
    """Compares an index with what the shards hold.

    Args:
        weight_map: what the index says.
        tensors: what the readable shards hold.
        files: the numbers of the readable shards; nothing is said of tensors that others should hold.
        faults: takes every fault found.
    """
    names = {number: file for file, number in files.items()}
    for name, file in weight_map.items():
        info = tensors.get(name)
        if info is not None and names[info.shard] != file:
            there = names[info.shard]
            faults.add(f"is in {there}; the index says {shown(file)}", file=INDEX, tensor=name, advice=REPAIR)
        elif info is None and file in files:
            faults.add(f"is not in {file}, where the index says it is", file=INDEX, tensor=name, advice=REPAIR)
    for name, info in tensors.items():
        if name not in weight_map:
            faults.add("is not in the index", file=names[info.shard], tensor=name, advice=REPAIR)


def complete_set(present: Collection[str], weight_map: Mapping[str, str] | None, faults: Faults) -> list[str]:
    """The shards that an index is to be made from: one whole set of numbered files, else those that the index names.

    Args:
        present: the names of the files in the folder.
        weight_map: what the index says, if it can be read; it decides between several sets.
        faults: takes what is missing from the set, or that there are several.
    """
    numbered = {name: found for name in present if (found := shard_number(name))}
    named = set((weight_map or {}).values())
    counts = {count for name, (_, count) in numbered.items() if not named or name in named}
    counts = counts or {count for _, count in numbered.values()}
    if not counts:
        return check_named(weight_map or {}, present, faults)
    if len(counts) > 1:
        sets = ", ".join(f"of {count}" for count in sorted(counts))
        faults.add(f"the folder holds shards of several sets ({sets}); move all but one away, then repair the index")
        return []
    (count,) = counts
    have = {number: name for name, (number, total) in numbered.items() if total == count}
    missing = next((number for number in range(1, count + 1) if number not in have), None)
    if missing is not None:  # never count up to a number from a file's name
        faults.add(f"is missing; {len(have):,} of {count:,} are there", file=shard_name(missing, count), advice=_FETCH)
    return list(have.values())


def by_number(name: str) -> list[tuple[int, str]]:
    """A sort key that puts shard 100000 behind shard 99999."""
    return [(len(part), part) if part[:1].isdigit() else (0, part) for part in re.split(r"([0-9]+)", name)]


def _some(names: list[str]) -> str:
    few = ", ".join(map(shown, names[:3]))
    return f"tensor {few}" if len(names) == 1 else f"{len(names):,} tensors ({few}{', …' if len(names) > 3 else ''})"
