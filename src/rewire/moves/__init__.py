"""A tensor rule as strided copies: which elements of which source tensors every tensor after it consists of.

`compile_rule` runs a rule on symbolic arrays, which know where their elements come from and hold none. What it
gives is all that the code that writes files needs to know about a rule. No torch, no numpy.
"""

from rewire.moves.compile import Made, check_bytes, compile_rule
from rewire.moves.copies import Axis, Move

__all__ = ["Axis", "Made", "Move", "check_bytes", "compile_rule"]
