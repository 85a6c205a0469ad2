"""Options beyond the defaults under which each built-in mixer is tried, and the cases that they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from seqarch.layers import MIXERS
from seqarch.ops import use_backends
from seqarch.testing import Case, mixer_cases

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "attention": [
        {"num_kv_heads": 1, "num_heads": 4, "qk_norm": True, "output_gate": True, "rotary_fraction": 0.5, "scale": 0.2},
        {"conv_width": 4, "position": "none", "output_bias": True, "qkv_bias": True, "qk_norm": True}
        | {"zero_centred_norms": True},
        {
            "num_kv_heads": 2,
            "num_heads": 4,
            "qk_norm": True,
            "qk_norm_scope": "all",
            "output_gate": True,
            "output_gate_scope": "head",
            "qkv_bias": True,
            "qkv_clip": 0.4,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48},
        },
    ],
    "based": [{"num_heads": 2, "key_width": 4, "window": 16}],
    "big_bird": [{"block_size": 16, "num_heads": 2, "window_blocks": 2, "global_blocks": 1, "random_blocks": 2}],
    "moba": [{"block_size": 16, "num_heads": 4, "num_kv_heads": 2}],
    "dsa": [
        {"num_heads": 4, "num_kv_heads": 2, "top_k": 3},
        {"top_k": 2, "position": "none", "rotary_fraction": 0.5},
    ],
    "comba": [{"num_heads": 2, "num_key_heads": 1, "key_width": 8, "output_correction": 0.3}],
    "delta_net": [
        {"num_heads": 2, "negative_eigenvalues": True},
        {"conv_width": 0, "num_heads": 3, "key_width": 6, "value_width": 5},
    ],
    "forgetting_attention": [
        {
            "num_kv_heads": 2,
            "num_heads": 4,
            "qk_norm": True,
            "output_gate": True,
            "output_norm": True,
            "kv_shift": True,
        },
        {"num_heads": 2, "window": 16, "position": "rotary", "conv_width": 3, "forget_bias": 2.0},
    ],
    "gated_delta_net": [{"num_heads": 2, "num_key_heads": 1, "key_width": 8, "negative_eigenvalues": True}],
    "gated_delta_net_2": [{"num_heads": 2, "num_key_heads": 1, "expand_v": 0.5, "negative_eigenvalues": True}],
    "gated_delta_product": [{"num_heads": 2, "num_key_heads": 1, "steps": 3, "negative_eigenvalues": False}],
    "gated_kalma_net": [{"num_heads": 2, "key_width": 6, "value_width": 5, "iterations": 8, "ridge_ratio": 0.1}],
    "gated_short_conv": [{"conv_width": 4, "bias": True}],
    "gated_slot_attention": [{"num_heads": 2, "num_slots": 6, "conv_width": 3, "temperature": 1.0}],
    "gla": [
        {"num_heads": 2, "temperature": 1.0, "conv_width": 3, "negative_eigenvalues": True},
        {"num_heads": 3, "key_width": 6, "value_width": 5},
    ],
    "gru": [{"num_heads": 2, "head_dim": 12}],
    "hgrn": [{"lower_bound": 0.5, "complex_state": False}, {"d_inner": 24}],
    "hgrn2": [{"num_heads": 2, "key_width": 5, "lower_bound": 0.5, "conv_width": 3}],
    "hyena": [{"order": 3, "length": 16, "filter_width": 8, "filter_features": 2}],
    "jet_block": [{"num_heads": 2, "num_key_heads": 1, "key_width": 8, "conv_width": 3, "tap_reduction": 100}],
    "kda": [
        {"num_heads": 2, "key_width": 8, "value_width": 5, "gate_rank": 3, "negative_eigenvalues": True},
        {"num_heads": 2, "log_decay_bound": 5.0},
    ],
    "mla": [
        {"num_heads": 2, "kv_lora_rank": 24, "q_lora_rank": 5, "v_head_dim": 8, "position": "none"},
        {"num_heads": 2, "kv_lora_rank": 10},
    ],
    "lightning_attention": [{"num_heads": 3, "head_dim": 6, "decay_factor": 0.3, "activation": "gelu"}],
    "linear_attention": [{"normaliser": "rms", "feature_map": "identity"}, {"num_heads": 2, "conv_width": 3}],
    "log_linear_gated_delta_net": [
        {"num_heads": 2, "num_key_heads": 1, "key_width": 8, "negative_eigenvalues": True, "levels": 9}
    ],
    "lolcats": [
        {"num_heads": 4, "num_kv_heads": 2, "window": 16, "feature_width": 5, "qk_norm": True, "output_gate": True},
        {"num_heads": 2, "window": 3, "feature_width": 4, "position": "none", "conv_width": 3, "qkv_bias": True}
        | {"scale": 0.3, "first_window_factor": 0.6},
    ],
    "log_linear_mamba2": [
        {"d_state": 8, "head_dim": 16, "n_groups": 2, "negative_eigenvalues": True, "levels": 9, "output_norm": "none"}
    ],
    "longformer": [{"window": 20, "global_tokens": 32, "num_heads": 2, "num_kv_heads": 1}],
    "lstm": [{"num_heads": 2, "head_dim": 12, "forget_bias": 0.0}],
    "mamba": [
        {"d_state": 4, "dt_rank": 1},
        {"d_state": 3, "d_inner": 24, "negative_eigenvalues": True, "dt_bc_norm": "rms"},
        {"d_state": 4, "dt_bc_norm": "rms_without_weights"},
    ],
    "mamba2": [
        {"d_state": 8, "head_dim": 16, "n_groups": 2, "negative_eigenvalues": True, "A_min": 8.0, "dt_min": 0.05},
        {"d_inner": 96, "head_dim": 32, "output_norm": "none", "dt_limit_min": 0.002, "dt_limit_max": 0.09}
        | {"in_factors": [0.5, 1.1, 0.9, 1.3, 0.7]},
    ],
    "mamba3": [
        {"d_state": 8, "head_dim": 16, "n_groups": 2, "rotary_fraction": 1.0},
        {"d_state": 8, "head_dim": 12, "num_heads": 3, "mimo_rank": 3, "output_norm": True},
    ],
    "mesa_net": [
        {"num_heads": 2, "key_width": 6, "value_width": 5, "iterations": 8, "gate_bias": 3.0, "conv_width": 0}
    ],
    "min_gru": [{"d_inner": 24, "candidate": "positive", "negative_eigenvalues": True}],
    "mlstm": [
        {"num_heads": 2, "forget_gate": "exponential", "gate_cap": 0.0, "conv_width": 3},
        {"num_heads": 3, "key_width": 8, "value_width": 5, "denominator_eps": 1e-2, "norm_eps": 1e-3},
    ],
    "nsa": [
        {
            "num_heads": 4,
            "num_kv_heads": 2,
            "compressed_length": 8,
            "compressed_stride": 4,
            "block_size": 8,
            "selected_blocks": 3,
            "local_blocks": 1,
            "window": 16,
        }
    ],
    "path_attention": [
        {"num_kv_heads": 2, "num_heads": 4, "w_rank": 5, "qk_norm": True, "forget_gate": True},
        {"num_heads": 2, "w_rank": 0, "conv_width": 0, "position": "rotary", "output_gate": True},
    ],
    "preconditioned_gated_delta_net": [{"num_heads": 2, "num_key_heads": 1, "key_width": 8, "squash": 1.9}],
    "preconditioned_kda": [{"num_heads": 2, "key_width": 8, "value_width": 5, "log_decay_bound": 5.0}],
    "retention": [{"num_heads": 3, "key_width": 6, "value_width": 5, "conv_width": 4}],
    "rwkv6": [{"num_heads": 3, "head_dim": 6, "mix_rank": 3, "decay_rank": 5}],
    "rwkv7": [{"num_heads": 3, "head_dim": 6, "decay_rank": 3, "rate_rank": 4, "gate_rank": 5}],
    "rwkv_channel_mix": [{"hidden": 24, "activation": "gelu"}],
    "rg_lru": [{"lru_width": 48, "num_heads": 4, "scale_first": True, "negative_eigenvalues": True}],
    "s4d": [{"d_state": 4, "init": "legs"}],
    "sparse_mla": [
        {"num_heads": 2, "kv_lora_rank": 24, "q_lora_rank": 5, "v_head_dim": 8, "position": "none", "top_k": 3},
        {"num_heads": 2, "kv_lora_rank": 10, "q_lora_rank": 6, "top_k": 5, "index_heads": 3},
    ],
    "slstm": [{"num_heads": 2, "head_dim": 12, "conv_width": 0, "recurrent_std": 0.4}],
    "stick_breaking_attention": [{"num_kv_heads": 2, "num_heads": 4, "qk_norm": True, "conv_width": 3}],
    "sliding_window": [{"window": 2}, {"window": 16, "num_heads": 2, "sinks": True}, {"window": 5, "logit_cap": 0.5}],
}


@dataclass(frozen=True)
class Joint(Case):
    """A case in which other operations of the layer have a backend of their own, too, where they are named."""

    others: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def setting(self) -> str:
        return super().setting + "".join(f"-{op}-{backend}" for op, backend in self.others.items())

    def active(self) -> AbstractContextManager[None]:
        return use_backends(**({self.op: self.backend} if self.op else {}), **self.others)


def registered_cases() -> Iterator[tuple[str, Case, bool]]:
    """Every mixer by its name, with its defaults and its variants, on each backend of each operation that it uses.

    And whether the case is for every run of the tests: with its defaults on all backends, with variants on the best.

    Where it uses several, the backends of all of them are tried side by side, first with first and so on, and the
    operations that have none left choose for themselves: each is a function of its own inputs, so what is wrong with
    one shows beside whichever others.
    """
    for name, mixer in MIXERS.items():
        for options in ({}, *VARIANTS.get(name, [])):
            by_op: dict[str, list[Case]] = {}
            for case in mixer_cases(mixer, options=[options]):
                by_op.setdefault(case.op, []).append(case)
            first, *rest = sorted(by_op.values(), key=len, reverse=True)
            for row, beside in enumerate(zip_longest(first, *rest)):
                case = beside[0]
                others = {each.op: each.backend for each in beside[1:] if each is not None}
                joint = Joint(case.layer, case.op, case.backend, case.options, case.d_model, others)
                yield name, joint, not options or row == 0
