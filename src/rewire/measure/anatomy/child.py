"""Runs a model for real and says what memory that has taken. Started by `measured.py`, in a process of its own.

Reads a request as JSON from stdin and writes the bytes found as JSON, on the last line of stdout.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewire import hf_seam
from rewire.live import apply_
from rewire.measure.anatomy.building import Blueprint
from rewire.measure.anatomy.inputs import inputs_for, with_labels
from rewire.measure.anatomy.settings import Settings
from rewire.measure.anatomy.steps import infer, learn, prepare_training
from rewire.plan import Plan

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_SHORT = 8
"""Tokens of the step in which the optimizer makes its states."""


def main() -> None:
    """Measures what stdin asks for."""
    request = json.loads(sys.stdin.read())
    warnings.simplefilter("ignore")
    with hf_seam.quiet():
        found = measure(request)
    sys.stdout.write(f"\n{json.dumps(found)}\n")


def measure(request: Mapping[str, Any]) -> dict[str, int]:
    """Peaks beyond what the process has when everything is warm but the model is not there."""
    settings = Settings(**request["settings"])
    with_training = settings.train and settings.optimizer in OPTIMIZERS
    _warm_up(request, settings, with_training)
    before = _now()
    model = _model(request)
    _tidy()
    found = {"load": _now() - before, "inference": _inference_peak(model, settings) - before}
    if with_training:
        found["training"] = _training_peak(model, settings) - before
    return found


def _model(request: Mapping[str, Any]) -> nn.Module:
    """The model, with the same random weights each time."""
    torch.manual_seed(0)
    config = hf_seam.read_config(request["folder"])
    model = Blueprint(request["folder"], config, request["architecture"]).real()
    if request["plan"] is not None:
        apply_(model, Plan.from_dict(request["plan"]), allow_code=request["allow_code"], hashes=False)
    return model


def _warm_up(request: Mapping[str, Any], settings: Settings, with_training: bool) -> None:
    """Has the libraries load and set up whatever they need, with an equal model that is thrown away.

    In full size: kernels are made for each size of a matrix, of which the experts of a batch have many.
    """
    model = _model(request)
    infer(model, inputs_for(model, settings), settings)
    if with_training:
        _train_twice(model, settings)
    del model
    _tidy()


def _inference_peak(model: nn.Module, settings: Settings) -> int:
    inputs = inputs_for(model, settings)
    _tidy()
    _reset_peak()
    infer(model, inputs, settings)
    return _peak()


def _training_peak(model: nn.Module, settings: Settings) -> int:
    _train_twice(model, settings)
    return _peak()


def _train_twice(model: nn.Module, settings: Settings) -> None:
    """In the first step, on a small input, the optimizer makes its states; the peak is that of the second."""
    prepare_training(model, settings)
    optimizer = OPTIMIZERS[settings.optimizer](_trained(model))
    small = replace(settings, batch=1, length=min(_SHORT, settings.length))
    _train_once(model, inputs_for(model, small), small, optimizer)
    inputs = inputs_for(model, settings)
    _tidy()
    _reset_peak()
    _train_once(model, inputs, settings, optimizer)


def _train_once(model: nn.Module, inputs: dict[str, Tensor], settings: Settings, optimizer: Any) -> None:
    output = learn(model, with_labels(model, inputs), settings, lambda: None)
    optimizer.step()
    optimizer.zero_grad()
    del output


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.0),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.0, momentum=0.9),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.0),
}
"""Those that torch has. Weights must stay as they are, or another step would choose other experts."""


def _now() -> int:
    """Resident bytes."""
    return _field("VmRSS")


def _peak() -> int:
    """The most resident bytes since `_reset_peak`."""
    return _field("VmHWM")


def _field(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def _reset_peak() -> None:
    _CLEAR.write_text(_RESET_PEAK)


def _tidy() -> None:
    """Gives back to the system what is not in use."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
