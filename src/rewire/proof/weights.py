"""The weights themselves: bit for bit what the rules say, and bit for bit back again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rewire.errors import RuleError
from rewire.proof.compare import relative_difference
from rewire.proof.names import align, shorten
from rewire.tensor_rules import KEPT, Rule, invert, run, visible

State = dict[str, Tensor]


def state_of(model: nn.Module) -> State:
    """Every parameter and buffer by full name; a shared one under each of its names.

    >>> sorted(state_of(nn.Linear(1, 1)))
    ['bias', 'weight']
    """
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters(remove_duplicate=False)}
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by full name; a shared one under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False))


def derived_names(model: nn.Module) -> frozenset[str]:
    """Buffers that a model computes for itself and does not save."""
    return frozenset(
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    )


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether type, shape and every bit agree (so that -0.0 differs from 0.0, and NaN may equal itself).

    >>> same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    False
    """
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    right = right.to(left.device)
    if left.numel() == 0:
        return True
    try:
        return torch.equal(_bits(left), _bits(right))
    except RuntimeError:  # a tensor subclass without a view of its bytes
        return torch.equal(left, right)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def touched(rules: Rule) -> tuple[str, ...]:
    """Names of the tensors that stand in the edited model because of the rules.

    >>> from rewire.tensor_rules import Rename
    >>> touched((Rename("a", "b"), Rename("b", "c")))
    ('c',)
    """
    names: dict[str, None] = {}
    for step in rules:
        for name in step.inputs:
            names.pop(name, None)
        names.update(dict.fromkeys(step.outputs))
    return tuple(name for name in names if not name.startswith(KEPT))


@dataclass(frozen=True)
class WeightReport:
    """How the tensors expected compare with those found.

    `values` is the largest relative difference among the differing ones (0 when all bits agree); `missing`
    were expected and not found, `extra` found and not expected. `error` says why nothing could be compared.
    """

    compared: int
    differing: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    value: float
    error: str = ""

    @property
    def is_exact(self) -> bool:
        """Whether every bit agrees and nothing is missing."""
        return not (self.differing or self.missing or self.error)

    def describe(self) -> str:
        """As one sentence."""
        if self.error:
            return self.error
        texts = [f"{self.compared - len(self.differing)} of {self.compared} tensors bit-equal"]
        if self.differing:
            texts.append(f"{len(self.differing)} differ: {shorten(self.differing)}")
        if self.missing:
            texts.append(f"{len(self.missing)} missing: {shorten(self.missing)}")
        if self.extra:
            texts.append(f"{len(self.extra)} additional: {shorten(self.extra)}")
        return "; ".join(texts)


def compare_states(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], derived: frozenset[str] = frozenset()
) -> WeightReport:
    """Tensor by tensor; names differ at most by PEFT's wrapping. `derived` ones may be absent on a side."""
    names = align(expected, found)
    differing = [name for name, other in names.items() if not same_bits(expected[name], found[other])]
    values = [relative_difference(expected[name], found[names[name]]) for name in differing]
    missing = tuple(name for name in expected if name not in names and name not in derived)
    used = set(names.values()) | derived
    extra = tuple(name for name in found if name not in used)
    return WeightReport(len(names), tuple(differing), missing, extra, max(values, default=0.0))


def check_forward(before: nn.Module, after: nn.Module, rules: Rule) -> WeightReport:
    """Whether the edited model holds what the rules make of the untouched one's tensors."""
    try:
        expected = visible(run(rules, state_of(before), torch))
    except RuleError as error:
        return _impossible(f"the rules do not fit the untouched model: {error}")
    return compare_states(expected, state_of(after), derived_names(before) | derived_names(after))


def check_round_trip(before: nn.Module, after: nn.Module, rules: Rule) -> WeightReport:
    """Whether the inverse rules make the untouched model's tensors of the edited one's.

    What the rules put aside (dropped rows, the wide original of a cast) is taken from the untouched model.
    """
    original = state_of(before)
    try:
        mapped = run(rules, original, torch)
    except RuleError as error:
        return _impossible(f"the rules do not fit the untouched model: {error}")
    present = state_of(after)
    aside = {name: tensor for name, tensor in mapped.items() if name.startswith(KEPT)}
    names = align(visible(mapped), present)
    try:
        back = visible(run(invert(rules), {name: present[other] for name, other in names.items()} | aside, torch))
    except RuleError as error:
        return _impossible(f"the inverse rules do not fit the edited model: {error}")
    return compare_states(original, back, derived_names(before) | derived_names(after))


def _impossible(error: str) -> WeightReport:
    return WeightReport(0, (), (), (), float("inf"), error)
