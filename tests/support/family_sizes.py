"""Sizes that the tiny models of all families share."""

from __future__ import annotations

SMALL = {"vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 2}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
EPS = 0.1
"""For norms of what a recurrence reads: where that is near 0, dividing by its size multiplies the rounding of both."""
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
