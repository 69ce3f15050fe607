"""What was trained before an edit, carried across it: LoRA adapters and the states of optimizers."""

from rewire.adapters.carry import carry_adapter
from rewire.adapters.loading import load_adapter
from rewire.adapters.optimizer import carry_optimizer
from rewire.adapters.report import Carried

__all__ = ["Carried", "carry_adapter", "carry_optimizer", "load_adapter"]
