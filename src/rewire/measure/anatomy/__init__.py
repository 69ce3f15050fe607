"""What a model is made of and what memory it takes, told from its configuration alone."""

from rewire.measure.anatomy.anatomy import anatomy
from rewire.measure.anatomy.building import Blueprint
from rewire.measure.anatomy.measured import measure
from rewire.measure.anatomy.record import Anatomy, Change, Measured
from rewire.measure.anatomy.settings import Settings

__all__ = ["anatomy", "measure", "Anatomy", "Blueprint", "Change", "Measured", "Settings"]
