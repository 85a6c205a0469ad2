"""RWKV-7 against flash-linear-attention's own model, whose logits and gradients are recorded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.func import functional_call

from seqarch.interop import lm_config, weight_map
from seqarch.models import LanguageModel
from seqarch.testing import assert_close
from tests.support.paths import ORACLES
from tests.support.rwkv7_model import RWKV7Config, RWKV7ForCausalLM

BOUND = 1e-5


def ours(config: dict, leaves: dict[str, Tensor], tokens: Tensor) -> Tensor:
    model = LanguageModel(lm_config(config)).eval()
    return functional_call(model, weight_map(config).to_seqarch(leaves), (tokens,))[0]


def by_equations(config: dict, leaves: dict[str, Tensor], tokens: Tensor) -> Tensor:
    return functional_call(RWKV7ForCausalLM(RWKV7Config(**config)), leaves, (tokens,)).logits


@pytest.mark.parametrize("compute", [ours, by_equations])
def test_logits_and_gradients_are_the_packages(compute):
    """And those of the equations that the other tests compare with, which run wherever torch does."""
    with safe_open(ORACLES / "rwkv7_model.safetensors", "pt") as file:
        record, config = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118
    tokens = record.pop("in.tokens")
    leaves = {name[3:]: each.requires_grad_() for name, each in record.items() if name.startswith("in.")}
    logits = compute(config, leaves, tokens)
    assert_close(logits, record["out.logits"], BOUND, "logits")
    gradients = torch.autograd.grad((logits * record["cotangent.logits"]).sum(), list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        assert_close(gradient, record[f"grad.{name}"], BOUND, f"gradient of {name}")
