"""Truncated backpropagation through time: segments of a sequence, whose states go on and whose gradients stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seqarch.layers import MIXERS, detach_state
from seqarch.models import LanguageModel, LMConfig
from tests.support.variants import VARIANTS

LENGTH, SEGMENT = 40, 16


def segmented(model: LanguageModel, tokens: torch.Tensor, targets: torch.Tensor, cut: bool) -> torch.Tensor:
    """The loss over segments, summed; with a cut, each goes back by itself."""
    losses, state = [], None
    for begin in range(0, LENGTH, SEGMENT):
        part = slice(begin, begin + SEGMENT)
        loss, state = model.loss_and_state(tokens[:, part], targets[:, part], state, reduction="sum")
        if cut:
            loss.backward()
            state = detach_state(state)
        losses.append(loss.detach() if cut else loss)
    return torch.stack(losses).sum()


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in MIXERS for options in VARIANTS.get(name, [{}])[-1:]], ids=str
)
def test_every_mixer_carries_its_state_over_segments(name: str, options: dict[str, Any]):
    """The loss is that of the whole; without a cut the gradients are too, and with one those of the first segment."""
    torch.manual_seed(0)
    config = LMConfig(vocab_size=11, d_model=32, pattern=name, depth=2, channel="none", mixers={name: options})
    model = LanguageModel(config).double().eval()
    tokens, targets = torch.randint(11, (2, 2, LENGTH))
    whole = model.loss(tokens, targets, reduction="sum")
    expected = torch.autograd.grad(whole, [*model.parameters()], materialize_grads=True)
    parts = segmented(model, tokens, targets, cut=False)
    torch.testing.assert_close(parts, whole)
    found = torch.autograd.grad(parts, [*model.parameters()], materialize_grads=True)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)

    cut = segmented(model, tokens, targets, cut=True)
    torch.testing.assert_close(cut, whole.detach())
    truncated = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    assert any(not torch.allclose(one, other, rtol=1e-4) for one, other in zip(expected, truncated, strict=True))
    model.zero_grad()
    model.loss(tokens[:, :SEGMENT], targets[:, :SEGMENT], reduction="sum").backward()
    first = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    later = torch.full_like(targets, -100)
    later[:, :SEGMENT] = targets[:, :SEGMENT]
    model.zero_grad()
    segmented(model, tokens, later, cut=True)
    again = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)
