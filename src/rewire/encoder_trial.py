"""A stack of encoder layers, tried on a small copy of its model: does it give packed what it gives padded?

The copy is built from the model's own class and a shrunk configuration, with strong random weights in double
precision, so that attention is far from uniform and any mistake is larger than rounding. Its layers are called as the
model calls them, with batches padded in several ways, by their own code and packed. A record of the layer's parts is
used if the layer then gives the same numbers; whether tokens may stay packed between the layers shows in the outputs of
the whole copy. A class that gives other numbers is refused.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rewire.encoder_table import LAYERS
from rewire.encoders import EncoderStack, attention_facts, stack_facts
from rewire.module_tree import submodule
from rewire.modules.packed import (
    LayerFacts,
    Options,
    PackedStack,
    StackFacts,
    Unpackable,
    fused_activation,
    unwrap,
    wrap,
)
from rewire.modules.packed.attend import MASKS, argument_names, head_count
from rewire.probe import ATTEMPTS, Attempt, example_inputs, hosts, tiny_copy

_SEED = 7
_ROWS = 3
_LENGTH = 6
_SAME = 1e-7
"""Largest difference, relative to the scale of what is compared, in double precision."""

_SAME_SINGLE = 1e-4
"""The same in single precision, where a model knows no other."""


@dataclass(frozen=True)
class Tried:
    """What a trial showed.

    Attributes:
        facts: what is particular about the stack.
        layer: where the layers have their parts, where they may run by the recipe.
        record: the name of that record.
        patterns: the kinds of padding that ran packed.
    """

    facts: StackFacts
    layer: LayerFacts | None
    record: str | None
    patterns: tuple[str, ...]

    @property
    def how(self) -> str:
        """How the layers run, for people."""
        if self.facts.in_place:
            return "their own code on the whole batch, weights prepared"
        way = f"recipe {self.record}" if self.record else "their own code, attention packed"
        way = way if self.facts.chains else f"{way}, packed layer by layer"
        return f"{way}; untouched where there is padding, which the model reads" if self.facts.reads_padding else way


def try_out(model: nn.Module, stack: EncoderStack) -> Tried | str:
    """Tries a stack out; the reason why it cannot be packed otherwise. The model itself is not run.

    `model` may be on meta.
    """
    facts = stack_facts(submodule(model, stack.owner))
    if facts.in_place:  # its own code as ever: there is nothing to try
        return Tried(facts, None, None, ())
    reasons: list[str] = []
    for host, inside in _hosts(model, stack):
        found = _try_once(_Question(host, inside))
        if isinstance(found, Tried):
            return found
        reasons.append(found)
    telling = [reason for reason in reasons if not reason.startswith(_UNTRIED)]
    return [*telling, *reversed(reasons), "cannot be tried out: no model with a configuration stands around it"][0]


_UNTRIED = "cannot be tried out on a small copy"


def _hosts(model: nn.Module, stack: EncoderStack) -> Iterator[tuple[nn.Module, EncoderStack]]:
    """The models around a stack that can be built again, nearest first, and the stack as it is called in each."""
    for host, below in hosts(model, stack.layers[0]):
        prefix = stack.layers[0].removesuffix(below)
        if stack.owner.startswith(prefix) or f"{stack.owner}." == prefix:
            yield host, _below(stack, prefix)


def _below(stack: EncoderStack, prefix: str) -> EncoderStack:
    cut: Callable[[str], str] = lambda path: path.removeprefix(prefix) if f"{path}." != prefix else ""  # noqa: E731
    return replace(stack, path=cut(stack.path), owner=cut(stack.owner), layers=tuple(map(cut, stack.layers)))


class _Question:
    """A stack in a model. Equal for equal places of equally configured models."""

    def __init__(self, host: Any, stack: EncoderStack) -> None:
        self.host, self.stack = weakref.ref(host), stack
        first = submodule(host, stack.layers[0])
        self.classes = {path: type(module) for path, module in first.named_modules()}
        self.key = (type(host), repr(host.config), stack, tuple(self.classes.items()))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Question) and self.key == other.key


@functools.lru_cache(maxsize=128)
def _try_once(question: _Question) -> Tried | str:
    host: Any = question.host()
    reason = ""
    for attempt in ATTEMPTS:
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
                torch.manual_seed(_SEED)
                return _Bench(host, question, attempt).tried()
        except _Other as other:
            return str(other)
        except Exception as error:  # foreign code, run on a configuration that it may never have seen
            first_line = str(error).strip().partition("\n")[0]
            reason = reason or f"{type(host).__name__}: {type(error).__name__}: {first_line}"
    return f"{_UNTRIED}: {reason}"


class _Other(Exception):
    """The trial ran, and the stack cannot be packed."""


@dataclass(frozen=True)
class _Call:
    """How the model called a layer, and what that answered."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    answer: Any

    @property
    def hidden(self) -> Tensor:
        found: Tensor = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return found


def _plain_call(layer: nn.Module) -> _Call:
    """A call with hidden states alone, for a layer that the model cannot be made to call."""
    like = next(p for p in layer.parameters() if p.ndim >= 2)
    hidden = torch.randn(1, _LENGTH, _width(layer), dtype=like.dtype)
    given = dict.fromkeys(name for name in MASKS if name in argument_names(type(layer).forward))
    return _Call(layer, (hidden,), dict(given), layer(hidden, **given))


class _Bench:
    """A small copy with one stack, called once to see how."""

    def __init__(self, host: Any, question: _Question, attempt: Attempt) -> None:
        stack = question.stack
        width = _width(submodule(host, stack.layers[0]))
        self.tiny = tiny_copy(host, 3, width, attempt)
        self.same = _SAME if attempt.dtype == torch.float64 else _SAME_SINGLE
        self.owner = submodule(self.tiny, stack.owner)
        self.layers = [submodule(self.tiny, path) for path in stack.layers if _has(self.tiny, path)]
        self.attentions = [[self._attention(layer, path) for path in stack.attentions] for layer in self.layers]
        self.facts = stack_facts(self.owner)
        _check_classes(self.layers[0], question.classes)
        self.inputs, self.calls = self._called()

    def _called(self) -> tuple[dict[str, Tensor], list[_Call]]:
        """Inputs and the calls that the model then makes; no inputs where none are known, and calls of our own."""
        try:
            inputs = example_inputs(self.tiny)
            return inputs, self._watch(inputs)
        except Exception:  # it wants something that is not known
            return {}, [_plain_call(layer) for layer in self.layers]

    def _attention(self, layer: nn.Module, path: str) -> tuple[nn.Module, Any]:
        module = submodule(layer, path)
        return module, attention_facts(module)

    def _watch(self, inputs: Mapping[str, Tensor]) -> list[_Call]:
        calls: list[_Call] = []

        def note(layer: nn.Module, args: Any, kwargs: Any, answer: Any) -> None:
            calls.append(_Call(layer, args, kwargs, answer))

        handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in set(self.layers)]
        try:
            self.tiny(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        if not calls:
            raise ValueError(f"{type(self.owner).__name__} called none of its layers")
        return calls

    def tried(self) -> Tried:
        """The result. Raises `_Other`."""
        record, facts = next(self._records(), (None, None))
        patterns = self._compare_layers(facts)
        if not self.inputs:
            return Tried(replace(self.facts, chains=False), facts, record, patterns)
        chains = self.facts.chains and self._whole(facts, replace(self.facts, chains=True))
        found = replace(self.facts, chains=chains)
        if not chains and not self._whole(facts, found):
            raise _Other("the outputs of a small copy differ when its layers run packed")
        return Tried(replace(found, reads_padding=self._reads_padding(facts, found)), facts, record, patterns)

    def _reads_padding(self, facts: LayerFacts | None, of: StackFacts) -> bool:
        """Whether the model makes something of positions padded on the right (SigLIP's text pools the last one)."""
        ids = self.inputs.get("input_ids")
        names = inspect.signature(self.tiny.forward).parameters
        if ids is None or ids.ndim != 2 or "attention_mask" not in names or "decoder_input_ids" in names:
            return False
        length = ids.shape[1]
        keep = torch.arange(length)[None] < torch.tensor([length, length - 2])[:, None]
        inputs = {name: _doubled(value) for name, value in self.inputs.items()} | {"attention_mask": keep.long()}
        wanted = self._outputs(inputs)
        wrapped = self._wrap(self._stack(facts, of), facts)
        try:
            given = self._outputs(inputs)
        finally:
            unwrap(wrapped)
        apart = [length not in one.shape for one in wanted]  # outputs without a place for every position
        wanted, given = (
            [one for one, is_apart in zip(all_, apart, strict=True) if is_apart] for all_ in (wanted, given)
        )
        return not _alike(wanted, given, self.same)

    def _records(self) -> Iterator[tuple[str, LayerFacts]]:
        """The records that the layers bear out."""
        names = [{path for path, _ in layer.named_modules()} for layer in self.layers]
        for name, record in LAYERS.items():
            paths = {record.attention, *record.linears, *record.norms, record.act}
            if all(paths <= known for known in names):
                for facts in self._variants(record):
                    if self._fits(facts):
                        yield name, facts

    def _variants(self, record: LayerFacts) -> Iterator[LayerFacts]:
        answer = self.calls[0].answer
        length = len(answer) if isinstance(answer, tuple) else 0
        activation = fused_activation(submodule(self.layers[0], record.act))
        for first in (False, True):
            yield replace(record, first=first, activation=activation, answer=length)

    def _fits(self, facts: LayerFacts) -> bool:
        try:
            self._compare_layers(facts, "recipe")
        except Exception:  # the record is of another make
            return False
        return True

    def _compare_layers(self, facts: LayerFacts | None, way: str = "") -> tuple[str, ...]:
        """Runs every layer with every pattern, untouched and packed; the patterns that ran packed.

        Raises `_Other` where numbers differ, or none ran packed. `way`: the path that each must have taken.
        """
        ran: dict[str, None] = {}
        reasons: list[str] = []
        for call in self._distinct_calls():
            for pattern in _patterns(call, self.facts):
                stack = self._stack(facts, replace(self.facts, chains=False))
                pattern = pattern.in_form()
                wanted = pattern.run()
                wrapped = self._wrap(stack, facts)
                try:
                    given = pattern.run()
                finally:
                    unwrap(wrapped)
                untouched = [path for path in stack.paths if path.startswith("untouched: ")]
                reasons += [path.removeprefix("untouched: ") for path in untouched]
                if way and set(stack.paths) != {way} and not untouched:
                    raise _Other(f"ran by {', '.join(stack.paths)}")
                difference = pattern.difference(wanted, given)
                if not difference <= self.same:
                    raise _Other(
                        f"a small {type(call.layer).__name__} with {pattern.name} gives other numbers packed "
                        f"(difference {difference:.1e} of their scale, allowed {self.same:.0e}): something in it mixes "
                        "positions besides attention, or goes by their numbers"
                    )
                ran |= {} if untouched else {pattern.name: None}
        if not ran:
            raise _Other(f"its layers cannot run packed: {reasons[0]}")
        return tuple(ran)

    def _distinct_calls(self) -> list[_Call]:
        """The first call of every layer."""
        found: dict[int, _Call] = {}
        for call in self.calls:
            found.setdefault(id(call.layer), call)
        return list(found.values())

    def _stack(self, facts: LayerFacts | None, of: StackFacts) -> PackedStack:
        return PackedStack(of, Options(), original_padding=False, layers=len(self.layers))

    def _wrap(self, stack: PackedStack, facts: LayerFacts | None) -> tuple[nn.Module, ...]:
        config = getattr(self.tiny, "config", None)
        return wrap(self.owner, self.layers, self.attentions, stack, facts, config)

    def _whole(self, facts: LayerFacts | None, of: StackFacts) -> bool:
        """Whether the whole copy gives the same for a batch of two with its layers packed."""
        inputs = {name: _doubled(value) for name, value in self.inputs.items()}
        wanted = self._outputs(inputs)
        stack = self._stack(facts, of)
        wrapped = self._wrap(stack, facts)
        try:
            runs = [self._outputs(inputs) for _ in range(2)]  # the first counts the layers
        except Exception:
            return False
        finally:
            unwrap(wrapped)
        if stack.facts.chains and not stack.chained:
            return False
        return all(_alike(wanted, given, self.same) for given in runs)

    def _outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        torch.manual_seed(_SEED)  # some draw what they mask
        return _tensors(self.tiny(**inputs))


def _has(model: nn.Module, path: str) -> bool:
    try:
        submodule(model, path)
    except KeyError:
        return False
    return True


def _width(layer: nn.Module) -> int:
    """The width of the hidden states: that of the layer's norms, else of its first linear's input."""
    for module in layer.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 1:
            return len(weight)
    return next(int(p.shape[-1]) for p in layer.parameters() if p.ndim == 2)


_OURS = re.compile(r"rewire\.|peft\.")


def _check_classes(tiny: nn.Module, classes: Mapping[str, type]) -> None:
    """Raises `_Other` where the model has other modules in its layers than its class builds."""
    built = {path: type(module) for path, module in tiny.named_modules()}
    for path, kind in classes.items():
        near = built.get(path)
        if kind is near or _OURS.match(kind.__module__):
            continue
        if any(_OURS.match(classes[above].__module__) for above in _above(path) if above in classes):
            continue
        stands = near.__name__ if near else "nothing"
        raise _Other(f"{path} is a {kind.__name__} where the class builds {stands}; pack first, then replace")


def _above(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


# ---------------------------------------------------------------- batches with padding


@dataclass(frozen=True)
class _Pattern:
    """A layer called with a batch of random hidden states, padded in one way.

    Attributes:
        name: of the kind of padding.
        call: what to call, and with what else.
        keep: the real positions, bool `[rows, positions]`.
        mask: under which number and name the mask goes; None: the layer takes none.
        facts: of the stack.
        form: how many heads and queries the mask is made for.
    """

    name: str
    call: _Call
    keep: Tensor
    mask: Any
    facts: StackFacts
    form: tuple[int, int] = (1, 1)

    def run(self) -> Tensor:
        """`[rows, positions, width]` out of the layer."""
        generator = torch.Generator().manual_seed(_SEED)
        rows, length = self.keep.shape
        like = self.call.hidden
        hidden = torch.randn(rows, length, like.shape[-1], generator=generator, dtype=like.dtype)
        hidden = hidden.transpose(0, 1) if self.facts.sequence_first else hidden
        args, kwargs = list(self.call.args), dict(self.call.kwargs)
        _put(args, kwargs, 0, next(iter(kwargs), ""), hidden)
        if self.mask is not None:
            number, name = self.mask
            _put(args, kwargs, number, name, self._mask(_get(args, kwargs, number, name)))
        answer = self.call.layer(*copy.copy(args), **kwargs)
        out: Tensor = answer[0] if isinstance(answer, tuple) else answer
        return out.transpose(0, 1) if self.facts.sequence_first else out

    def in_form(self) -> _Pattern:
        """The same with a mask of the form that the layer's own code takes."""
        for heads, queries in ((1, self.keep.shape[1]), (1, 1), (_heads(self.call.layer), 1)):
            found = replace(self, form=(heads, queries))
            try:
                found.run()
            except (ValueError, RuntimeError):  # of another shape
                continue
            return found
        return self

    def _mask(self, given: Any) -> Tensor | None:
        if self.facts.inverted:
            return ~self.keep
        if bool(self.keep.all()) and not isinstance(given, Tensor):
            return None
        added = torch.zeros(self.keep.shape, dtype=self.call.hidden.dtype)
        added = added.masked_fill(~self.keep, torch.finfo(added.dtype).min)[:, None, None, :]
        added = added.expand(-1, self.form[0], self.form[1], -1)
        if isinstance(given, Tensor) and given.ndim == 4 and given.dtype == torch.bool:
            return (added == 0) & given
        if isinstance(given, Tensor) and given.ndim == 4:
            return torch.minimum(added, given.expand(len(self.keep), *given.shape[1:]))
        return added

    def difference(self, wanted: Tensor, given: Tensor) -> float:
        """The largest at real positions, relative to the scale of what is wanted there."""
        if given.shape != wanted.shape:
            return float("inf")
        wanted, given = wanted[self.keep], given[self.keep]
        return float((wanted - given).abs().max() / wanted.abs().max().clamp_min(1e-6))


def _heads(layer: nn.Module) -> int:
    """How many heads the first attention in a layer has; 1 where none says so."""
    for module in layer.modules():
        try:
            return head_count(module)
        except Unpackable:
            continue
    return 1


def _get(args: Sequence[Any], kwargs: Mapping[str, Any], number: int, name: str) -> Any:
    return args[number] if number < len(args) else kwargs.get(name)


def _put(args: list[Any], kwargs: dict[str, Any], number: int, name: str, value: Any) -> None:
    if number < len(args):
        args[number] = value
    else:
        kwargs[name] = value


def _patterns(call: _Call, facts: StackFacts) -> Iterator[_Pattern]:
    length = call.hidden.shape[0 if facts.sequence_first else 1]
    names = argument_names(type(call.layer).forward)
    number, name = next(((names.index(n), n) for n in MASKS if n in names), (0, ""))
    mask = (number, name) if name else None
    whole = torch.ones(_ROWS, length, dtype=torch.bool)
    yield _Pattern("no padding", call, whole, mask, facts)
    if mask is None or length < 4:
        return
    places = torch.arange(length)
    right = places[None, :] < torch.tensor([length, 2, length - 1])[:, None]
    yield _Pattern("padding on the right", call, right, mask, facts)
    yield _Pattern("padding on the left", call, right.flip(1), mask, facts)
    holes = whole.clone()
    holes[1, 1], holes[2, 2] = False, False
    yield _Pattern("holes", call, holes, mask, facts)


def _doubled(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != 1:
        return value
    other = value.flip(-1) if value.dtype == torch.int64 else value * 0.7 + 0.1
    return torch.cat([value, other])


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _alike(wanted: Sequence[Tensor], given: Sequence[Tensor], same: float) -> bool:
    if [t.shape for t in wanted] != [t.shape for t in given]:
        return False
    for one, other in zip(wanted, given, strict=True):
        scale = one.abs().max().clamp_min(1e-6) if one.is_floating_point() and one.numel() else 1
        if one.numel() and not bool((one.double() - other.double()).abs().max() <= same * 10 * scale):
            return False
    return True
