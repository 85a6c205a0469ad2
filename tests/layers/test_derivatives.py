"""Derivatives beyond the first in reverse mode, through whole mixers: those of differences, none of them zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from seqarch import ops
from seqarch.layers import MIXERS, build_channel_mixer, build_mixer
from seqarch.ops import OPS, BackendError
from seqarch.testing import D_MODEL, error, inputs
from tests.support.backends import available

LENGTH = 12
STEP = 1e-5
BOUND = 1e-5
"""Of central differences in float64."""

OPTIONS: dict[str, dict[str, Any]] = {
    "big_bird": {"block_size": 4, "window_blocks": 2, "random_blocks": 1},
    "moba": {"block_size": 4},
    "dsa": {"top_k": 3, "num_heads": 2, "num_kv_heads": 1},
    "sparse_mla": {"top_k": 3, "num_heads": 2, "q_lora_rank": 6},
    "lolcats": {"window": 4},
    "longformer": {"block_size": 4, "window": 4, "global_tokens": 4},
    "nsa": {
        **{"compressed_length": 4, "compressed_stride": 2, "block_size": 4},
        **{"selected_blocks": 2, "local_blocks": 1, "window": 4},
    },
}
"""What a sequence of a few tokens needs to be more than one block."""

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


class Loss:
    """A mixer's weighed outputs and its auxiliary loss, as a function of input and parameters."""

    def __init__(self, name: str):
        torch.manual_seed(0)
        self.mixer = build_mixer(name, d_model=D_MODEL, **OPTIONS.get(name, {})).double()
        self.parameters = {name: each.detach() for name, each in self.mixer.named_parameters()}
        self.x = inputs(LENGTH)

    def outputs(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(self.mixer, parameters, (x,))[0]

    def __call__(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        loss = (self.outputs(x, parameters).sin() * torch.linspace(-1, 1, LENGTH).unsqueeze(-1)).sum()
        extra = self.mixer.auxiliary_loss()
        return loss if extra is None else loss + extra

    def slopes(self, x: Tensor, parameters: dict[str, Tensor], again: bool = False) -> list[Tensor]:
        leaves = [each if each.requires_grad else each.clone().requires_grad_() for each in (x, *parameters.values())]
        loss = self(leaves[0], dict(zip(parameters, leaves[1:], strict=True)))
        return list(torch.autograd.grad(loss, leaves, create_graph=again))

    def moved(self, tangents: list[Tensor], by: float) -> tuple[Tensor, dict[str, Tensor]]:
        x, *rest = (each + by * t for each, t in zip((self.x, *self.parameters.values()), tangents, strict=True))
        return x, dict(zip(self.parameters, rest, strict=True))


@pytest.mark.parametrize("name", MIXERS)
def test_derivatives_of_any_kind(name: str):
    loss = Loss(name)
    tangents = [torch.randn_like(each) / 8 for each in (loss.x, *loss.parameters.values())]
    ahead, behind = (loss.moved(tangents, by) for by in (STEP, -STEP))

    outputs = (loss.outputs(*ahead) - loss.outputs(*behind)) / (2 * STEP)
    along = (tangents[0], dict(zip(loss.parameters, tangents[1:], strict=True)))
    assert error(jvp(loss.outputs, (loss.x, loss.parameters), along)[1], outputs) < BOUND
    with forward_ad.dual_level(), torch.no_grad():
        duals = {key: forward_ad.make_dual(each, along[1][key]) for key, each in loss.parameters.items()}
        got = forward_ad.unpack_dual(loss.outputs(forward_ad.make_dual(loss.x, tangents[0]), duals)).tangent
    assert error(got, outputs) < BOUND

    if name in ("dsa", "sparse_mla"):  # its loss is detached from all but the indexer, which differences do not see
        keys = ["", *loss.parameters]
        tangents = [t * key.startswith("index") for key, t in zip(keys, tangents, strict=True)]
        along = (tangents[0], dict(zip(loss.parameters, tangents[1:], strict=True)))
        ahead, behind = (loss.moved(tangents, by) for by in (STEP, -STEP))
    differences = [(a - b) / (2 * STEP) for a, b in zip(loss.slopes(*ahead), loss.slopes(*behind), strict=True)]
    leaves = [each.clone().requires_grad_() for each in (loss.x, *loss.parameters.values())]
    # Without the compiled library attention is torch's fused kernel, which refuses second derivatives.
    choices = {} if "chunk_cpp" in available("attention") else {"attention": OPS["attention"].reference}
    with ops.use_backends(**choices):
        first = loss.slopes(leaves[0], dict(zip(loss.parameters, leaves[1:], strict=True)), again=True)
        second = torch.autograd.grad(first, leaves, tangents)
    turned = jvp(grad(loss, (0, 1)), (loss.x, loss.parameters), along)[1]
    for own, by_forward_mode, expected in zip(second, (turned[0], *turned[1].values()), differences, strict=True):
        assert error(own, expected) < BOUND
        assert error(by_forward_mode, expected) < BOUND


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_of_each_sample(name: str):
    loss = Loss(name)
    each = vmap(grad(lambda p, x: loss(x[None], p)), (None, 0))(loss.parameters, loss.x)
    for place, x in enumerate(loss.x):
        expected = loss.slopes(x[None], loss.parameters)[1:]
        for found, one in zip(each.values(), expected, strict=True):
            torch.testing.assert_close(found[place], one, rtol=1e-8, atol=1e-10)


def test_gradients_of_each_sample_through_experts():
    torch.manual_seed(0)
    layer = build_channel_mixer("moe", d_model=8, hidden=6, num_experts=3, top_k=2).double()
    x, parameters = torch.randn(2, 5, 8, dtype=torch.float64), dict(layer.named_parameters())
    each = vmap(grad(lambda p, x: functional_call(layer, p, (x[None],)).sum()), (None, 0))(parameters, x)
    whole = torch.autograd.grad(layer(x).sum(), list(parameters.values()))
    torch.testing.assert_close([found.sum(0) for found in each.values()], list(whole))
    layer = build_channel_mixer("moe", d_model=8, hidden=6, num_experts=3, top_k=2, expert_bias=True).double()
    with pytest.raises(BackendError, match=r"expert_bias counts loads in backward passes: .*expected eval"):
        grad(lambda x: layer(x).sum())(x)
    assert grad(lambda x: layer.eval()(x).sum())(x).abs().max() > 0
