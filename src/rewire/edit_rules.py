"""The tensor rules of the edits, from names and sizes alone: no torch, no model.

Every use of an edit (live, while loading, on disk, on adapters) starts from these functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

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
    Step,
    Transpose,
    run_shapes,
)

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
) -> Rule:
    """The fused linear at `path` becomes the linears `path.part`.

    `transposed`: the fused weight is `[in, out]`; the parts' weights are `[out, in]`.

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
        steps.append(SplitRows(f"{path}.{tensor}", names, tuple(sizes), groups))
    return tuple(steps)


def join_rule(
    parent: str,
    name: str,
    parts: Sequence[str],
    sizes: Sequence[int],
    *,
    biased: Sequence[bool],
    transposed: Sequence[bool],
) -> Rule:
    """The linears `parent.part` become one, `parent.name`; the joined bias holds the biased parts' rows.

    >>> rule = join_rule("attn", "qk", ("q", "k"), (4, 2), biased=(True, False), transposed=(False, False))
    >>> [(step.kind, *step.inputs, "->", *step.outputs) for step in rule]  # doctest: +NORMALIZE_WHITESPACE
    [('join', 'attn.q.weight', 'attn.k.weight', '->', 'attn.qk.weight'),
     ('rename', 'attn.q.bias', '->', 'attn.qk.bias')]
    """
    prefix = f"{parent}." if parent else ""
    weights = tuple(f"{prefix}{part}.weight" for part in parts)
    steps: list[Step] = [Transpose(w, w) for w, is_t in zip(weights, transposed, strict=True) if is_t]
    steps.append(JoinRows(f"{prefix}{name}.weight", weights, tuple(sizes)))
    with_bias = [(part, size) for part, size, has in zip(parts, sizes, biased, strict=True) if has]
    biases = tuple(f"{prefix}{part}.bias" for part, _ in with_bias)
    if len(biases) == 1:
        steps.append(Rename(biases[0], f"{prefix}{name}.bias"))
    elif biases:
        steps.append(JoinRows(f"{prefix}{name}.bias", biases, tuple(size for _, size in with_bias)))
    return tuple(steps)


def joined_name(parts: Sequence[str]) -> str:
    """What the joined projection is called if the plan does not say.

    >>> joined_name(("q_proj", "k_proj", "v_proj")), joined_name(("gate_proj", "up_proj"))
    ('qkv_proj', 'gate_up_proj')
    >>> joined_name(("query", "key", "value"))
    'query_key_value'
    """
    stems = [part.removesuffix("_proj") for part in parts]
    suffix = "_proj" if all(part.endswith("_proj") for part in parts) else ""
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
