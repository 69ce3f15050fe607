"""Which options `peft.LoraConfig` takes, found without importing peft."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewire.plan.data import FrozenMapping, freeze
from rewire.plan.messages import misfit, unknown_key


@functools.cache  # what is installed does not change while Python runs
def lora_option_names() -> frozenset[str] | None:
    """The fields of `peft.LoraConfig`, read from its source because importing peft imports torch.

    None if peft is not installed (or not laid out as known): then any name has to be accepted.
    """
    spec = importlib.util.find_spec("peft")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    names: set[str] = set()
    for file in (package / "tuners/lora/config.py", package / "config.py"):
        try:
            names |= _annotated_names(ast.parse(file.read_text("utf-8")))
        except (OSError, SyntaxError, ValueError):
            return None
    return frozenset(names) if "r" in names else None


def _annotated_names(module: ast.Module) -> set[str]:
    """The annotated attributes of LoraConfig and of the classes it is built on."""
    wanted = {"LoraConfig", "PeftConfig", "PeftConfigMixin"}
    classes = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name in wanted)
    return {
        statement.target.id
        for node in classes
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }


def lora_options(items: Mapping[Any, Any]) -> FrozenMapping:
    """Check options meant for `peft.LoraConfig`, each error at the option's own name."""
    frozen: dict[str, Any] = {}
    wrong: dict[Any, str] = {}
    for name, value in items.items():
        try:
            _check_lora_name(name)
            frozen[name] = freeze(value)
        except ValueError as error:
            wrong[name] = str(error)
    if wrong:
        raise misfit(wrong)
    return FrozenMapping(frozen)


def _check_lora_name(name: str) -> None:
    if name == "target_modules":
        raise ValueError("is peft's name; here use 'target'")
    known = lora_option_names()
    if known is not None and name not in known:
        allowed = sorted({"target", "adapter", "optional"} | known - {"target_modules"})
        raise ValueError(unknown_key(name, allowed))
