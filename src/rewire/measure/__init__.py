"""Measuring models: is an edited one still as good, and is it faster?

Names are bound when they are first used: the store of results needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewire.measure.embeddings import Quality, quality
    from rewire.measure.likelihood import Comparison, Perplexity, compare, perplexity

_HOME = {
    "Comparison": "rewire.measure.likelihood",
    "Perplexity": "rewire.measure.likelihood",
    "Quality": "rewire.measure.embeddings",
    "compare": "rewire.measure.likelihood",
    "perplexity": "rewire.measure.likelihood",
    "quality": "rewire.measure.embeddings",
}

__all__ = ["Perplexity", "perplexity", "Comparison", "compare", "Quality", "quality"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rewire.measure' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value
