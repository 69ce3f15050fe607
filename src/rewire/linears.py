"""Whether a module acts as a linear map whose weight can be cut up into rows or put together from rows.

Most are `nn.Linear`. The others that models project with are told apart by `form`:

- `linear`: `nn.Linear`, a subclass that computes the same, or the transposed `Conv1D`
- `pointwise`: a convolution of kernel size 1, whose features stand before the positions
- `banked`: a matrix for each place in the sequence (a codebook, for instance), weight `[places, out, in]`
- `multihead`: `nn.MultiheadAttention`, whose queries, keys and values are one parameter
"""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Refusal:
    """Why nothing can be done at `path`, and what to do instead.

    `is_other`: whether what is there is known to be something else that only looks alike.
    """

    path: str
    reason: str
    is_other: bool = False


@dataclass(frozen=True)
class LinearFacts:
    """What a linear map looks like from outside.

    Attributes:
        in_features: size of its input.
        out_features: its rows.
        transposed: whether its weight is `[in, out]` (Conv1D).
        has_bias: whether it has one.
        form: what kind of layer it is, see above.
        row_dim: the dimension of its tensors that counts the rows (where it is not transposed).
        axis: the dimension of its output that the rows become.
        groups: how many parts of the input have rows of their own (grouped convolutions).
    """

    in_features: int
    out_features: int
    transposed: bool
    has_bias: bool
    form: str = "linear"
    row_dim: int = 0
    axis: int = -1
    groups: int = 1


# Packages whose layers hold packed or scaled weights.
_QUANTISERS = re.compile(
    "aqlm|auto_gptq|auto_round|autoawq|awq|bitsandbytes|compressed_tensors|eetq|fbgemm_gpu|gptqmodel|higgs|hqq"
    "|optimum|quanto|quark|spqr_quant|torchao|vptq"
)
_QUANTISED_MARKS = ("quant_state", "qweight", "W_q", "weight_scale", "weight_scale_inv", "weight_bit")
REWIRE_CLASSES = frozenset(
    {
        "SplitProjection",
        "SplitLayer",
        "SplitMultiheadAttention",
        "JoinedProjection",
        "JoinedPart",
        "UnstackedExperts",
        "StackedPart",
    }
)
_REPARAMETRISED_MARKS = ("parametrizations", "weight_g", "weight_v", "weight_orig", "weight_mask")


def linear_facts(module: nn.Module) -> LinearFacts | str:
    """The shape of a module that acts as one linear map, or the reason why it does not.

    >>> linear_facts(nn.Linear(4, 6, bias=False)) == LinearFacts(4, 6, transposed=False, has_bias=False)
    True
    >>> linear_facts(nn.Conv1d(4, 6, kernel_size=1)).form
    'pointwise'
    >>> linear_facts(nn.ReLU())
    'ReLU is not a linear layer'
    """
    reason = altered(module)
    if reason is not None:
        return reason
    if isinstance(module, nn.MultiheadAttention):
        return _multihead_facts(module)
    if isinstance(module, _CONVOLUTIONS):
        return _pointwise_facts(module)
    if _is_banked(module):
        return _banked_facts(module)
    reason = _not_linear(module)
    if reason is not None:
        return reason
    weight, transposed = module.weight, is_conv1d(module)
    assert isinstance(weight, Tensor)
    n_out, n_in = weight.shape[::-1] if transposed else weight.shape
    return LinearFacts(n_in, n_out, transposed, getattr(module, "bias", None) is not None)


def altered(module: nn.Module) -> str | None:
    """What somebody else (or Rewire) has already done to the module."""
    names = {base.__name__ for base in type(module).__mro__}
    if names & REWIRE_CLASSES:
        return f"already edited by Rewire: {type(module).__name__} stands here"
    joined: Any = getattr(module, "joined_parts", None)
    if joined is not None:
        return f"already edited by Rewire: the joined layer of {', '.join(joined)} stands here"
    if hasattr(module, "base_layer") or hasattr(module, "lora_A"):
        return "already adapted (peft); merge or unload the adapter first, or add it after this edit"
    mark = next((mark for mark in _REPARAMETRISED_MARKS if hasattr(module, mark)), None)
    if mark is not None:
        return f"its weight is computed from other tensors ({mark}); remove the parametrisation first"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (accelerate does that to offloaded models); undo that first"
    if type(getattr(module, "weight", None)).__name__ == "DTensor":
        return "its weight is spread over several devices (DTensor); edit before it is"
    found = quantiser(module)
    if found is not None:
        return f"already quantised ({found}); edit first, quantise afterwards"
    if "forward" in vars(module):
        by = "accelerate (device_map)" if hasattr(module, "_hf_hook") else "somebody"
        return f"its forward was replaced on the instance by {by}; edit before that is done"
    return None


def quantiser(module: nn.Module) -> str | None:
    """Who packed the weight, or `None` if it is a plain one."""
    homes = (base.__module__.partition(".")[0] for base in type(module).__mro__)
    quantiser = next((home for home in homes if _QUANTISERS.fullmatch(home)), None)
    if quantiser is not None:
        return f"{quantiser}: {type(module).__name__}"
    weight = getattr(module, "weight", None)
    mark = next((m for m in _QUANTISED_MARKS if hasattr(module, m) or hasattr(weight, m)), None)
    if mark is not None:
        return f"{type(module).__name__} has {mark}"
    if not isinstance(weight, Tensor):
        return None
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        return f"weight of {weight.dtype}"
    plain = type(weight) in (Tensor, nn.Parameter) or isinstance(weight, nn.UninitializedParameter)
    return None if plain else f"weight is a {type(weight).__name__}"


def _not_linear(module: nn.Module) -> str | None:
    kind: Any = type(module)
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return f"{kind.__name__} is not a linear layer"
    weight: Any = module.weight
    if isinstance(weight, nn.UninitializedParameter):
        return "its weight has no shape yet"
    if weight.ndim != 2:
        return f"its weight is not a matrix, but {list(weight.shape)}"
    if kind.forward is nn.Linear.forward or is_conv1d(module):
        return None
    return _differs_from_linear(kind)


def is_conv1d(module: nn.Module) -> bool:
    """The transposed linear of `transformers.pytorch_utils`, known by name: that package is not imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


@functools.lru_cache(maxsize=256)  # a pure function of the class
def _differs_from_linear(kind: type[nn.Linear]) -> str | None:
    """Why a subclass with a forward of its own is not the same map as `nn.Linear`: a small one is tried."""
    try:
        # The constructor may draw random numbers and may stand under `with torch.device("meta")`.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            small = kind(8, 12).double().eval()
            x = torch.linspace(-2, 3, 2 * 5 * 8, dtype=torch.float64).sin().reshape(2, 5, 8)
            with torch.no_grad():
                for offset, parameter in enumerate(small.parameters()):
                    values = torch.arange(parameter.numel(), dtype=torch.float64) + offset
                    parameter.copy_(values.sin().reshape(parameter.shape))
                same = _same_map(small, x)
    except Exception as error:  # any code may stand in that class
        return f"{kind.__name__} has its own forward and could not be tried ({type(error).__name__}: {error})"
    return None if same else f"{kind.__name__} has a forward of its own that is not the one of nn.Linear"


def _same_map(small: nn.Linear, x: Tensor) -> bool:
    tensors = {name for name, _ in [*small.named_parameters(), *small.named_buffers()]}
    if not tensors <= {"weight", "bias"} or small.weight.shape != (12, 8):
        return False
    got, want = small(x), F.linear(x, small.weight, small.bias)
    return isinstance(got, Tensor) and got.dtype == want.dtype and torch.allclose(got, want, rtol=1e-12)


# ---------------------------------------------------------------- other layers that act by rows

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _pointwise_facts(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> LinearFacts | str:
    """A convolution that looks at one position is a linear map of the features there."""
    kind = type(conv).__name__
    if type(conv).forward not in [plain.forward for plain in _CONVOLUTIONS]:
        return f"{kind} has a forward of its own that is not the one of a convolution"
    if any(size != 1 for size in conv.kernel_size):
        return f"{kind} is not a linear layer: it looks at {_times(conv.kernel_size)} positions at a time"
    if any(step != 1 for step in conv.stride) or any(conv._reversed_padding_repeated_twice):
        return f"{kind} is not a linear layer: it skips or adds positions"
    axis = -1 - len(conv.kernel_size)
    facts = (conv.in_channels, conv.out_channels, False, conv.bias is not None)
    return LinearFacts(*facts, "pointwise", axis=axis, groups=conv.groups)


def _times(sizes: tuple[int, ...]) -> str:
    return "×".join(map(str, sizes))


def _multihead_facts(attention: nn.MultiheadAttention) -> LinearFacts | str:
    kind = type(attention).__name__
    if type(attention).forward is not nn.MultiheadAttention.forward:
        return f"{kind} has a forward of its own that is not the one of nn.MultiheadAttention"
    if attention._parameters["in_proj_weight"] is None:
        widths = f"queries read {attention.embed_dim} features, keys {attention.kdim}, values {attention.vdim}"
        return f"{kind} holds no fused projection: {widths}, so each has a weight of its own"
    width = attention.embed_dim
    return LinearFacts(width, 3 * width, False, attention.in_proj_bias is not None, "multihead")


def _is_banked(module: nn.Module) -> bool:
    """Whether its tensors are a weight of three dimensions, and perhaps a bias, and nothing else."""
    tensors = {name for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None}
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 3 and tensors <= {"weight", "bias"} and not module._modules


def _banked_facts(module: nn.Module) -> LinearFacts | str:
    kind: Any = type(module)
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    reason: str | None = _differs_from_banked(kind, bias is not None)
    if reason is not None:
        return reason
    _, n_out, n_in = weight.shape
    return LinearFacts(n_in, n_out, False, bias is not None, "banked", row_dim=1)


@functools.lru_cache(maxsize=256)  # a pure function of the class
def _differs_from_banked(kind: type[nn.Module], has_bias: bool) -> str | None:
    """Why a class does not map every place by a matrix of its own: a small one is tried."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            whole = _small_bank(kind, has_bias, 12)
            x = torch.linspace(-2, 3, 2 * 3 * 8, dtype=torch.float64).sin().reshape(2, 3, 8)
            want = torch.einsum("noi,bni->bno", whole.weight, x) + (whole.bias if has_bias else 0)
            same = _equal(whole(x), want) and all(_acts_by_rows(whole, *call) for call in _calls(kind, x))
    except Exception as error:  # any code may stand in that class
        first_line = str(error).partition("\n")[0]
        return f"{kind.__name__} is not a linear layer, nor one for each place ({type(error).__name__}: {first_line})"
    return None if same else f"{kind.__name__} is not a linear layer, nor one for each place"


def _small_bank(kind: type[nn.Module], has_bias: bool, rows: int) -> Any:
    """One without any attributes: a forward that needs some cannot be cut up safely."""
    small = kind.__new__(kind)
    nn.Module.__init__(small)
    values = torch.arange(3 * rows * 8, dtype=torch.float64).sin().reshape(3, rows, 8)
    small.weight = nn.Parameter(values)
    if has_bias:
        small.bias = nn.Parameter(values[..., 0].cos())
    return small


def _calls(kind: type[nn.Module], x: Tensor) -> list[tuple[Any, ...]]:
    """Ways to call it: for all places, and, where it takes a second argument, for the place that this names."""
    more = len(inspect.signature(kind.forward).parameters) > 2  # self and the input
    return [(x,), (x[:, 1:2], torch.tensor([1]))] if more else [(x,)]


def _acts_by_rows(whole: Any, *call: Any) -> bool:
    """Whether two halves of the rows, each in a module of its own, give the halves of the output."""
    halves = []
    for rows in (slice(0, 5), slice(5, 12)):
        half = _small_bank(type(whole), whole._parameters.get("bias") is not None, 12)
        for name, tensor in whole._parameters.items():
            half._parameters[name] = nn.Parameter(tensor[:, rows])
        halves.append(half(*call))
    return _equal(whole(*call), torch.cat(halves, dim=-1))


def _equal(got: Any, want: Tensor) -> bool:
    return isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-12)
