"""A model made from its configuration: without weights, with pretended ones, and for real."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rewire import hf_seam
from rewire.artefact import read_record
from rewire.errors import CheckpointError, MeasureError, RewireError
from rewire.plan import Plan
from rewire.resolve import resolve


@dataclass(frozen=True, eq=False)
class Blueprint:
    """What a model is made from.

    Attributes:
        name: what people call it.
        config: its configuration.
        architecture: its class; None for the one that `AutoModel` takes.
        plan: what is done to it.
        allow_code: whether classes that the plan names may be imported and run.
    """

    name: str
    config: Any
    architecture: str | None = None
    plan: Plan | None = None
    allow_code: bool = False

    @classmethod
    def of(cls, name: str, config: Any, architecture: str | None = None, dtype: str = "auto") -> Blueprint:
        """With weights of type `dtype`; `auto` is what the configuration says, float32 where it says nothing."""
        config = copy.deepcopy(config)
        _set_dtype(config, dtype)
        return cls(name, config, architecture)

    @classmethod
    def saved(cls, source: str, dtype: str = "auto") -> Blueprint:
        """Of a model folder or of a model on the Hub; only the configuration is read, and the plan that it records."""
        config = hf_seam.read_config(source)
        name = hf_seam.saved_class(source, config=config).__name__
        found = cls.of(source, config, None if name == "AutoModel" else name, dtype)
        record = read_record(Path(source)) if Path(source).is_dir() else None
        return found if record is None else replace(found, plan=Plan.from_dict(record.plan))

    def with_plan(self, plan: Plan, *, allow_code: bool = False) -> Blueprint:
        """The same model, edited by `plan`. Raises `MeasureError` if it is an edited one already."""
        if self.plan is not None:
            raise MeasureError(f"{self.name} holds a model that a plan has edited already; name the original")
        return replace(self, plan=plan, allow_code=allow_code)

    def on_meta(self) -> nn.Module:
        """The model without weights, edited. Raises `CheckpointError` and `ResolveError`."""
        model = self._build(meta=True)
        model.eval()
        model.tie_weights()
        if self.plan is not None and self.plan.edits:
            for change in resolve(model, self.plan, allow_code=self.allow_code).changes:
                change.surgeon(model)
        return model

    def real(self) -> nn.Module:
        """The model with random weights, not edited yet."""
        model = self._build(meta=False)
        model.eval()
        return model

    def _build(self, *, meta: bool) -> hf_seam.PreTrainedModel:
        try:
            return hf_seam.build(copy.deepcopy(self.config), architecture=self.architecture, meta=meta)
        except RewireError:
            raise
        except Exception as error:  # whatever Transformers makes of an unfit configuration
            raise CheckpointError(f"no model can be made of the configuration of {self.name}: {error}") from error


def _set_dtype(config: Any, dtype: str) -> None:
    """Has models that are made of `config` get weights of this type, parts with a configuration of their own too."""
    if dtype == "auto":
        config.dtype = config.dtype or torch.float32
        return
    config.dtype = getattr(torch, dtype)
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            _set_dtype(value, dtype)


@contextmanager
def pretended(model: nn.Module) -> Iterator[FakeTensorMode]:
    """Gives a model on meta tensors that pretend to be on the CPU, and runs the block where all tensors pretend.

    Nothing is computed, but shapes, types and the choice of kernels are those of a real run. (Tensors on meta would
    take other kernels.)
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, _Shapes():  # type: ignore[no-untyped-call]
        _pretend(model)
        yield mode


class _Shapes(TorchDispatchMode):
    """Pretends what torch itself pretends for some types only, though its kernels take others."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation."""
        if func.overloadpacket is torch.ops.aten._grouped_mm and args[0].dtype != torch.bfloat16:
            return _grouped(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _grouped(
    first: Tensor, second: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The result of products of groups: of rows with a matrix each `[groups, in, out]`, or of columns with rows."""
    shape = [first.shape[-2], second.shape[-1]]
    if first.ndim == second.ndim:
        groups = first.shape[0] if first.ndim == 3 else offs.shape[0] if offs is not None else 1
        shape = [groups, *shape]
    return first.new_empty(shape, dtype=out_dtype or first.dtype)


def _pretend(model: nn.Module) -> None:
    """Tensors that several modules share stay shared."""
    known: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in known:
            found = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            known[id(tensor)] = nn.Parameter(found, requires_grad=tensor.requires_grad) if is_parameter else found
        return known[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)
