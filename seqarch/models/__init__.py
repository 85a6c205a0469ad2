"""Stacks of mixers from a pattern, and language models on them."""

from seqarch.layers.rows import state_rows
from seqarch.models.config import LMConfig, StackConfig
from seqarch.models.language_model import LanguageModel
from seqarch.models.optimisation import parameter_groups
from seqarch.models.pattern import LayerPattern, parse_pattern, tile_pattern
from seqarch.models.quantization import dequantize, quantize, weight_bytes
from seqarch.models.small_states import dequantize_state, quantize_state
from seqarch.models.stack import Stack

__all__ = [
    "LMConfig",
    "LanguageModel",
    "LayerPattern",
    "Stack",
    "StackConfig",
    "dequantize",
    "dequantize_state",
    "parameter_groups",
    "parse_pattern",
    "quantize",
    "quantize_state",
    "state_rows",
    "tile_pattern",
    "weight_bytes",
]
