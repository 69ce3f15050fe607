"""Every model type of Transformers as a tiny model with inputs: what coverage is measured on."""

from rewire.zoo.inputs import example_inputs
from rewire.zoo.models import Unavailable, tiny_config, tiny_model

__all__ = ["example_inputs", "tiny_config", "tiny_model", "Unavailable"]
