"""Which rows of a fused linear are queries, keys, values, gates: found by trying, without knowing the code.

A tiny copy of the model is built from its own class and a shrunk copy of its configuration (same numbers of
heads, but small heads, few layers, few tokens), filled with seeded random weights, and run on the CPU. There
the output of the fused linear is replaced by numbers of our own, and the gradient of its owner's output with
respect to them shows what each row does:

- **value**: attention weights sum to one, so the same amount added at every position adds a fixed amount to
  the output, whatever queries and keys are;
- **query**: acts on its own position alone;
- **key**: acts from other positions too, and is not a value;
- where no row acts beyond its own position there is no attention, but an MLP: an **up** row enters the output
  linearly, a **gate** row does not.

The answer counts only if the roles repeat in equal groups, each role once in each. Everything else, and every
error on the way, makes the probe say that it does not know.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

MAX_SECONDS = 20.0
MAX_PARAMETERS = 40_000_000
MAX_VALUES = 3_000_000  # rows times positions

_SEED = 20_240_229
_HEAD = 8  # size of a small head: even, for rotary positions, and more than the rows of one part in a pattern
_TOKENS = 6
_SAMPLES = 4_000  # of sound: a dozen frames
_VOCABULARY = 64
_DRAWS = 4  # how often everything is drawn anew
_VIEWS = 6  # output positions that are looked at
_ZERO = 1e-7  # of the largest gradient: less is no influence (some models compute scores in single precision)
_SAME = 1e-4  # relative difference up to which two numbers are the same
_OTHER = 1e-2  # from which on they differ; in between the probe does not know


@dataclass(frozen=True)
class Probed:
    """Roles in the order of the rows, rows of each over all groups, and the number of groups."""

    roles: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int


def probe_rows(model: nn.Module, path: str, owner: str, rows: int) -> Probed | str:
    """What the `rows` rows of the fused linear at `path` do in the forward of `owner`, or why that is unknown.

    The model itself is not run and no value of it is touched; it may be on `meta`.
    """
    reasons: list[str] = []
    for host, inside in hosts(model, owner):
        found = _probe_once(_Question(host, inside, path.removeprefix(f"{owner}."), rows))
        if isinstance(found, Probed):
            return found
        reasons.append(found)
    return [*reasons, "probe could not run: no model with a configuration stands around it"][0]


class _Question:
    """A place in a model. Equal for equal places of equally configured models: layers, copies."""

    def __init__(self, host: nn.Module, owner: str, leaf: str, rows: int) -> None:
        fused = host.get_submodule(owner).get_submodule(leaf)
        assert isinstance(fused.weight, Tensor)
        self.host = weakref.ref(host)  # the cache must not keep a model alive
        self.owner, self.leaf, self.rows = owner, leaf, rows
        self.width = fused.weight.numel() // rows  # of the input, whichever way round the weight stands
        self.pattern = re.sub(r"\d+", r"\\d+", re.escape(owner))
        self.alike = _alike(host.get_submodule(owner), leaf)
        self.key = (type(host), repr(host.config), self.pattern, leaf, rows, self.width, self.alike)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Question) and self.key == other.key

    def twin(self, tiny: nn.Module) -> nn.Module:
        """The same in a small copy."""
        place, kind = self.first(), self.alike[0]
        module: Any = dict(tiny.named_modules()).get(place)
        if type(module) is not kind:
            raise ValueError(f"the small copy has no {kind.__name__} at {place}")
        found: nn.Module = module
        return found

    def first(self) -> str:
        """The first place in the host where the same stands: layers may differ from each other."""
        host = self.host()
        assert host is not None
        for path, module in host.named_modules():
            if re.fullmatch(self.pattern, path) and _alike(module, self.leaf) == self.alike:
                return str(path)
        return self.owner


def _alike(owner: nn.Module, leaf: str) -> tuple[Any, ...]:
    """Equal for owners of one class and the same numbers, whose fused linears have the same shape."""
    numbers = {
        name: value for name, value in vars(owner).items() if _is_int(value) and not re.search("idx|index", name)
    }
    fused: Any = owner.get_submodule(leaf) if leaf in dict(owner.named_modules()) else None
    return type(owner), tuple(numbers.items()), getattr(getattr(fused, "weight", None), "shape", None)


@functools.lru_cache(maxsize=256)
def _probe_once(question: _Question) -> Probed | str:
    end = time.monotonic() + MAX_SECONDS
    reason = ""
    for attempt in ATTEMPTS:
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
                bench = _Bench(_tiny_copy(question, attempt), question, end)
                return _scaled(_period(_roles(bench)), question.rows)
        except _Unclear as unclear:
            return f"probe: {unclear}"
        except Exception as error:  # foreign code, run on a configuration it may never have seen
            first_line = str(error).strip().partition("\n")[0]
            reason = reason or f"{type(question.host()).__name__}: {type(error).__name__}: {first_line}"
    return f"probe could not run: {reason}"


class _Unclear(Exception):
    """The probe ran and cannot tell."""


def hosts(model: nn.Module, owner: str) -> Iterator[tuple[nn.Module, str]]:
    """The models around `owner` that can be built from their configuration, nearest first; its path in each."""
    parts = owner.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:depth]))
        if hasattr(module, "config") and hasattr(module, "main_input_name"):
            yield module, ".".join(parts[depth:])


# ---------------------------------------------------------------- a tiny copy of the model


@dataclass(frozen=True)
class Attempt:
    """One way to make the copy. `attention`: its implementation, where not the model's own."""

    shrink: Callable[[Any, int, int], None]
    dtype: torch.dtype
    attention: str | None = None


def _tiny_copy(question: _Question, attempt: Attempt) -> nn.Module:
    host: Any = question.host()
    # As many layers as it takes to have one of this kind: they may alternate.
    layers = max([2, *(int(number) + 1 for number in re.findall(r"\d+", question.first()))])
    return tiny_copy(host, min(layers, 8), question.width, attempt)


def tiny_copy(host: Any, layers: int, width: int, attempt: Attempt) -> nn.Module:
    """A small model of the class of `host`, with strong random weights, after its configuration.

    Args:
        host: a model with a configuration; it is not run.
        layers: how many layers the copy has at most.
        width: the width of its hidden states, which a small copy's follow.
        attempt: how it is made small.

    Raises `ValueError` where it stays large, and whatever the model's own code raises.
    """
    config = copy.deepcopy(host.config)
    for part in _parts(config):
        attempt.shrink(part, layers, width)
    if attempt.attention is not None:
        config._attn_implementation = attempt.attention
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in type(host)(copy.deepcopy(config)).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"a copy with few layers still has {size:,} parameters")
    tiny: nn.Module = type(host)(config).to(attempt.dtype)
    tiny.eval()  # apart, since some models give nothing back
    generator = torch.Generator().manual_seed(_SEED)
    for parameter in tiny.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator, dtype=attempt.dtype)
            # Vectors (norms, scales, biases) scatter around one; matrices keep the size of what they map.
            parameter.data = 1 + 0.2 * noise if noise.ndim < 2 else noise * noise.shape[-1] ** -0.5
    return tiny.requires_grad_(False)


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and those within it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from _parts(value)


_LAYERS = re.compile(r"(n|num)_(\w+_)?layers?|(en|de)coder_layers|(\w+_)?depth")
_LIMITS: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"(\w+_)?vocab_size(_\w+)?"), _VOCABULARY),
    (re.compile(r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length"), 128),
    (re.compile(r"(n|num)_(\w+_)?experts"), 4),
    (re.compile(r"num_experts_per_tok|moe_top_?k|top_k"), 2),
    (re.compile(r"n_group|topk_group"), 1),
    (re.compile(r"num_frames"), 2),
    (re.compile(r"max_source_positions"), 32),
    (re.compile(r"\w+_token_(id|index)"), 1),
)


def _few_layers(config: Any, layers: int, width: int) -> None:
    """Fewer layers, tokens, experts and patches; what a layer looks like inside stays."""
    limits = ((_LAYERS, layers), *_LIMITS)
    values = {name: value for name, value in vars(config).items() if _is_int(value)}
    for name, value in values.items():
        limit = next((limit for pattern, limit in limits if pattern.fullmatch(name)), value)
        if value > limit:
            setattr(config, name, limit)
            if _LAYERS.fullmatch(name):
                _shorten_lists(config, value, limit)
    patch = values.get("patch_size", 0)
    for name in ("image_size", "input_size"):
        if patch and values.get(name, 0) > 4 * patch:
            setattr(config, name, 4 * patch)


def _shorten_lists(config: Any, before: int, after: int) -> None:
    """What is said per layer is said for the layers that are left."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(config, name, value[:after])


_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "embed_dim")
_HEAD_SIZE = re.compile(r"(?!\w*rope)(\w+_)?(head_dim|head_size|d_kv|kv_channels)")
_WIDTH = re.compile(r"(?!patch|image|vocab|input_size)(\w+_)?(size|dim|embd|d_model|d_kv)(_\w+)?")
_WIDE = re.compile(r"(\w+_)?(intermediate_size|ffn_dim|ffn_hidden_size|n_inner|mlp_dim|d_ff)(_\w+)?")


def _small_heads(config: Any, layers: int, width: int) -> None:
    """Few layers, and heads of a few rows: the number of heads stays, every width follows."""
    _few_layers(config, layers, width)
    values = {name: value for name, value in vars(config).items() if _is_int(value)}
    heads = next((values[name] for name in _HEADS if name in values), 0)
    # Heads of several sizes must keep their proportions.
    sizes = {value for name, value in values.items() if _HEAD_SIZE.fullmatch(name)}
    if not heads or width <= heads * _HEAD or len(sizes) > 1:
        return
    smaller = {width: heads * _HEAD, 4 * width: 4 * heads * _HEAD, values.get("head_dim", width // heads): _HEAD}
    for name, value in values.items():
        if _WIDE.fullmatch(name):
            setattr(config, name, min(value, 4 * _HEAD))
        elif name == "rotary_dim":
            setattr(config, name, min(value, _HEAD // 2))
        elif value > _HEAD and value in smaller and _WIDTH.fullmatch(name):
            setattr(config, name, smaller[value])


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


ATTEMPTS = (
    Attempt(_small_heads, torch.float64),
    Attempt(_small_heads, torch.float64, "eager"),
    Attempt(_small_heads, torch.float32, "eager"),
    Attempt(_few_layers, torch.float64),
    Attempt(_few_layers, torch.float64, "eager"),
    Attempt(_few_layers, torch.float32, "eager"),
)


# ---------------------------------------------------------------- running it


class _Done(Exception):
    """Raised out of the forward as soon as the owner has answered."""


class _Bench:
    """The owner's output as a function of the fused linear's."""

    def __init__(self, tiny: nn.Module, question: _Question, end: float) -> None:
        self.tiny, self.end = tiny, end
        self.generator = torch.Generator().manual_seed(_SEED)
        self.inputs = example_inputs(tiny)
        self.given: Tensor | None = None
        self.read: list[Tensor] = []
        self.seen: list[Tensor] = []
        self.kept: list[Tensor] = []
        owner = question.twin(tiny)
        owner.register_forward_pre_hook(self._loosen, with_kwargs=True)
        owner.register_forward_hook(self._keep)
        owner.get_submodule(question.leaf).register_forward_hook(self._replace)
        values, answer = self.run(None)
        self.shape, self.dtype, self.rows = values.shape, values.dtype, values.shape[-1]
        self.positions = values.numel() // self.rows
        self.weights = torch.randn(answer.shape[-1], generator=self.generator, dtype=answer.dtype)
        if self.positions < 2:
            raise ValueError("only one position to look at")
        if values.numel() > MAX_VALUES:
            raise ValueError(f"a small input still has {self.positions:,} positions")

    def _loosen(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Makes the owner's inputs variables of their own, for `mixes`."""

        def loose(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            self.read.append(value.detach().requires_grad_())
            return self.read[-1].clone()  # which the forward may change in place

        return tuple(map(loose, args)), {name: loose(value) for name, value in kwargs.items()}

    def _replace(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        values = output if self.given is None else self.given
        self.seen.append(values.detach().requires_grad_())
        return self.seen[-1].clone()  # which the forward may change in place

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.kept.extend(list(_tensors(output))[:1])
        raise _Done

    def run(self, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """(what the fused linear gave out, what the owner made of it)"""
        if time.monotonic() > self.end:
            raise _Unclear(f"it takes more than {MAX_SECONDS:.0f} s")
        self.given = given
        for kept in (self.read, self.seen, self.kept):
            kept.clear()
        with contextlib.suppress(_Done):
            self.tiny(**self.inputs)
        if len(self.seen) != 1 or len(self.kept) != 1:
            raise ValueError(f"the owner called the fused linear {len(self.seen)} times")
        return self.seen[0], self.kept[0]

    def random(self) -> Tensor:
        """Random values for the fused linear to give out."""
        return torch.randn(self.shape, generator=self.generator, dtype=self.dtype)

    def _views(self, answer: Tensor) -> list[Tensor]:
        """One number for each of some output positions."""
        outputs = answer.reshape(-1, answer.shape[-1])
        chosen = torch.linspace(0, len(outputs) - 1, min(_VIEWS, len(outputs))).long().tolist()
        return [(outputs[place] * self.weights).sum() for place in chosen]

    def gradients(self) -> Tensor:
        """[view, position, row]: how much each row at each position moves some output positions."""
        values, answer = self.run(self.random())
        slopes = [torch.autograd.grad(view, values, retain_graph=True)[0] for view in self._views(answer)]
        return torch.stack([slope.reshape(-1, self.rows) for slope in slopes])

    def mixes(self) -> bool:
        """Whether some output depends on more than one position of what the owner reads."""
        _, answer = self.run(self.random())
        for view in self._views(answer):
            slopes: Any = torch.autograd.grad(view, self.read, retain_graph=True, allow_unused=True)
            moved = [slope.reshape(-1, slope.shape[-1]).any(dim=-1) for slope in slopes if slope is not None]
            if any(int(positions.sum()) > 1 for positions in moved):
                return True
        return False


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)


# ---------------------------------------------------------------- inputs


def example_inputs(tiny: nn.Module, tokens: int = _TOKENS) -> dict[str, Tensor]:
    """Something that a model can be called with: its main input, and whatever else it demands.

    `tokens` is the length of a text. Raises `ValueError` where it wants something that is not known.
    """
    config: Any = tiny.config
    wanted = inspect.signature(tiny.forward).parameters
    names = [name for name, parameter in wanted.items() if _is_required(parameter)]
    names.append(str(tiny.main_input_name) if tiny.main_input_name in wanted else next(iter(wanted)))
    if getattr(config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    dtype = next(tiny.parameters()).dtype
    if any(name.endswith("grid_thw") for name in names):
        return _packed_patches(config, names, dtype)
    return {name: _input(name, config, dtype, tokens) for name in dict.fromkeys(names) if name in wanted}


def _is_required(parameter: inspect.Parameter) -> bool:
    named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return named and parameter.default is parameter.empty


def _input(name: str, config: Any, dtype: torch.dtype, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    if name.endswith("input_ids"):
        return torch.arange(2, 2 + tokens)[None] % getattr(config, "vocab_size", _VOCABULARY)
    if name == "pixel_values":
        size = _first(config, "image_size", "input_size")
        height, width = size if isinstance(size, list | tuple) else (size, size)
        frames = [config.num_frames] if hasattr(config, "num_frames") else []
        shape = (1, *frames, _channels(config), height, width)
        return torch.randn(shape, generator=generator, dtype=dtype)
    if name == "input_values" and not hasattr(config, "num_mel_bins"):
        return torch.randn((1, _SAMPLES), generator=generator, dtype=dtype)
    if name in ("input_values", "input_features"):
        length = 2 * getattr(config, "max_source_positions", _SAMPLES // 40)
        shape = (1, getattr(config, "max_length", length), config.num_mel_bins)
        wave = torch.randn(shape, generator=generator, dtype=dtype)
        return wave.mT if hasattr(config, "max_source_positions") and name == "input_features" else wave
    if name in ("inputs_embeds", "hidden_states"):
        return torch.randn((1, tokens, _first(config, *_HIDDEN)), generator=generator, dtype=dtype)
    raise ValueError(f"it wants {name}")


def _packed_patches(config: Any, names: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Images as one row of patches, with the grid they come from (the Qwen-VL kind)."""
    size = _channels(config) * config.patch_size**2 * getattr(config, "temporal_patch_size", 1)
    patches = torch.randn((16, size), generator=torch.Generator().manual_seed(_SEED), dtype=dtype)
    grid = torch.tensor([[1, 4, 4]])
    return {name: grid if name.endswith("grid_thw") else patches for name in names}


def _channels(config: Any) -> int:
    names = ("num_channels", "in_channels", "in_chans")
    return next((getattr(config, name) for name in names if _is_int(getattr(config, name, None))), 3)


def _first(config: Any, *names: str) -> Any:
    found = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)
    if found is None:
        raise ValueError(f"the configuration has none of {', '.join(names)}")
    return found


# ---------------------------------------------------------------- what each row does


def _roles(bench: _Bench) -> list[str]:
    """The role of every row."""
    slopes = torch.stack([bench.gradients() for _ in range(_DRAWS)])
    largest = slopes.abs().max().item()
    acts = (slopes.abs() > _ZERO * largest).any(dim=0)
    reach = acts.sum(dim=1).amax(dim=0)  # from how many positions a row moves one output
    if not bool(reach.all()):
        raise _Unclear(f"{int((reach == 0).sum())} of {len(reach)} rows do nothing")
    if int(reach.max()) == 1:
        return _gates(bench)
    values = _constant(slopes.sum(dim=2), _SAME * largest)
    names = {(True, True): "v", (False, True): "k", (False, False): "q"}
    pairs = list(zip(values.tolist(), (reach > 1).tolist(), strict=True))
    if (True, False) in pairs:
        raise _Unclear("some rows act like values, but on their own position alone")
    return [names[pair] for pair in pairs]


def _constant(totals: Tensor, nothing: float) -> Tensor:
    """Per row: whether [draw, view, row] is the same in every draw, and something can be seen at all.

    (Keys without positions add up to nothing: a softmax does not see what is added to all scores.)
    """
    size = totals.abs().amax(dim=0)
    apart = totals.amax(dim=0) - totals.amin(dim=0)
    visible = size > nothing
    differ = torch.where(visible, apart / size.clamp_min(nothing), 0.0).amax(dim=0)
    return (_decided(differ, _SAME, _OTHER) == 0) & visible.any(dim=0)


def _decided(measure: Tensor, low: float, high: float) -> Tensor:
    """0 below `low`, 1 above `high`; in between nobody knows."""
    between = (measure > low) & (measure < high)
    if bool(between.any()):
        raise _Unclear(f"{int(between.sum())} rows are neither one thing nor the other")
    return (measure >= high).long()


def _gates(bench: _Bench) -> list[str]:
    """Which half of the rows enters the output linearly (up) while the other (gate) does not."""
    if bench.mixes():
        raise _Unclear("its rows act on their own position alone, beside others that do not")
    half = bench.rows // 2
    for groups in (n for n in range(1, half + 1) if bench.rows % 2 == 0 and half % n == 0):
        for names in (("gate", "up"), ("up", "gate")):
            roles = [name for name in names for _ in range(half // groups)] * groups
            is_up = torch.tensor([role == "up" for role in roles])
            if not _bends(bench, is_up) and _bends(bench, ~is_up):
                return roles
    raise _Unclear("no half of its rows enters the output linearly, as the up rows of an MLP would")


def _bends(bench: _Bench, rows: Tensor) -> bool:
    """Whether the output is curved along a random direction in these rows."""
    middle, step = bench.random(), bench.random() * rows
    before, here, after = (bench.run(middle + by * step)[1].detach() for by in (-1, 0, 1))
    bend = (before + after - 2 * here).norm() / (after - before).norm().clamp_min(1e-30)
    return bool(_decided(bend, _SAME, _OTHER))


# ---------------------------------------------------------------- from rows to groups


def _period(roles: list[str]) -> Probed:
    """The groups in which the roles repeat.

    >>> _period(["q", "q", "k", "v", "q", "q", "k", "v"])
    Probed(roles=('q', 'k', 'v'), sizes=(4, 2, 2), groups=2)
    """
    rows = len(roles)
    length = next(n for n in range(1, rows + 1) if rows % n == 0 and roles == roles[:n] * (rows // n))
    runs = [(role, len(list(run))) for role, run in groupby(roles[:length])]
    names, groups = tuple(role for role, _ in runs), rows // length
    found = Probed(names, tuple(size * groups for _, size in runs), groups)
    kinds = set(names)
    if len(kinds) < len(names):
        raise _Unclear(f"the rows follow no pattern of groups ({', '.join(names[:8])}, …)")
    if kinds not in ({"q", "k", "v"}, {"k", "v"}, {"gate", "up"}):
        raise _Unclear(f"its rows hold nothing but {', '.join(sorted(kinds))}")
    if len(kinds) == 2 and len(set(found.sizes)) > 1:
        raise _Unclear(f"{names[0]} and {names[1]} differ in size: {found.sizes}")
    return found


def _scaled(small: Probed, rows: int) -> Probed:
    """The same pattern for a linear with larger heads."""
    total = sum(small.sizes)
    sizes = tuple(size * rows // total for size in small.sizes)
    alternating = small.groups * len(small.roles) == total
    groups = small.groups * rows // total if alternating else small.groups
    if sum(sizes) != rows or any(size % groups for size in sizes):
        raise _Unclear(f"the pattern of the small copy, {small}, does not fit {rows} rows")
    return Probed(small.roles, sizes, groups)
