"""The laws of channel mixers, which treat each token for itself."""

from __future__ import annotations

import torch

from seqarch.testing.cases import Case, reference_backends
from seqarch.testing.compare import assert_same_count, require
from seqarch.testing.laws import Law, differentiate, flop_counter


def tokens_alone(case: Case) -> None:
    """The order of tokens does not matter (to 1e-12), and a changed token changes its own output alone (by 1e-9)."""
    channel, x = case.build(), case.inputs(10)
    with case.active(), torch.no_grad():
        y = channel(x)
        apart = float((channel(x.flip(1)).flip(1) - y).abs().max())
        changed = x.clone()
        changed[0, 4] += 1
        moved = (channel(changed) - y).abs().amax(dim=-1) > 1e-9
    require(apart <= 1e-12, f"outputs of the tokens in reverse order: they differ by {apart:.2e}, bound 1e-12")
    places = moved.nonzero().tolist()
    require(places == [[0, 4]], f"a change of token [0, 4] changes the outputs at {places}")


def channel_gradients(case: Case) -> None:
    """Every parameter and the input receive a gradient."""
    channel, x = case.build(), case.inputs(50).requires_grad_()
    with case.active():
        total = (channel(x) * case.inputs(50)).sum()
        found = differentiate(total, {"x": x, **dict(channel.named_parameters())})
    for name, gradient in found.items():
        require(bool(gradient.abs().max() > 0), f"{name} receives no gradient")


def channel_flops(case: Case) -> None:
    """``flops`` equals what a FLOP counter sees of the references."""
    channel = case.build()
    with reference_backends(), torch.no_grad(), flop_counter() as counter:
        channel(case.inputs(10))
    assert_same_count(counter.get_total_flops(), channel.flops(10, 2), "flops of 10 tokens")


CHANNEL_LAWS: tuple[Law, ...] = (tokens_alone, channel_gradients, channel_flops)
"""The laws of channel mixers."""
