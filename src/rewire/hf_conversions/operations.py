"""The loader's operations on names and shapes: each is noted in tensor steps, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from transformers import PreTrainedModel, core_model_loading
from transformers.core_model_loading import WeightConverter

from rewire.errors import CheckpointError
from rewire.hf_conversions.order import Part
from rewire.tensor_rules import (
    JoinRows,
    PermuteRows,
    Rename,
    Shape,
    SplitRows,
    Stack,
    Step,
    Transpose,
    Unstack,
    with_names,
)

Value = list[str] | str
"""Tensors as they were collected, or the one that an operation made of them."""

Values = dict[str, Value]
"""By pattern."""


def first_of(value: Value) -> str:
    """The tensor, or the first of several."""
    return value[0] if isinstance(value, list) else value


def _all(value: Value) -> list[str]:
    return value if isinstance(value, list) else [value]


@dataclass
class Trace:
    """Runs the operations of a converter on names and shapes, and notes the steps."""

    name: str
    model: PreTrainedModel
    converter: WeightConverter
    shapes: dict[str, Shape]
    steps: list[Step] = field(default_factory=list)

    @property
    def sources(self) -> list[str]:
        return self.converter.source_patterns

    @property
    def targets(self) -> list[str]:
        return self.converter.target_patterns

    def run(self, operation: Any, values: Values) -> Values:
        handler = OPERATIONS.get(type(operation).__name__)
        known = getattr(core_model_loading, type(operation).__name__, None)
        if handler is None or type(operation) is not known:
            raise CheckpointError(
                f"{type(self.model).__name__}: {self.name} is read with {type(operation).__name__}, which "
                "cannot be told in tensor steps; load the model with the plan instead (rewire.load) and save it"
            )
        return handler(self, operation, values)

    def new(self, number: int = 0) -> str:
        """A name for something made on the way; of several the one with this number."""
        return f"{self.name}~{len(self.shapes) + number}"

    def several(self, count: int) -> tuple[str, ...]:
        return tuple(map(self.new, range(count)))

    def note(self, step: Step) -> tuple[str, ...]:
        """Notes a step; returns the names of what it makes."""
        made = step.shapes(*(self.shapes[name] for name in step.inputs))
        self.shapes |= dict(zip(step.outputs, made, strict=True))
        self.steps.append(step)
        return step.outputs

    def rows(self, name: str, dim: int) -> int:
        return self.shapes[name][dim]

    def dim(self, name: str, dim: int) -> int:
        """A dimension counted from the front."""
        return dim % len(self.shapes[name])

    def split(self, name: str, sizes: Sequence[int], dim: int) -> tuple[str, ...]:
        """Equal parts and others; a single one is the tensor itself."""
        if len(sizes) == 1:
            return (name,)
        return self.note(SplitRows(name, self.several(len(sizes)), tuple(sizes), dim=self.dim(name, dim)))

    def join(self, names: Sequence[str], dim: int) -> str:
        """One after the other along `dim`."""
        if len(names) == 1:
            return names[0]
        dim = self.dim(names[0], dim)
        return self.note(JoinRows(self.new(), tuple(names), tuple(self.rows(name, dim) for name in names), dim=dim))[0]

    def stack(self, names: Sequence[str], dim: int) -> str:
        self._first_dim(names[0], dim, "stacks")
        return self.note(Stack(self.new(), tuple(names)))[0]

    def unstack(self, name: str, dim: int) -> tuple[str, ...]:
        self._first_dim(name, dim, "takes apart")
        return self.note(Unstack(name, self.several(self.rows(name, 0))))

    def _first_dim(self, name: str, dim: int, what: str) -> None:
        if dim != 0:
            raise CheckpointError(f"{self.name}: Transformers {what} {name} along dimension {dim}, not the first")

    def finished(self, names: Mapping[str, str]) -> Part:
        """The steps, what they make called as `names` says: final name to name on the way."""
        sources = {name for step in self.steps for name in step.inputs} - {n for s in self.steps for n in s.outputs}
        final = {made: name for name, made in names.items()}
        kept = {made for made in final if made in sources or made in self._untouched()}
        steps = [with_names(step, lambda n: n if n in kept else final.get(n, n)) for step in self.steps]
        return Part([*steps, *(Rename(made, final[made]) for made in final if made in kept and made != final[made])])

    def _untouched(self) -> set[str]:
        """Tensors that no step made."""
        return set(self.shapes) - {name for step in self.steps for name in step.outputs}


def _chunked(trace: Trace, name: str, count: int, dim: int) -> tuple[str, ...]:
    """As `torch.chunk`: all parts but the last are equal."""
    total = trace.rows(name, dim)
    size = math.ceil(total / count)
    return trace.split(name, [min(size, total - start) for start in range(0, total, size)], dim)


def _chunk(trace: Trace, op: Any, values: Values) -> Values:
    (value,) = values.values()
    targets = op.get_target_patterns(trace.targets, config=trace.model.config)
    return dict(zip(targets, _chunked(trace, first_of(value), len(targets), op.dim), strict=False))


def _split(trace: Trace, op: Any, values: Values) -> Values:
    (value,) = values.values()
    names = [trace.name.replace(trace.targets[0], target) for target in trace.targets]
    sizes = [trace.model.get_parameter(name).shape[op.dim] for name in names]
    return dict(zip(trace.targets, trace.split(first_of(value), sizes, op.dim), strict=True))


def _concatenate(trace: Trace, op: Any, values: Values) -> Values:
    names = [name for pattern in trace.sources if pattern in values for name in _all(values[pattern])]
    return {op.get_target_pattern(trace.targets): trace.join(names, op.dim)}


def _interleave(trace: Trace, op: Any, values: Values) -> Values:
    name = first_of(next(iter(values.values())))
    dim = trace.dim(name, op.dim)
    half = trace.rows(name, dim) // 2
    grid = (2, half) if op.inverse else (half, 2)
    return {trace.targets[0]: trace.note(PermuteRows(name, trace.new(), grid, (1, 0), dim))[0]}


def _merge_list(trace: Trace, op: Any, values: Values) -> Values:
    return {
        op.get_target_pattern(len(values), pattern, trace.targets): (
            value if isinstance(value, str) else trace.stack(value, op.dim)
        )
        for pattern, value in values.items()
    }


def _split_list(trace: Trace, op: Any, values: Values) -> Values:
    made: Values = {}
    for pattern, value in values.items():
        name = first_of(value)
        targets = op.get_target_patterns(values, pattern, trace.targets, trace.rows(name, op.dim))
        made |= dict(zip(targets, trace.unstack(name, op.dim), strict=True))
    return made


def _transpose(trace: Trace, op: Any, values: Values) -> Values:
    (value,) = values.values()
    name, target = first_of(value), op.get_target_pattern(values, trace.sources, trace.targets)
    if op.check_dims and trace.shapes[name] == tuple(trace.model.get_parameter(trace.name).shape):
        return {target: name}
    dims = len(trace.shapes[name])
    if {op.dim0 % dims, op.dim1 % dims} != {dims - 2, dims - 1}:
        raise CheckpointError(f"{trace.name}: Transformers swaps dimensions {op.dim0} and {op.dim1} of {dims}")
    return {target: trace.note(Transpose(name, trace.new()))[0]}


def _permute_for_rope(trace: Trace, op: Any, values: Values) -> Values:
    made: Values = {}
    for pattern, value in values.items():
        wanted = op.permute_layer_names is None or any(name in pattern for name in op.permute_layer_names)
        target = op.get_target_pattern(pattern, trace.sources, trace.targets)
        made[target] = _rotary(trace, op, first_of(value)) if wanted else value
    return made


def _rotary(trace: Trace, op: Any, name: str) -> str:
    """The rows of every head from alternating to half-split (or back); tensors of three dimensions stay."""
    if len(trace.shapes[name]) > 2:
        return name
    config = trace.model.config
    if op.subconfig_key is not None:
        config = getattr(config, op.subconfig_key, config)
    heads = getattr(config, "num_attention_heads", 1)
    half = trace.rows(name, 0) // heads // 2
    grid = (heads, 2, half) if op.inverse else (heads, half, 2)
    return trace.note(PermuteRows(name, trace.new(), grid, (0, 2, 1)))[0]


def _fuse_rotary(trace: Trace, op: Any, values: Values) -> Values:
    return _concatenate(trace, op.concat_op, _permute_for_rope(trace, op.permute_op, values))


def _unfuse_rotary(trace: Trace, op: Any, values: Values) -> Values:
    return _permute_for_rope(trace, op.permute_op, _chunk(trace, op.chunk_op, values))


def _fuse_by_kind(trace: Trace, op: Any, values: Values) -> Values:
    """Lists of experts, the first half of each for the text and the second for images, one tensor per kind."""
    halves = [op.split_list_into_chunks(_all(values[key]), chunks=len(trace.targets)) for key in trace.sources]
    stacked = [[trace.stack(group, op.stack_dim) for group in groups] for groups in halves]
    return {
        target: trace.join([groups[number] for groups in stacked], op.concat_dim)
        for number, target in enumerate(trace.targets)
    }


def _unfuse_by_kind(trace: Trace, op: Any, values: Values) -> Values:
    cut = [_chunked(trace, first_of(values[key]), len(trace.targets), op.concat_dim) for key in trace.sources]
    made: Values = {}
    for number, target in enumerate(trace.targets):
        names = chain.from_iterable(trace.unstack(parts[number], op.stack_dim) for parts in cut)
        made |= {target.replace("*", str(index)): name for index, name in enumerate(names)}
    return made


def _flattened(trace: Trace, op: Any, values: Values) -> Values:
    """Kernels of a convolution that are a matrix already; others would have to get another number of dimensions."""
    (value,) = values.values()
    if len(trace.shapes[first_of(value)]) != 2:
        raise CheckpointError(
            f"{trace.name}: Transformers flattens a kernel ({type(op).__name__}), which no step can do"
        )
    return {op._get_target_pattern(values, trace.sources, trace.targets): value}


OPERATIONS: Mapping[str, Callable[[Trace, Any, Values], Values]] = {
    "Chunk": _chunk,
    "Split": _split,
    "Concatenate": _concatenate,
    "Interleave": _interleave,
    "MergeModulelist": _merge_list,
    "SplitModulelist": _split_list,
    "Transpose": _transpose,
    "PermuteForRope": _permute_for_rope,
    "VisionFuseAndPermuteForRope": _fuse_rotary,
    "VisionUnfuseAndPermuteForRope": _unfuse_rotary,
    "ErnieFuseAndSplitTextVisionExperts": _fuse_by_kind,
    "ErnieSplitAndDecoupleTextVisionExperts": _unfuse_by_kind,
    "Conv3dToLinear": _flattened,
}
"""By the name of the class, which is that of this version of Transformers or it does not count."""
