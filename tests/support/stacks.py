"""The stacks that runs are tried on."""

from __future__ import annotations

import torch

STACKS = {
    "recurrent": {"model__pattern": "mamba2, gated_delta_net", "model__depth": 2},
    "sparse": {
        "model__pattern": "moba, nsa",
        "model__depth": 2,
        "model__mixers": {
            "moba": {"block_size": 4, "top_k": 2},
            "nsa": {"block_size": 4, "selected_blocks": 3, "local_blocks": 1, "window": 4}
            | {"compressed_length": 4, "compressed_stride": 4},
        },
    },
    "moe": {"model__channel": "moe", "model__channels": {"moe": {"expert_bias": True}}},
}
"""A recurrent, a sparse and a mixture-of-experts one, as changes of the tiny configuration."""

COMPARED = {
    **{name: {"dtype": torch.float64, "train__warmup": 2, **stack} for name, stack in STACKS.items()},
    "single": {"dtype": torch.float32, **STACKS["recurrent"]},
    "tied": {"dtype": torch.float64, "model__tie_embeddings": True},
    "recomputed": {"dtype": torch.float64, "train__activation_checkpointing": True, **STACKS["recurrent"]},
    "accumulated": {"dtype": torch.float64, "train__micro_batch": 1, **STACKS["recurrent"]},
    "truncated": {"dtype": torch.float64, "train__bptt": 6, "train__micro_batch": 2, **STACKS["recurrent"]},
    "muon": {"dtype": torch.float32, "train__optimizer": "muon", **STACKS["recurrent"]},
    "gathered": {"dtype": torch.float32, "train__param_dtype": "bfloat16", "train__precision": "bfloat16"},
    "spikes": {"dtype": torch.float32, "train__spike": 2.0, "train__bad_step": "skip", **STACKS["moe"]},
}
"""Stacks that two processes and one compute each, with equal results."""

COMPILED = {"dtype": torch.float32, "train__compile": True, **STACKS["recurrent"]}
