"""Checkpoints on disk, changed by a plan without building the model."""

from rewire.stream.conversion import convert
from rewire.stream.report import Conversion, Fate

__all__ = ["Conversion", "Fate", "convert"]
