"""Tiny models of the other library, with random weights everywhere: norms, biases, decays and buffers too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from tests.support import decoder_families, hybrid_families, rwkv7_model
from tests.support.family_sizes import ATTENTION, EPS, SMALL, SPECIAL

M = TypeVar("M", bound=nn.Module)


def mamba(**changes: Any) -> Any:
    return transformers.MambaConfig(**{**SMALL, **SPECIAL, "state_size": 4, **changes})


def mamba2(**changes: Any) -> Any:
    options = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16}
    return transformers.Mamba2Config(**{**SMALL, **SPECIAL, **options, **changes})


def mixtral(**changes: Any) -> Any:
    options = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.MixtralConfig(**{**SMALL, **SPECIAL, **ATTENTION, **options, **changes})


def falcon_h1(**changes: Any) -> Any:
    options = {
        "intermediate_size": 40,
        "mamba_d_ssm": 48,
        "mamba_n_heads": 6,
        "mamba_d_head": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
        "lm_head_multiplier": 0.7,
        "embedding_multiplier": 3.0,
        "mlp_multipliers": [0.8, 1.3],
        "key_multiplier": 0.6,
        "attention_out_multiplier": 0.9,
        "attention_in_multiplier": 1.2,
        "ssm_multipliers": [0.5, 1.1, 0.9, 1.3, 0.7],
        "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.4,
    }
    return transformers.FalconH1Config(**{**SMALL, **SPECIAL, **ATTENTION, **options, **changes})


def qwen3_next(**changes: Any) -> Any:
    options = {
        "num_hidden_layers": 3,
        "rms_norm_eps": EPS,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "intermediate_size": 40,
        "head_dim": 16,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 8,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "mlp_only_layers": [1],
    }
    return transformers.Qwen3NextConfig(**{**SMALL, **SPECIAL, **ATTENTION, **options, **changes})


def recurrent_gemma(**changes: Any) -> Any:
    options = {
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "num_key_value_heads": 1,
        "lru_width": 48,
        "attention_window_size": 7,
        "logits_soft_cap": 2.0,
    }
    return transformers.RecurrentGemmaConfig(**{**SMALL, **SPECIAL, **ATTENTION, **options, **changes})


def kimi_linear(**changes: Any) -> Any:
    options = {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "intermediate_size": 40,
        "moe_intermediate_size": 12,
        "n_shared_experts": 2,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 6,
        "qk_nope_head_dim": 8,
        "v_head_dim": 10,
        "linear_head_dim": 16,
        "linear_num_heads": 6,
        "rms_norm_eps": EPS,
    }
    return transformers.KimiLinearConfig(**{**SMALL, **SPECIAL, **ATTENTION, **options, **changes})


def rwkv7(**changes: Any) -> Any:
    ranks = {"decay_low_rank_dim": 5, "gate_low_rank_dim": 7, "a_low_rank_dim": 6, "v_low_rank_dim": 4}
    return rwkv7_model.RWKV7Config(
        **{**SMALL, **SPECIAL, **ranks, "head_dim": 8, "intermediate_size": 40, "norm_eps": EPS, **changes}
    )


VARIANTS: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
    "MambaForCausalLM": (mamba, [{}, {"tie_word_embeddings": False, "expand": 3, "time_step_rank": 5}]),
    "Mamba2ForCausalLM": (mamba2, [{}, {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-2}]),
    "MixtralForCausalLM": (mixtral, [{}, {"sliding_window": 5, "head_dim": 12, "rms_norm_eps": 1e-2}]),
    "FalconH1ForCausalLM": (
        falcon_h1,
        [
            {},
            {"tie_word_embeddings": True, "mamba_rms_norm": True, "rms_norm_eps": EPS},
            {
                "rms_norm_eps": EPS,
                "mamba_rms_norm": True,
                "mamba_norm_before_gate": False,
                "mamba_d_ssm": None,
                "mamba_n_heads": 8,
            },
        ],
    ),
    "KimiLinearForCausalLM": (
        kimi_linear,
        [{}, {"q_lora_rank": 14, "norm_topk_prob": False, "mlp_layer_types": ["sparse", "dense", "sparse"]}],
    ),
    "RecurrentGemmaForCausalLM": (
        recurrent_gemma,
        [{}, {"tie_word_embeddings": False, "block_types": ["attention", "recurrent"], "lru_width": None}],
    ),
    "RWKV7ForCausalLM": (
        rwkv7,
        [
            {},
            {
                "num_hidden_layers": 3,
                "fuse_norm": False,
                "norm_first": False,
                "norm_bias": False,
                "tie_word_embeddings": True,
            }
            | {"intermediate_size": None, "hidden_ratio": 2.5, "head_dim": None, "num_heads": 2, "hidden_act": "gelu"},
        ],
    ),
    "Qwen3NextForCausalLM": (qwen3_next, [{}, {"norm_topk_prob": False, "decoder_sparse_step": 2, "head_dim": 8}]),
    **decoder_families.VARIANTS,
    **hybrid_families.VARIANTS,
}
"""For each class, what makes its configuration, and settings under which it is tried."""

UNTAUGHT = ".indexer."
"""In the names of tensors of theirs that get no gradient."""

CASES = [(name, changes) for name, (_, variants) in VARIANTS.items() for changes in variants]

EXAMPLES = {
    *("FalconH1ForCausalLM", "KimiLinearForCausalLM", "MambaForCausalLM", "Mamba2ForCausalLM", "MixtralForCausalLM"),
    *("Qwen3NextForCausalLM", "RecurrentGemmaForCausalLM"),
}
"""Classes with every way of saying a table, of which all tests are run by default; of the others it is the first
settings in the tests that compare with theirs, and everything in the slow tests."""


def slow_but(quick: Callable[[str, dict[str, Any]], bool]) -> list[Any]:
    """Parameters of a test of all :data:`CASES`: slow, but for those of the examples and those that ``quick`` takes."""
    marks = {True: (), False: (pytest.mark.slow,)}
    return [
        pytest.param(n, changes, marks=marks[n in EXAMPLES or quick(n, changes)], id=f"{n}-{changes}")
        for n, changes in CASES
    ]


def is_first(name: str, changes: dict[str, Any]) -> bool:
    """Whether these are the first settings of a class."""
    return changes is VARIANTS[name][1][0]


each_case = pytest.mark.parametrize(("name", "changes"), slow_but(is_first))
"""A test of one case of each class by default, and of all of the examples'."""

each_case_slowly = pytest.mark.parametrize(("name", "changes"), slow_but(lambda name, changes: False))
"""A test of the examples' cases by default."""

each_class_slowly = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EXAMPLES else (pytest.mark.slow,)) for name in VARIANTS]
)
"""A test of the examples by default."""


def class_of(name: str) -> Any:
    """The class of ``transformers``, or of another package's layout that is written out here."""
    return getattr(transformers, name, None) or getattr(rwkv7_model, name)


GAIN = 0.6
"""Of random matrices and convolutions: with 1, layer after layer makes more of what those before it rounded."""


def build(name: str, changes: dict[str, Any]) -> tuple[Any, PreTrainedModel]:
    """The configuration and the model, with random parameters and buffers."""
    config = VARIANTS[name][0](**changes)
    return config, randomised(lambda: class_of(name)(config)).train(False)


class _Wide(TorchFunctionMode):
    """Makes float64 of what asks for float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        wide = {torch.float32: torch.float64}
        args = [wide.get(value, value) if isinstance(value, torch.dtype) else value for value in args]
        kwargs = {
            key: wide.get(value, value) if isinstance(value, torch.dtype) else value
            for key, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


@contextmanager
def in_float64() -> Iterator[None]:
    """Their models made and run in it compute in float64 throughout, though norms and softmax there ask for float32.

    So what differs from ours is no rounding, on any processor. Experts are theirs one by one, as torch's grouped
    product has no float64.
    """
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(usual)


def randomised(make: Callable[[], M]) -> M:
    """A model of theirs or of ours with random parameters and buffers, the same each time, but for those that follow
    from settings.
    """
    torch.manual_seed(0)  # before it is made: what its initialisation drew is part of some values
    model = make()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith(("_decay", "slope_rate")):
                continue
            if key.endswith("A_log"):
                tensor.uniform_(-3, 0)  # a memory of many tokens: outputs near 0 would let the norm after them round
            elif tensor.ndim >= 2 and "conv" not in key:
                tensor.normal_(std=GAIN * tensor.shape[-1] ** -0.5)
            elif "conv" in key:
                tensor.normal_(std=GAIN)
            else:
                tensor.add_(0.3 * torch.randn_like(tensor))
    return model
