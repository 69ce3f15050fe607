"""The public surface: these names and no others, and none of them costs an import of torch."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import rewire
from rewire import plan


def test_the_exported_names() -> None:
    assert sorted(rewire.__all__) == [
        "Plan",
        "Proof",
        "Receipt",
        "RewireError",
        "apply_",
        "carry_adapter",
        "carry_optimizer",
        "convert",
        "encode",
        "inspect",
        "load",
        "load_adapter",
        "prove",
        "receipt",
        "resolve_plan",
        "revert_",
        "save",
    ]
    assert set(dir(rewire)) == {*rewire.__all__, "__version__"}


def test_the_edits() -> None:
    assert {edit.kind for edit in plan.EDITS} == {
        "split",
        "join",
        "unstack",
        "stack",
        "replace",
        "lora",
        "pack",
        "freeze",
        "unfreeze",
        "cast",
        "rename",
    }


def test_every_name_is_there_and_documented() -> None:
    for name in rewire.__all__:
        value = getattr(rewire, name)
        assert inspect.getdoc(value), name
        assert callable(value)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = rewire.nothing


def test_every_kind_of_edit_has_a_handler() -> None:
    from rewire.edits import HANDLERS

    assert set(HANDLERS) == set(plan.EDITS)


def test_importing_rewire_and_plans_loads_no_torch() -> None:
    script = "import sys, rewire, rewire.plan, rewire.tensor_rules, rewire.edit_rules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
