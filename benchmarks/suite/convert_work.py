"""`python -m suite.convert_work WHAT SOURCE DESTINATION [OPTIONS]`: one conversion in a process of its own.

The last line of the output says how much memory the process took at its peak, in bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

STATUS = Path("/proc/self/status")


def main() -> None:
    options = parse()
    WAYS[options.what](options)
    print(peak())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=WAYS)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--no-checksums", action="store_true")
    parser.add_argument("--manifest", type=Path)
    parser.add_argument("--no-sync", action="store_true", help="leave it to the system when bytes go to the disk")
    return parser.parse_args()


def peak() -> int:
    """Largest resident memory of this program; `ru_maxrss` would count the program that started it too."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def rewire(options: argparse.Namespace) -> None:
    """`rewire.convert`. `cp` does not wait for the disk, so a run that is compared with it must not either."""
    if options.no_sync:
        os.fsync = os.fdatasync = lambda file: None
    from rewire import convert
    from rewire.plan import Plan

    convert(
        options.source,
        options.destination,
        Plan.from_dict(json.loads(options.plan.read_text("utf-8"))),
        jobs=options.jobs,
        checksums=not options.no_checksums,
        manifest=options.manifest,
    )
    assert "torch" not in sys.modules


def by_shard(options: argparse.Namespace) -> None:
    """What people write by hand: every shard is loaded, its fused rows are split, the shard is saved."""
    from safetensors.torch import load_file, save_file

    options.destination.mkdir()
    weight_map = {}
    for path in sorted(options.source.glob("*.safetensors")):
        tensors = split(load_file(path))
        save_file(tensors, options.destination / path.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (options.destination / "model.safetensors.index.json").write_text(json.dumps(index))


def by_model(options: argparse.Namespace) -> None:
    """The model is built, its fused rows are split, the result is saved."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.source, dtype="auto")
    model.save_pretrained(options.destination, state_dict=split(model.state_dict()))


def split(tensors: dict) -> dict:  # type: ignore[type-arg]
    """Rows of the fused matrices in a half and two quarters, as the edit `IN_ORDER` has it."""
    found = {}
    for name, tensor in tensors.items():
        if "qkv_proj" in name or "gate_up_proj" in name:
            rows = len(tensor)
            parts = tensor.split([rows // 2, rows // 4, rows // 4])
            found |= {name + suffix: part.contiguous() for suffix, part in zip((".a", ".b", ".c"), parts, strict=True)}
        else:
            found[name] = tensor
    return found


WAYS: dict[str, Callable[[argparse.Namespace], None]] = {
    "rewire": rewire,
    "by-shard": by_shard,
    "by-model": by_model,
}


if __name__ == "__main__":
    main()
