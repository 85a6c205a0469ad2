"""What llama.cpp's file of an RWKV-7 holds: see :mod:`seqarch.pretrained.gguf_architectures`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from seqarch.pretrained.gguf_model import UNBOUNDED, Architecture, Metadata, Model, Named

HEAD_NORM_EPS = 64e-5
"""What llama.cpp adds to the variance in the norm of each head, whatever the settings."""


def _rwkv7(model: Model) -> Metadata:
    settings, options = model.settings, model.mixer("rwkv7")
    only = {"hidden_act": "sqrelu", "norm_first": True, "norm_bias": True, "tie_word_embeddings": False}
    for name, value in only.items():
        if getattr(settings, name) != value:
            raise model.refuse(name, str(value).lower())
    width = options["head_dim"]
    if not math.isclose(width * settings.norm_eps, HEAD_NORM_EPS):
        raise model.refuse("norm_eps", f"{HEAD_NORM_EPS / width:.3g}, at heads of {width} channels")
    return {
        "context_length": UNBOUNDED,
        "embedding_length": settings.hidden_size,
        "block_count": settings.num_hidden_layers,
        "attention.layer_norm_epsilon": float(settings.norm_eps),
        "wkv.head_size": width,
        "attention.decay_lora_rank": settings.decay_low_rank_dim,
        "attention.iclr_lora_rank": settings.a_low_rank_dim,
        "attention.value_residual_mix_lora_rank": settings.v_low_rank_dim,
        "attention.gate_lora_rank": settings.gate_low_rank_dim,
        "feed_forward_length": model.mixer("rwkv_channel_mix")["hidden"],
        "attention.head_count": 0,
    }


def _join_shares(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The shares of all six mixtures of two tokens are one tensor."""
    layer = re.match(r"model\.layers\.(\d+)\.attn\.x_r", next(iter(tensors)))
    if layer is None:
        return tensors
    return {f"blk.{layer[1]}.time_mix_lerp_fused.weight": torch.stack(list(tensors.values()))}


NAMES = {
    r"\.attn_norm\.": ".ln1.",
    r"\.ffn_norm\.": ".ln2.",
    r"\.attn\.g_norm\.": ".attention.ln_x.",
    r"\.attn\.(.)_lora\.lora\.0\.weight": r".attention.\g<1>1.weight",
    r"\.attn\.(.)_lora\.lora\.2\.weight": r".attention.\g<1>2.weight",
    r"\.attn\.(.)_lora\.lora\.2\.bias": r".attention.\g<1>0.weight",
    r"\.attn\.((?:k_k|k_a|r_k)$)": r".attention.\1.weight",
    r"\.attn\.": ".attention.",
    r"\.ffn\.x_k$": ".feed_forward.x_k.weight",
    r"\.ffn\.": ".feed_forward.",
}
"""In the names of their tensors, what ``gguf``'s table calls otherwise; the first that is found holds."""


def _change_rwkv7(model: Model, name: str, tensor: Tensor) -> list[Named]:
    for theirs, known in NAMES.items():
        renamed = re.sub(theirs, known, name)
        if renamed != name:
            name = renamed
            break
    if name.endswith("r_k.weight"):
        tensor = tensor.flatten()
    found = [(name, tensor)]
    if rate := re.fullmatch(r"(model\.layers\.0\.attention)\.a([012]\.weight)", name):
        # there are maps of a first value in the first layer too, of the rates' rank; they are not used
        found.append((f"{rate[1]}.v{rate[2]}", tensor))
    return found


RWKV7 = Architecture("rwkv7", _rwkv7, _change_rwkv7, join=_join_shares)
