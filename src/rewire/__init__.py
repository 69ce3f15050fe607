"""Rewire changes any Transformers model and proves that the change is right.

Names are bound when they are first used, so that `import rewire` loads neither torch nor Transformers.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewire.errors import RewireError
    from rewire.inspection import inspect
    from rewire.live import apply_, revert_
    from rewire.loading import load, receipt
    from rewire.plan import Plan
    from rewire.proof import Proof, prove
    from rewire.receipts import Receipt
    from rewire.saving import save

_HOME = {
    "Plan": "rewire.plan",
    "Proof": "rewire.proof",
    "Receipt": "rewire.receipts",
    "RewireError": "rewire.errors",
    "apply_": "rewire.live",
    "inspect": "rewire.inspection",
    "load": "rewire.loading",
    "prove": "rewire.proof",
    "receipt": "rewire.loading",
    "revert_": "rewire.live",
    "save": "rewire.saving",
}

__all__ = [
    "Plan",
    "Proof",
    "Receipt",
    "RewireError",
    "apply_",
    "inspect",
    "load",
    "prove",
    "receipt",
    "revert_",
    "save",
]

__version__ = metadata.version("rewire")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rewire' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
