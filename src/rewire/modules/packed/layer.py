"""The wrapped forward of one encoder layer: packed where it can be, else untouched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rewire.modules.packed.attend import MASKS, Visit, argument_names
from rewire.modules.packed.capture import any_watched, is_traced, recorded
from rewire.modules.packed.linear import Prepared, prepare
from rewire.modules.packed.padding import Packing, Sight, Unpackable, packing_of, read_mask
from rewire.modules.packed.recipe import LayerFacts, Recipe
from rewire.modules.packed.run import Broken, PackedStack, Run, Wrapped


class LayerForward(Wrapped):
    """The forward of one layer.

    Attributes:
        attentions: the modules inside whose forwards are wrapped.
        kinds: the classes of the modules inside by their paths, as they were tried out.
        facts: where the layer has its parts, if it may run by the recipe.
        config: what the layer's model is configured by, for `output_attentions`.
        causal: whether a position sees those before it alone when no mask is given.
    """

    def __init__(
        self,
        module: nn.Module,
        stack: PackedStack,
        attentions: Iterable[nn.Module],
        facts: LayerFacts | None,
        config: Any,
    ) -> None:
        super().__init__(module, stack)
        self.attentions, self.facts, self.config = list(attentions), facts, config
        self.kinds = {path: type(inner) for path, inner in module.named_modules()}
        self.causal = any(getattr(inner, "is_causal", False) is True for inner in module.modules())
        self._recipe: Recipe | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recipe": None}  # it knows the layer's modules, which a copy has its own of

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_traced():
            return self.own(*args, **kwargs)
        if self.stack.facts.in_place:
            return self._in_place(args, kwargs)
        run = self.stack.runs.now
        names = argument_names(type(self.module).forward)
        named = dict(zip(names, args, strict=False)) | kwargs
        hidden = named.get(names[0])
        if run is not None and run.sent is not None and hidden is not run.sent:
            raise Broken
        try:
            if len(args) > len(names):
                raise Unpackable("more arguments are given than have names")
            return self._packed(run, hidden, named)
        except Unpackable as reason:
            self.stack.visits.now = None
            if run is not None and run.sent is not None:
                raise Broken from None
            self.stack.note(f"untouched: {reason}")
            if run is not None:
                run.called += 1
            return self.own(*args, **kwargs)

    def _in_place(self, args: Any, kwargs: Any) -> Any:
        hidden = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        fast = hidden is not None and self._is_fast(hidden)
        self.stack.note("in place" if fast else "untouched: gradients or another type are wanted")
        with _FastProducts(self.stack) if fast else contextlib.nullcontext():
            return self.own(*args, **kwargs)

    def _packed(self, run: Run | None, hidden: Any, named: dict[str, Any]) -> Any:
        self._check_request(named)
        if run is None:
            run = Run()
            last = True
        else:
            last = run.called + 1 >= self.stack.layers
        visit = self._visit(run, hidden, named)
        x = hidden if run.sent is not None else self._pack(visit.packing, hidden)
        answer = self._answer(run, visit, x, named)
        run.called += 1
        return self._pass_on(run, visit.packing, answer, last)

    def _check_request(self, named: Mapping[str, Any]) -> None:
        """Raises `Unpackable` where the call wants what packed layers cannot give."""
        if named.get("output_attentions") or "attentions" in recorded() or self._config_wants_attentions():
            raise Unpackable("attention weights are asked for")
        for name in ("encoder_hidden_states", "past_key_values", "past_key_value", "head_mask", "layer_head_mask"):
            if named.get(name) is not None:
                raise Unpackable(f"{name} is given")

    def _config_wants_attentions(self) -> bool:
        return getattr(self.config, "output_attentions", False) is True

    def _visit(self, run: Run, hidden: Any, named: dict[str, Any]) -> Visit:
        """Finds out about the mask, and which tokens are real."""
        mask = named.get(_mask_name(named) or "")
        packing = run.packing
        if packing is None or run.sent is None:
            batch, width = self._shape(hidden)
            sight = _seen_once(run, mask, batch, width, self.stack.facts.inverted)
            packing = packing_of(sight.keep, batch, width, hidden.device)
            if packing.index is not None and (self.stack.original_padding or self.stack.facts.reads_padding):
                raise Unpackable("padded positions are to hold the original's values")
        else:
            sight = _seen_once(run, mask, packing.batch, packing.width, self.stack.facts.inverted)
            self._check_same(run, mask, sight, packing)
        run.packing = packing
        causal = sight.causal or (mask is None and (self.causal or named.get("is_causal") is True))
        return Visit(packing, sight.window, causal, self._is_fast(hidden))

    def _check_same(self, run: Run, mask: Tensor | None, sight: Sight, packing: Packing) -> None:
        """All layers of a run must mean the same tokens."""
        key = -id(mask)
        if key not in run.seen:
            other = packing_of(sight.keep, packing.batch, packing.width, packing.starts.device)
            run.seen[key] = (mask, packing.same_tokens(other))
        if not run.seen[key][1]:
            raise Broken

    def _shape(self, hidden: Any) -> tuple[int, int]:
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or not hidden.is_floating_point() or hidden.is_meta:
            raise Unpackable("hidden states are not [batch, positions, width]")
        if hidden.device.type != "cpu":
            raise Unpackable(f"hidden states are on a {hidden.device.type} device, and packing is for CPUs")
        first, second, _ = hidden.shape
        batch, width = (second, first) if self.stack.facts.sequence_first else (first, second)
        if batch == 0 or width == 0:
            raise Unpackable("the batch is empty")
        return batch, width

    def _is_fast(self, hidden: Tensor) -> bool:
        if self.module.training or not self.stack.options.prepare:
            return False
        if torch.is_autocast_enabled(hidden.device.type):
            return False
        if not torch.is_grad_enabled():
            return True
        return not (hidden.requires_grad or any(p.requires_grad for p in self.module.parameters()))

    def _pack(self, packing: Packing, hidden: Tensor) -> Tensor:
        if self.stack.facts.sequence_first:
            return packing.pack(hidden.transpose(0, 1))[:, None]
        return packing.pack(hidden)[None]

    def _unpack(self, packing: Packing, x: Tensor) -> Tensor:
        if self.stack.facts.sequence_first:
            return packing.unpack(x[:, 0]).transpose(0, 1)
        return packing.unpack(x[0])

    def _answer(self, run: Run, visit: Visit, x: Tensor, named: dict[str, Any]) -> Any:
        recipe = self._usable_recipe() if visit.fast and self.facts is not None else None
        if recipe is not None:
            assert self.facts is not None
            flat = x.reshape(-1, x.shape[-1])
            y = recipe(flat, visit, self.stack.weights, self.stack.options, named.get("position_bias"))
            self.stack.note("recipe")
            return _as_answer(y.view(x.shape), self.facts.answer)
        self._check_inside()
        answer = self._own_packed(run, visit, x, named)
        self.stack.note("own layer")
        return answer

    def _check_inside(self) -> None:
        """Raises `Unpackable` where the layer's code would not run as it was tried out."""
        inside = dict(self.module.named_modules())
        del inside[""]
        if any_watched(inside.values()):
            raise Unpackable("something listens inside the layer")
        if not {id(module) for module in inside.values()} >= {id(module) for module in self.attentions}:
            raise Unpackable("its attention was replaced")
        for path, module in inside.items():
            if type(module) is not self.kinds.get(path) and not is_known_change(path, inside):
                raise Unpackable(f"{path} is a {type(module).__name__}, which was not tried out")

    def _own_packed(self, run: Run, visit: Visit, x: Tensor, named: Mapping[str, Any]) -> Any:
        names = argument_names(type(self.module).forward)
        mask = _mask_name(named)
        replaced = {names[0]: x} | ({mask: None} if mask else {})
        others = {name: value for name, value in named.items() if name not in replaced}
        packed = {name: _packed_argument(run, visit.packing, name, value) for name, value in others.items()} | replaced
        if named.get("position_bias") is None and "position_bias" in names:
            packed["position_bias"] = _computed_bias(self.module, visit.packing.width, x)
        own, checkpoint = _own_forward(self.module)

        def run_packed(tokens: Tensor) -> Any:
            self.stack.visits.now = visit
            try:
                with _FastProducts(self.stack) if visit.fast else contextlib.nullcontext():
                    return own(self.module, **(packed | {names[0]: tokens}))
            finally:
                self.stack.visits.now = None

        return run_packed(x) if checkpoint is None else checkpoint(run_packed, x)

    def _usable_recipe(self) -> Recipe | None:
        assert self.facts is not None
        if self._recipe is None or not self._recipe.holds():
            if not Recipe.fits(self.module, self.facts, self.kinds):
                return None
            self._recipe = Recipe(self.module, self.facts)
        return None if any_watched(self._recipe.inside) else self._recipe

    def _pass_on(self, run: Run, packing: Packing, answer: Any, last: bool) -> Any:
        out = answer[0] if isinstance(answer, tuple) else answer
        if not isinstance(out, Tensor):
            raise Unpackable("the layer answers with no hidden states")
        run.sent = None if last else out
        if not last:
            return answer
        dense = self._unpack(packing, out)
        return (dense, *answer[1:]) if isinstance(answer, tuple) else dense


def _mask_name(named: Mapping[str, Any]) -> str | None:
    """Under which name a layer is given its mask."""
    return next((name for name in MASKS if name in named), None)


_KNOWN = ("rewire.", "peft.")


def is_known_change(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether Rewire or peft put the module at `path` there, or one around it: these treat tokens one by one."""
    while path:
        if type(modules[path]).__module__.startswith(_KNOWN):
            return True
        path = path.rpartition(".")[0]
    return False


def _own_forward(layer: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """The layer's code, and what it is to be called through so that activations are computed again going back.

    Where the class's forward sees to the latter itself, the code within it is called: computing again has to happen
    with the tokens packed, as the first time.
    """
    forward: Any = type(layer).forward
    checkpoints = layer.training and getattr(layer, "gradient_checkpointing", False)
    if not checkpoints or _CHECKPOINT not in getattr(forward, "__code__", _own_forward.__code__).co_names:
        return forward, None
    return forward.__wrapped__, getattr(layer, _CHECKPOINT)


_CHECKPOINT = "_gradient_checkpointing_func"


def _as_answer(x: Tensor, length: int) -> Any:
    return (x, *(None,) * (length - 1)) if length else x


def _seen_once(run: Run, mask: Any, batch: int, width: int, inverted: bool) -> Sight:
    """What a mask says, read once per run."""
    if not isinstance(mask, Tensor | None):
        raise Unpackable(f"the mask is a {type(mask).__name__}")
    if id(mask) not in run.seen:
        run.seen[id(mask)] = (mask, read_mask(mask, batch, width, inverted=inverted))
    found: Sight = run.seen[id(mask)][1]
    return found


def _packed_argument(run: Run, packing: Packing, name: str, value: Any) -> Any:
    """What a layer is given besides hidden states, for the real positions alone."""
    if isinstance(value, tuple | list):
        return tuple(_packed_argument(run, packing, name, part) for part in value)
    if not isinstance(value, Tensor) or name == "position_bias":
        return value
    if id(value) not in run.seen:
        run.seen[id(value)] = (value, _packed_tensor(packing, name, value))
    return run.seen[id(value)][1]


def _packed_tensor(packing: Packing, name: str, value: Tensor) -> Tensor:
    shape, width = value.shape, packing.width
    of_rows = value.ndim >= 2 and shape[0] in (1, packing.batch)
    if of_rows and shape[1] == width:  # [batch, positions, …]
        return packing.pack(value)[None]
    if of_rows and value.ndim == 4 and shape[1] == 1 and shape[2] == width:  # [batch, 1, positions, …]
        return packing.pack(value[:, 0])[None, None]
    if value.ndim >= 2 and shape[0] == width:  # [positions, …]
        return packing.pack(value[None])
    if width in shape:
        raise Unpackable(f"{name} of shape {tuple(shape)} is not understood")
    return value


def _computed_bias(layer: nn.Module, width: int, x: Tensor) -> Tensor | None:
    """The position bias that the first layer of a T5 computes for itself: for the row, not for all tokens."""
    for module in layer.modules():
        if getattr(module, "has_relative_attention_bias", False) and hasattr(module, "compute_bias"):
            bias: Tensor = module.compute_bias(width, width, device=x.device)  # type: ignore[operator]
            return bias
    return None


class _FastProducts(TorchFunctionMode):
    """While a layer's own code runs: its linear layers use prepared weights, wherever in it they stand."""

    def __init__(self, stack: PackedStack) -> None:
        super().__init__()
        self.stack = stack

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.linear or kwargs or len(args) < 2 or not isinstance(args[1], nn.Parameter):
            return func(*args, **(kwargs or {}))
        x, weight, bias = (*args, None)[:3]
        if x.dtype != weight.dtype or weight.ndim != 2:
            return func(*args)
        ready = self._ready(weight, bias)
        return ready(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def _ready(self, weight: Tensor, bias: Tensor | None) -> Prepared:
        options = self.stack.options
        return self.stack.weights.get(
            ("linear", id(weight)),
            (weight, bias),
            lambda: prepare(
                weight.detach(), None if bias is None else bias.detach(), dtype=options.dtype, int8=options.int8
            ),
        )
