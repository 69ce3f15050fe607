"""What a model is made of, where its projections sit, and what a plan could do with them."""

from rewire.inspection.find import inspect
from rewire.inspection.record import EncoderReport, Family, Inspection, Node

__all__ = ["inspect", "Inspection", "EncoderReport", "Family", "Node"]
