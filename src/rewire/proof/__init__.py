"""Proving that an edited model is right against the untouched one.

`prove` compares weights, outputs, gradients and the way back, and makes sure that the outputs would show a
mistake. It shares no code with the edits, so that it cannot share their mistakes.
"""

from rewire.proof.cases import Case
from rewire.proof.divergence import Divergence, ModuleDifference
from rewire.proof.inputs import cases_for
from rewire.proof.prover import prove
from rewire.proof.report import Check, Proof

__all__ = ["prove", "Proof", "Check", "Case", "Divergence", "ModuleDifference", "cases_for"]
