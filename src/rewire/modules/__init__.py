"""What edits put into a model. These modules import torch alone, so that an exporter can inline them."""

from rewire.modules.joined import JoinedPart, JoinedProjection
from rewire.modules.renamed import RenamedModule
from rewire.modules.split import SplitProjection

__all__ = ["JoinedPart", "JoinedProjection", "RenamedModule", "SplitProjection"]
