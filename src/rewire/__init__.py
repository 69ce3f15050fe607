"""Rewire changes any Transformers model and proves that the change is right.

Names are bound when they are first used, so that `import rewire` loads neither torch nor Transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewire.adapters import carry_adapter, carry_optimizer, load_adapter
    from rewire.errors import RewireError
    from rewire.explicit import resolve_plan
    from rewire.fastpath import encode
    from rewire.inspection import inspect
    from rewire.live import apply_, revert_
    from rewire.loading import load, receipt
    from rewire.plan import Plan
    from rewire.proof import Proof, prove
    from rewire.receipts import Receipt
    from rewire.saving import save
    from rewire.stream import convert

    __version__: str

_HOME = {
    "Plan": "rewire.plan",
    "Proof": "rewire.proof",
    "Receipt": "rewire.receipts",
    "RewireError": "rewire.errors",
    "apply_": "rewire.live",
    "carry_adapter": "rewire.adapters",
    "carry_optimizer": "rewire.adapters",
    "convert": "rewire.stream",
    "encode": "rewire.fastpath",
    "inspect": "rewire.inspection",
    "load": "rewire.loading",
    "load_adapter": "rewire.adapters",
    "prove": "rewire.proof",
    "receipt": "rewire.loading",
    "resolve_plan": "rewire.explicit",
    "revert_": "rewire.live",
    "save": "rewire.saving",
}

__all__ = [
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


def __getattr__(name: str) -> Any:
    if name == "__version__":  # looked up when asked for: that takes as long as everything else here together
        from importlib import metadata

        value: Any = metadata.version("rewire")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'rewire' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
