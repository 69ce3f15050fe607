"""MODEL on the command line: a folder, a name on the Hub, or `config:TYPE`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rewire.cli.screen import Progress
from rewire.errors import CheckpointError, RewireError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rewire.plan import Plan

CONFIG = "config:"
ALWAYS_ALLOWED = frozenset({"attn_implementation"})  # a setting of every configuration that none lists


def is_config(text: str) -> bool:
    """Whether a model is to be made from a configuration."""
    return text.startswith(CONFIG)


@dataclass(frozen=True)
class Source:
    """Where a model comes from. Opening the same source twice gives equal models."""

    text: str
    values: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    dtype: str = "auto"
    allow: tuple[str, ...] = ()
    allow_code: bool = False
    task: str | None = None

    @property
    def is_config(self) -> bool:
        """Whether it is made from a configuration, not read."""
        return is_config(self.text)

    @property
    def location(self) -> str:
        """The folder, or the name on the Hub."""
        return str(Path(self.text).expanduser()) if self.text.startswith("~") else self.text

    @property
    def has_record(self) -> bool:
        """Whether it is a folder that Rewire wrote."""
        return not self.is_config and (Path(self.location) / "rewire.json").is_file()

    def open(self, plan: Plan | None = None, progress: Progress | None = None) -> PreTrainedModel:
        """The model with its weights, edited by `plan`; without one, as its folder records."""
        import rewire

        if self.is_config:
            model = self._build(meta=False)
            if plan is not None and plan.edits:
                rewire.apply_(model, plan, allow_code=self.allow_code, progress=progress)
            return model
        return rewire.load(
            self.location,
            plan,
            allow_code=self.allow_code,
            allow=self.allow,
            progress=progress,
            dtype=self.dtype,
        )

    def skeleton(self) -> PreTrainedModel:
        """The model without weights, where that is enough; an edited folder is loaded."""
        from rewire import hf_seam

        if self.is_config:
            return self._build(meta=True)
        return self.open() if self.has_record else hf_seam.build_saved(self.location)

    def check(self) -> None:
        """Raises for what can be told without PyTorch."""
        if self.is_config:
            return
        if self.values:
            raise typer.BadParameter(
                f"--set is for {CONFIG}TYPE; the configuration of {self.text} stands in its config.json"
            )
        path = Path(self.location)
        if path.is_dir():
            _check_folder(path)
        elif path.exists():
            raise CheckpointError(f"{path} is a file; name the folder of a model")
        elif path.is_absolute() or self.text.startswith(("./", "../", "~")) or self.text.count("/") > 1:
            raise CheckpointError(f"the folder {path} does not exist")

    def _build(self, *, meta: bool) -> PreTrainedModel:
        import torch

        from rewire import hf_seam

        with _building(self.text):
            config = configuration(self.text.removeprefix(CONFIG), self.values)
            torch.manual_seed(self.seed)
            model = hf_seam.build(config, architecture=self._architecture(config), meta=meta)
        model.eval()
        if self.dtype != "auto":
            model.to(getattr(torch, self.dtype))
        return model

    def _architecture(self, config: Any) -> str | None:
        """The class with the head for the task; None for the model without a head."""
        from rewire import hf_seam

        found = hf_seam.task_architecture(config, self.task)
        if self.task is not None and found is None:
            raise CheckpointError(f"{self.text} has no class for the task {self.task}")
        return found


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        inside = sorted(one.name for one in path.iterdir() if (one / "config.json").is_file())
        also = f"; below it are {', '.join(inside[:4])}" if inside else ""
        raise CheckpointError(f"{path} is no model folder: it has no config.json{also}")


@contextmanager
def _building(text: str) -> Iterator[None]:
    """Whatever Transformers makes of unfit values becomes one kind of error."""
    try:
        yield
    except RewireError:
        raise
    except Exception as error:
        raise CheckpointError(f"no model can be made of {text} with these values: {error}") from error


# ---------------------------------------------------------------- configuration values


def parse_values(texts: Sequence[str] | None) -> dict[str, Any]:
    """`--set` texts as nested values.

    >>> parse_values(["num_hidden_layers=2", "vision_config.hidden_size=64", "hidden_act=relu"])
    {'num_hidden_layers': 2, 'vision_config': {'hidden_size': 64}, 'hidden_act': 'relu'}
    """
    found: dict[str, Any] = {}
    for text in texts or ():
        key, sign, value = text.partition("=")
        *parents, last = key.strip().split(".")
        if not sign or not all((*parents, last)):
            raise typer.BadParameter(f"--set {text}: expected KEY=VALUE, such as num_hidden_layers=2")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise typer.BadParameter(f"--set {text}: {parent} has a value already")
        place[last] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def configuration(model_type: str, values: Mapping[str, Any]) -> Any:
    """The default configuration of a model type with `values`; keys that it does not know are errors."""
    from rewire import hf_seam

    known = hf_seam.model_types()
    if model_type not in known:
        raise CheckpointError(
            f"unknown model type {model_type!r}{nearest(model_type, known)}; "
            f"Transformers knows {len(known)}, see https://huggingface.co/docs/transformers"
        )
    default = hf_seam.model_config(model_type, {})
    return hf_seam.model_config(model_type, _settled(default, values, ""))


def _settled(config: Any, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values with every key checked against a configuration, and partly given mappings filled up."""
    known = {*config.to_dict(), *getattr(config, "attribute_map", {}), *ALWAYS_ALLOWED}
    settled: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise CheckpointError(
                f"--set {prefix}{key}: {type(config).__name__} has no value of this name{nearest(key, known)}"
            )
        default = getattr(config, key, None)
        if isinstance(value, Mapping) and hasattr(default, "to_dict"):
            value = _settled(default, value, f"{prefix}{key}.")
        elif isinstance(value, Mapping) and isinstance(default, Mapping):
            value = {**default, **value}
        settled[key] = value
    return settled


def nearest(name: str, known: Sequence[str] | set[str]) -> str:
    """The end of a message that names what the user may have meant."""
    close = difflib.get_close_matches(name, sorted(known), n=4, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""
