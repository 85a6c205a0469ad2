"""Computes ``tests/data/oracles/rwkv7_model.safetensors`` by flash-linear-attention's own model.

    pip install --no-deps flash-linear-attention==0.6.0 fla-core==0.6.0
    python -m tests.support.rwkv7_record [--write]

prints how far the record is from what the package computes of the record's weights and tokens; ``--write`` puts that in
its place, of weights and tokens that are drawn anew where there is no record. The package's kernels run on GPUs alone:
each is replaced by the form in plain torch that the package has beside it.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

from tests.support.paths import ORACLES

RECORD = ORACLES / "rwkv7_model.safetensors"
SETTINGS: dict[str, Any] = {
    **{"model_type": "rwkv7", "vocab_size": 29, "hidden_size": 24, "head_dim": 8, "num_hidden_layers": 3},
    **{"intermediate_size": 36, "decay_low_rank_dim": 5, "gate_low_rank_dim": 7, "a_low_rank_dim": 6},
    **{"v_low_rank_dim": 4, "norm_eps": 0.01, "fuse_norm": False, "fuse_cross_entropy": False, "use_cache": False},
    **{"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02},
}


def plain_model(settings: dict[str, Any]) -> Any:
    """The package's ``RWKV7ForCausalLM``, with its forms in torch in the place of its kernels."""
    from fla.layers import rwkv7 as layer  # pyright: ignore[reportMissingImports]
    from fla.models.rwkv7 import (  # pyright: ignore[reportMissingImports]
        RWKV7Config,
        RWKV7ForCausalLM,
        modeling_rwkv7,
    )
    from fla.modules.token_shift import token_shift_ref  # pyright: ignore[reportMissingImports]
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence  # pyright: ignore[reportMissingImports]
    from fla.ops.rwkv7.fused_addcmul import torch_addcmul_rwkv7  # pyright: ignore[reportMissingImports]
    from fla.ops.rwkv7.fused_k_update import k_update_ref  # pyright: ignore[reportMissingImports]
    from fla.ops.rwkv7.gate_output_correction import gate_output_correction_ref  # pyright: ignore[reportMissingImports]

    def shift(x: Tensor, cu_seqlens: Any = None, **others: Any) -> Any:
        return token_shift_ref(x), None

    def recurrence(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, **others: Any) -> Any:
        o, _ = dplr_recurrence(*(each.transpose(1, 2) for each in (r * r.shape[-1] ** 0.5, k, v, a, b, w)))
        return o.transpose(1, 2), None

    layer.token_shift = modeling_rwkv7.token_shift = shift
    layer.fused_addcmul_rwkv7, layer.fused_k_rwkv7 = torch_addcmul_rwkv7, k_update_ref
    layer.chunk_rwkv7, layer.gate_output_correction = recurrence, gate_output_correction_ref
    return RWKV7ForCausalLM(RWKV7Config(**settings)).eval()


def drawn(model: Any) -> dict[str, Tensor]:
    """Weights, tokens and a gradient of the logits, at random."""
    generator = torch.Generator().manual_seed(0)
    found = {
        f"in.{name}": 0.3 * torch.randn(each.shape, generator=generator) for name, each in model.named_parameters()
    }
    tokens = torch.randint(model.config.vocab_size, (2, 19), generator=generator)
    cotangent = torch.randn(*tokens.shape, model.config.vocab_size, generator=generator)
    return {**found, "in.tokens": tokens, "cotangent.logits": cotangent}


def computed(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's logits, and the gradient of each of its parameters."""
    names = [name for name, _ in model.named_parameters()]
    leaves = {name: given[f"in.{name}"].requires_grad_() for name in names}
    logits = functional_call(model, leaves, (given["in.tokens"],)).logits
    gradients = torch.autograd.grad((logits * given["cotangent.logits"]).sum(), list(leaves.values()))
    return {"out.logits": logits, **{f"grad.{name}": each for name, each in zip(names, gradients, strict=True)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the record")
    write, known, settings = parser.parse_args().write, {}, SETTINGS
    if RECORD.exists():
        known = load_file(RECORD)
        with safe_open(RECORD, "pt") as file:
            settings = json.loads(file.metadata()["config"])
    model = plain_model(settings)
    given = {name: each for name, each in known.items() if name.startswith(("in.", "cotangent."))} or drawn(model)
    found = computed(model, given)
    for name in found.keys() & known.keys():
        distance = (found[name] - known[name]).square().mean().sqrt() / known[name].square().mean().sqrt()
        print(f"{distance.item():.1e}  {name}")
    if write:
        source = "flash-linear-attention 0.6.0, RWKV7ForCausalLM in torch's forms on a CPU"
        tensors = {name: each.detach().contiguous() for name, each in (found | given).items()}
        save_file(tensors, RECORD, {"config": json.dumps(settings), "source": source})


if __name__ == "__main__":
    main()
