"""Which edits are proven on which model types: every type made small, every edit tried on it and proven."""

from rewire.coverage.record import EDITS, Coverage, Finding, TypeReport
from rewire.coverage.run import measure_coverage

__all__ = ["measure_coverage", "Coverage", "TypeReport", "Finding", "EDITS"]
