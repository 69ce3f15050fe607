"""Whether a module acts as a linear map with one weight that can be cut up or put together."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LinearFacts:
    """What a linear map looks like from outside. `transposed`: its weight is `[in, out]` (Conv1D)."""

    in_features: int
    out_features: int
    transposed: bool
    has_bias: bool


# Packages whose layers hold packed or scaled weights.
_QUANTISERS = re.compile(
    "aqlm|auto_gptq|auto_round|autoawq|awq|bitsandbytes|compressed_tensors|eetq|fbgemm_gpu|gptqmodel|higgs|hqq"
    "|optimum|quanto|quark|spqr_quant|torchao|vptq"
)
_QUANTISED_MARKS = ("quant_state", "qweight", "W_q", "weight_scale", "weight_scale_inv", "weight_bit")
REWIRE_CLASSES = frozenset({"SplitProjection", "JoinedProjection", "JoinedPart"})
_REPARAMETRISED_MARKS = ("parametrizations", "weight_g", "weight_v", "weight_orig", "weight_mask")


def linear_facts(module: nn.Module) -> LinearFacts | str:
    """The shape of a module that acts as one linear map, or the reason why it does not.

    >>> linear_facts(nn.Linear(4, 6, bias=False))
    LinearFacts(in_features=4, out_features=6, transposed=False, has_bias=False)
    >>> linear_facts(nn.ReLU())
    'ReLU is not a linear layer'
    """
    reason = _altered(module) or _not_linear(module)
    if reason is not None:
        return reason
    weight, transposed = module.weight, is_conv1d(module)
    assert isinstance(weight, Tensor)
    n_out, n_in = weight.shape[::-1] if transposed else weight.shape
    return LinearFacts(n_in, n_out, transposed, getattr(module, "bias", None) is not None)


def _altered(module: nn.Module) -> str | None:
    """What somebody else (or Rewire) has already done to the module."""
    names = {base.__name__ for base in type(module).__mro__}
    if names & REWIRE_CLASSES:
        return f"already edited by Rewire: {type(module).__name__} stands here"
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
