"""What edits put into a model. These modules import torch alone, so that an exporter can inline them."""

from rewire.modules.experts import Expert, UnstackedExperts
from rewire.modules.joined import JoinedPart, JoinedProjection
from rewire.modules.multihead import SplitMultiheadAttention
from rewire.modules.renamed import RenamedModule
from rewire.modules.split import SplitLayer, SplitProjection
from rewire.modules.stacked import StackedPart
from rewire.modules.stacked_tensor import StackedWeight, UnsupportedUse

__all__ = [
    "Expert",
    "JoinedPart",
    "JoinedProjection",
    "RenamedModule",
    "SplitLayer",
    "SplitMultiheadAttention",
    "SplitProjection",
    "StackedPart",
    "StackedWeight",
    "UnstackedExperts",
    "UnsupportedUse",
]
