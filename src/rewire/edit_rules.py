"""The tensor rules of the edits, from names and sizes alone: no torch, no model.

Every use of an edit (live, while loading, on disk, on adapters) starts from these functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rewire import plan
from rewire.errors import RuleError
from rewire.tensor_rules import (
    Cast,
    Drop,
    JoinRows,
    Rename,
    Rule,
    Shape,
    SplitRows,
    Stack,
    Step,
    Transpose,
    Unstack,
    run_shapes,
)

if TYPE_CHECKING:
    from rewire.modules import StackedWeight

TensorRule = (
    plan.SplitTensor | plan.JoinTensor | plan.RenameTensor | plan.TransposeTensor | plan.DropTensor | plan.CastTensor
)


def split_rule(
    path: str,
    parts: Sequence[str],
    sizes: Sequence[int],
    groups: int,
    *,
    bias: bool,
    transposed: bool,
    dim: int = 0,
) -> Rule:
    """The fused linear at `path` becomes the linears `path.part`.

    `transposed`: the fused weight is `[in, out]`; the parts' weights are `[out, in]`. `dim` counts the rows.

    >>> for step in split_rule("attn.qkv", ("q", "k"), (4, 2), 1, bias=True, transposed=False):
    ...     print(step.whole, "->", *step.parts)
    attn.qkv.weight -> attn.qkv.q.weight attn.qkv.k.weight
    attn.qkv.bias -> attn.qkv.q.bias attn.qkv.k.bias
    """
    steps: list[Step] = []
    if transposed:
        steps.append(Transpose(f"{path}.weight", f"{path}.weight"))
    for tensor in ("weight", "bias") if bias else ("weight",):
        names = tuple(f"{path}.{part}.{tensor}" for part in parts)
        steps.append(SplitRows(f"{path}.{tensor}", names, tuple(sizes), groups, dim))
    return tuple(steps)


def multihead_rule(path: str, parts: Sequence[str], sizes: Sequence[int], *, bias: bool) -> Rule:
    """The fused parameters of the `nn.MultiheadAttention` at `path` become the linears `path.part`.

    >>> multihead_rule("attn", ("q", "k", "v"), (4, 4, 4), bias=False)[0].outputs
    ('attn.q.weight', 'attn.k.weight', 'attn.v.weight')
    """
    return tuple(
        SplitRows(f"{path}.in_proj_{tensor}", tuple(f"{path}.{part}.{tensor}" for part in parts), tuple(sizes))
        for tensor in (("weight", "bias") if bias else ("weight",))
    )


def join_rule(
    parent: str,
    name: str,
    parts: Sequence[str],
    sizes: Sequence[int],
    *,
    biased: Sequence[bool],
    transposed: Sequence[bool],
    groups: int = 1,
    dim: int = 0,
) -> Rule:
    """The linears `parent.part` become one, `parent.name`; the joined bias holds the biased parts' rows.

    `groups`: those of grouped convolutions, each of which holds rows of every part. `dim` counts the rows.

    >>> rule = join_rule("attn", "qk", ("q", "k"), (4, 2), biased=(True, False), transposed=(False, False))
    >>> [(step.kind, *step.inputs, "->", *step.outputs) for step in rule]  # doctest: +NORMALIZE_WHITESPACE
    [('join', 'attn.q.weight', 'attn.k.weight', '->', 'attn.qk.weight'),
     ('rename', 'attn.q.bias', '->', 'attn.qk.bias')]
    """
    prefix = f"{parent}." if parent else ""
    weights = tuple(f"{prefix}{part}.weight" for part in parts)
    steps: list[Step] = [Transpose(w, w) for w, is_t in zip(weights, transposed, strict=True) if is_t]
    steps.append(JoinRows(f"{prefix}{name}.weight", weights, tuple(sizes), groups, dim))
    with_bias = [(part, size) for part, size, has in zip(parts, sizes, biased, strict=True) if has]
    biases = tuple(f"{prefix}{part}.bias" for part, _ in with_bias)
    if len(biases) == 1:
        steps.append(Rename(biases[0], f"{prefix}{name}.bias"))
    elif biases:
        steps.append(JoinRows(f"{prefix}{name}.bias", biases, tuple(size for _, size in with_bias), groups, dim))
    return tuple(steps)


def unstack_rule(path: str, count: int, weights: Sequence[StackedWeight]) -> Rule:
    """The stacked tensors of the experts at `path` become the linears `path.number.part` of `count` experts.

    Gate and up are cut apart before the experts are: three steps for any number of experts, not one for each.
    Surplus slices stay together, under the name with `_surplus`.

    >>> from rewire.modules import StackedWeight
    >>> weight = StackedWeight("gate_up", ("gate", "up"), (3, 3), 4, groups=3, transposed=True)
    >>> for step in unstack_rule("moe", 2, [weight]):
    ...     print(step.kind, *step.inputs, "->", *step.outputs)
    transpose moe.gate_up -> moe.gate_up
    split moe.gate_up -> moe.gate moe.up
    unstack moe.gate -> moe.0.gate.weight moe.1.gate.weight
    unstack moe.up -> moe.0.up.weight moe.1.up.weight
    """
    prefix = f"{path}." if path else ""
    steps: list[Step] = []
    for weight in weights:
        whole = f"{prefix}{weight.name}"
        if weight.surplus:
            steps.append(SplitRows(whole, (whole, f"{whole}_surplus"), (count, weight.surplus)))
        if weight.transposed:
            steps.append(Transpose(whole, whole))
        if weight.folded:
            steps.append(_unfold(whole, _of_experts(prefix, count, weight.parts[0], "weight"), weight))
        else:
            steps += _unstack(prefix, whole, count, weight, "weight")
        if weight.bias is not None:
            steps += _unstack(prefix, f"{prefix}{weight.bias}", count, weight, "bias")
    return tuple(steps)


def _unstack(prefix: str, whole: str, count: int, weight: StackedWeight, leaf: str) -> Iterator[Step]:
    """`[experts, rows, …]` into the parts and these into the experts."""
    if len(weight.parts) == 1:
        yield Unstack(whole, _of_experts(prefix, count, weight.parts[0], leaf))
        return
    suffix = "" if leaf == "weight" else "_bias"
    halves = tuple(f"{prefix}{part}{suffix}" for part in weight.parts)
    yield SplitRows(whole, halves, weight.sizes, weight.groups, dim=1)
    for half, part in zip(halves, weight.parts, strict=True):
        yield Unstack(half, _of_experts(prefix, count, part, leaf))


def _unfold(whole: str, names: tuple[str, ...], weight: StackedWeight) -> Step:
    """Slices below each other, or side by side once the matrix is transposed."""
    rows = (weight.in_features if weight.transposed else weight.out_features,) * len(names)
    return SplitRows(whole, names, rows, dim=1 if weight.transposed else 0)


def _of_experts(prefix: str, count: int, part: str, leaf: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{number}.{part}.{leaf}" for number in range(count))


def stack_rule(path: str, experts: Sequence[str], tensors: Mapping[str, str]) -> Rule:
    """The tensor `tensors[leaf]` of the module at `path` holds that called `leaf` of each of its `experts`.

    >>> [(step.kind, *step.inputs, "->", *step.outputs) for step in stack_rule("moe", ("0", "1"), {"wi.weight": "wi"})]
    [('stack', 'moe.0.wi.weight', 'moe.1.wi.weight', '->', 'moe.wi')]
    """
    prefix = f"{path}." if path else ""
    return tuple(
        Stack(f"{prefix}{whole}", tuple(f"{prefix}{expert}.{leaf}" for expert in experts))
        for leaf, whole in tensors.items()
    )


def joined_name(parts: Sequence[str]) -> str:
    """What the joined projection is called if the plan does not say.

    >>> joined_name(("q_proj", "k_proj", "v_proj")), joined_name(("gate_proj", "up_proj"))
    ('qkv_proj', 'gate_up_proj')
    >>> joined_name(("query", "key", "value")), joined_name(("q_proj.linear", "k_proj.linear"))
    ('query_key_value', 'qk_proj')
    """
    wrappers = {part.partition(".")[0]: part for part in parts}  # a layer within a wrapper goes by the wrapper's name
    names = list(wrappers) if len(wrappers) == len(parts) else [part.rpartition(".")[2] for part in parts]
    stems = [name.removesuffix("_proj") for name in names]
    suffix = "_proj" if all(name.endswith("_proj") for name in names) else ""
    return ("" if all(len(stem) == 1 for stem in stems) else "_").join(stems) + suffix


def expand_tensor_rules(rules: Sequence[TensorRule], shapes: Mapping[str, Shape], dtype: str = "float32") -> Rule:
    """The steps that the tensor rules of a `Replace` stand for, on a module with tensors of these `shapes`.

    A `*` in a name stands for the same text in all names of its rule; the rule is repeated for every tensor
    that fits. `dtype` is the type of the module's tensors, which a cast starts from. Raises `RuleError` where
    a rule fits no tensor.

    >>> rules = [plan.SplitTensor("qkv.*", ("q.*", "k.*"))]
    >>> [step.parts for step in expand_tensor_rules(rules, {"qkv.weight": (4, 2), "qkv.bias": (4,)})]
    [('q.weight', 'k.weight'), ('q.bias', 'k.bias')]
    """
    steps: list[Step] = []
    current = dict(shapes)
    for rule in rules:
        found = list(_steps(rule, current, dtype))
        if not found:
            raise RuleError(f"{rule.kind}: no tensor fits {_first(rule)!r}; there are {', '.join(current)}")
        current = run_shapes(found, current)
        steps += found
    return tuple(steps)


def _first(rule: TensorRule) -> str:
    return rule.sources[0] if isinstance(rule, plan.JoinTensor) else rule.source


def _steps(rule: TensorRule, shapes: Mapping[str, Shape], dtype: str) -> Iterator[Step]:
    before, star, after = _first(rule).partition("*")
    pattern = re.compile(re.escape(before) + (f"(.+){re.escape(after)}" if star else ""))
    for name in shapes:
        match = pattern.fullmatch(name)
        if match:
            yield _step(rule, name, match[1] if star else "", shapes, dtype)


def _step(rule: TensorRule, name: str, star: str, shapes: Mapping[str, Shape], dtype: str) -> Step:
    def fill(text: str) -> str:
        return text.replace("*", star)

    match rule:
        case plan.RenameTensor():
            return Rename(name, fill(rule.into))
        case plan.TransposeTensor():
            return Transpose(name, fill(rule.into or name))
        case plan.DropTensor():
            return Drop(name)
        case plan.CastTensor():
            return Cast(name, name, rule.dtype, dtype)
        case plan.SplitTensor():
            parts = tuple(map(fill, rule.into))
            sizes = rule.sizes or _equal_sizes(name, shapes[name], rule.dim, len(parts))
            return SplitRows(name, parts, sizes, _groups(rule, sizes), rule.dim)
        case plan.JoinTensor():
            sources = tuple(map(fill, rule.sources))
            missing = [source for source in sources if source not in shapes]
            if missing:
                raise RuleError(f"join: no tensor {', '.join(missing)}; there are {', '.join(shapes)}")
            sizes = rule.sizes or tuple(shapes[source][rule.dim] for source in sources)
            return JoinRows(fill(rule.into), sources, sizes, _groups(rule, sizes), rule.dim)


def _equal_sizes(name: str, shape: Shape, dim: int, parts: int) -> tuple[int, ...]:
    if len(shape) <= dim or shape[dim] % parts:
        raise RuleError(f"split {name}: shape {list(shape)} does not divide into {parts} equal parts; state sizes")
    return (shape[dim] // parts,) * parts


def _groups(rule: plan.SplitTensor | plan.JoinTensor, sizes: Sequence[int]) -> int:
    if rule.groups:
        return rule.groups
    if rule.layout == "interleaved":
        return min(sizes)
    if rule.layout in {"per_head", "grouped"}:
        raise RuleError(f"layout {rule.layout} needs `groups`: the number of heads (or key-value heads)")
    return 1
