"""The laws that every stack obeys, whatever its layers hand to one another, share or normalise."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from seqarch.models import Stack
from seqarch.testing import assert_close
from tests.support.one_token import COMPILED


def holds_the_laws(model: Stack, bound: float = 1e-10) -> None:
    """Split anywhere, packed as separate, packed and gone on with, at some places alone, a token at a time.

    Args:
        model: in float64, and so afterwards.
        bound: of the relative differences, but for those of decoded tokens, which are computed in float32.
    """
    width = model.config.d_model
    x = torch.randn(1, 12, width, dtype=torch.float64)
    with torch.no_grad():
        y, _ = model(x)
        state, outputs = model.init_state(1), []
        for piece in x.split([5, 1, 6], dim=1):
            out, state = model(piece, state)
            outputs.append(out)
        assert_close(torch.cat(outputs, 1), y, bound)
        packed, state = model(x, None, [0, 5, 12])
        assert_close(packed[:, 5:], model(x[:, 5:])[0], bound)
        more, _ = model(x[:, 3:8], state, [0, 2, 5])
        assert_close(more[:, 2:], model(torch.cat([x[:, 5:], x[:, 5:8]], 1))[0][:, 7:], bound)
        places = torch.tensor([7, 2])
        assert_close(model(x, places=places)[0], y[:, places], bound)
        single = model.float()
        stepped, state = [], single.init_state(1)
        for token in x.float().split(1, dim=1):
            out, state = single(token, state)
            stepped.append(out)
        assert_close(torch.cat(stepped, 1), y.float(), 1e-4)
        assert all(said.startswith(COMPILED) for said in single.explain_one_token())
    model.double()


def checkpointing_changes_nothing(model: Stack, bound: float = 1e-9) -> None:
    """The gradients are the same where each layer is computed again for them. The layers stay wrapped afterwards."""
    x = torch.randn(1, 12, model.config.d_model, dtype=torch.float64)
    parameters = [each for each in model.parameters() if each.requires_grad]

    def gradients() -> Any:
        return torch.autograd.grad(model(x)[0].sin().sum(), parameters, allow_unused=True)

    plain = gradients()
    for layer in model.layers:
        forward = layer.forward
        layer.forward = lambda *a, f=forward, **k: checkpoint(f, *a, use_reentrant=False, **k)  # type: ignore[method-assign]
    for again, other in zip(gradients(), plain, strict=True):
        assert (again is None) == (other is None)
        if again is not None:
            assert_close(again, other, bound)
