"""The checkpoint that the conversion benchmarks work on, the edits, and what each edit must give.

The checkpoint has the shapes of a Phi-3: fused q, k, v and fused gate and up. What an edit must give is said here in
plain numpy, apart from Rewire's own rules.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
Tensors = Mapping[str, Array]

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Size:
    """How large the checkpoint is; the default is 4.0 GB."""

    layers: int = 18
    hidden: int = 3072
    inner: int = 8192
    heads: int = 24
    kv_heads: int = 8
    vocabulary: int = 32064
    shards: int = 5

    @property
    def kv(self) -> int:
        """Rows of k, and of v."""
        return self.hidden // self.heads * self.kv_heads

    def shapes(self) -> Iterator[tuple[str, Shape]]:
        """Every tensor, in the order of the files."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            for name, shape in self.layer_shapes().items():
                yield f"model.layers.{layer}.{name}.weight", shape
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def layer_shapes(self) -> dict[str, Shape]:
        """The tensors of a layer."""
        return {
            "input_layernorm": (self.hidden,),
            **self.matrices(),
            "post_attention_layernorm": (self.hidden,),
        }

    def matrices(self) -> dict[str, Shape]:
        """The matrices of a layer."""
        return {
            "self_attn.qkv_proj": (self.hidden + 2 * self.kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_up_proj": (2 * self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(2 * prod(shape) for _, shape in self.shapes())

    def config(self) -> dict[str, Any]:
        """What Transformers needs to know."""
        return {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "dtype": "bfloat16",
        }


TINY = Size(layers=2, hidden=64, inner=128, heads=4, kv_heads=2, vocabulary=96, shards=2)


def write_checkpoint(folder: Path, size: Size) -> None:
    """Random bfloat16 numbers of ordinary size, in shards of about equal length."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_shards(size), 1):
        file = f"model-{number:05}-of-{size.shards:05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        with (folder / file).open("wb") as out:
            out.write(_header(names))
            for shape in names.values():
                for start in range(0, prod(shape), 1 << 24):
                    bits = random.integers(0, 1 << 16, min(1 << 24, prod(shape) - start), np.uint16)
                    out.write(((bits & 0x80FF) | 0x3F00).tobytes())  # 0.5 to 2 in size, either sign
    index = {"metadata": {"total_size": size.bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index), "utf-8")
    (folder / "config.json").write_text(json.dumps(size.config(), indent=2), "utf-8")


def _shards(size: Size) -> list[dict[str, Shape]]:
    shards: list[dict[str, Shape]] = [{}]
    filled = 0
    for name, shape in size.shapes():
        if filled >= size.bytes * len(shards) / size.shards and len(shards) < size.shards:
            shards.append({})
        shards[-1][name] = shape
        filled += 2 * prod(shape)
    return shards


def _header(names: Mapping[str, Shape]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in names.items():
        stop = start + 2 * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_checkpoint(folder: Path) -> dict[str, Array]:
    """All tensors, bfloat16 as the 16 bits that they are; mapped, so that they take no memory."""
    found: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            body = file.tell()
        header.pop("__metadata__", None)
        data = np.memmap(path, np.uint8, "r")
        for name, entry in header.items():
            start, stop = (body + offset for offset in entry["data_offsets"])
            kind = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[entry["dtype"]]
            found[name] = data[start:stop].view(kind).reshape(entry["shape"])
    return found


# ---------------------------------------------------------------- the edits

Steps = list[dict[str, Any]]


@dataclass(frozen=True)
class Edit:
    """One edit.

    Attributes:
        name: what it does.
        steps: the tensor steps that a plan for a checkpoint of some size consists of.
        result: every tensor that there must be afterwards.
        aims: largest time wished for with so many jobs, as a multiple of that of copying the files.
    """

    name: str
    steps: Callable[[Size], Steps]
    result: Callable[[Size, Tensors], Iterator[tuple[str, Array]]]
    aims: Mapping[int, float] = field(default_factory=dict)

    def plan(self, size: Size) -> dict[str, Any]:
        """The plan as JSON data."""
        return {"rewire": 1, "edits": [], "resolved": {"steps": self.steps(size)}}

    def check(self, size: Size, before: Tensors, after: Tensors) -> tuple[str, bool]:
        """Whether `after` is exactly what must become of `before`, in words and as such."""
        count = equal = 0
        for name, array in self.result(size, before):
            count += 1
            equal += name in after and np.array_equal(array, after[name])
        return f"{equal} of {count} tensors equal", equal == count == len(after)


def _on_matrices(
    name: str,
    step: Callable[[str, Shape], dict[str, Any]],
    expected: Callable[[Array], Mapping[str, Array]],
    aims: Mapping[int, float],
    only: tuple[str, ...] = ("",),
) -> Edit:
    """The same step on matrices of every layer; `expected` gives what becomes of one, by what is added to its name."""

    def changes(tensor: str) -> bool:
        return any(one in tensor for one in only)

    def steps(size: Size) -> Steps:
        each = [f"0..{size.layers - 1}"]
        return [
            {**step(f"model.layers.{{0}}.{matrix}.weight", shape), "each": each}
            for matrix, shape in size.matrices().items()
            if changes(matrix)
        ]

    def result(size: Size, before: Tensors) -> Iterator[tuple[str, Array]]:
        for tensor, array in before.items():
            if array.ndim > 1 and ".layers." in tensor and changes(tensor):
                yield from ((tensor + suffix, part) for suffix, part in expected(array).items())
            else:
                yield tensor, array

    return Edit(name, steps, result, aims)


PARTS = (".a", ".b", ".c")

Groups = Callable[[int], int]
"""How many groups so many rows, or columns, are divided into."""


def _split(
    name: str, dim: int, shares: Sequence[int], groups: Groups, aims: Mapping[int, float], only: tuple[str, ...] = ("",)
) -> Edit:
    """Rows (0) or columns (1) are dealt out in proportion to `shares`."""

    def step(name: str, shape: Shape) -> dict[str, Any]:
        sizes = [shape[dim] * share // sum(shares) for share in shares]
        parts = [name + suffix for suffix in PARTS[: len(shares)]]
        return {
            "step": "split", "whole": name, "parts": parts, "sizes": sizes, "groups": groups(shape[dim]), "dim": dim
        }  # fmt: skip

    def expected(array: Array) -> dict[str, Array]:
        rows = array if dim == 0 else array.T
        grouped = rows.reshape(groups(len(rows)), -1, rows.shape[1])
        found, start = {}, 0
        for suffix, share in zip(PARTS, shares, strict=False):
            stop = start + grouped.shape[1] * share // sum(shares)
            part = grouped[:, start:stop].reshape(-1, rows.shape[1])
            found[suffix], start = (part if dim == 0 else part.T), stop
        return found

    return _on_matrices(name, step, expected, aims, only)


def _stacked() -> Edit:
    """The matrices of all layers, from all shards, become one tensor for each kind."""

    def steps(size: Size) -> Steps:
        return [
            {"step": "stack", "whole": name, "parts": [f"model.layers.{n}.{name}.weight" for n in range(size.layers)]}
            for name in size.matrices()
        ]

    def result(size: Size, before: Tensors) -> Iterator[tuple[str, Array]]:
        for name in size.matrices():
            yield name, np.stack([before[f"model.layers.{n}.{name}.weight"] for n in range(size.layers)])
        yield from ((name, array) for name, array in before.items() if array.ndim < 2 or ".layers." not in name)

    return Edit("the layers' matrices stacked", steps, result, CONTIGUOUS)


def _transposed() -> Edit:
    def step(name: str, shape: Shape) -> dict[str, Any]:
        return {"step": "transpose", "source": name, "target": f"{name}.t"}

    return _on_matrices("all matrices transposed", step, lambda array: {".t": array.T}, {1: 2.0})


def _cast(dtype: str, aims: Mapping[int, float]) -> Edit:
    def step(name: str, shape: Shape) -> dict[str, Any]:
        return {"step": "cast", "source": name, "target": name, "dtype": dtype, "from_dtype": "bfloat16"}

    def expected(array: Array) -> dict[str, Array]:
        return {"": (array.astype(np.uint32) << 16).view(np.float32).astype(dtype)}

    return _on_matrices(f"all matrices cast to {dtype}", step, expected, aims)


CONTIGUOUS, STRIDED = {1: 1.2, 2: 0.9}, {1: 1.5}

IN_ORDER = _split("fused rows split in order", 0, (2, 1, 1), lambda rows: 1, CONTIGUOUS, ("qkv_proj", "gate_up_proj"))

EDITS = (
    IN_ORDER,
    _split("all rows split head by head", 0, (2, 1, 1), lambda rows: 8, CONTIGUOUS),
    _stacked(),
    _split("all columns split (Conv1D)", 1, (2, 1, 1), lambda columns: 1, STRIDED),
    _split("all columns split alternating", 1, (1, 1), lambda columns: columns // 2, STRIDED),
    _transposed(),
    _cast("float32", {1: 2 * 1.5}),  # nearly twice as many bytes are written as `cp` writes
    _cast("float16", STRIDED),
)
