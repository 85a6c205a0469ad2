"""``torch.compile`` takes a block of each mixer whole, forward and backward, with the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from seqarch.layers import FAMILIES, MIXERS, Mixer
from seqarch.models import Stack, StackConfig
from seqarch.testing import assert_close
from tests.support.variants import VARIANTS

BOUND = 1e-4
"""float32: a compiler adds up in another order, which gradients magnify where a decay in (-1, 1) is near 0."""

WIDTH, LENGTH = 32, 40


def block(name: str) -> Stack:
    """A residual block: norm, mixer, norm, SwiGLU; small where the mixer's variants are."""
    torch.manual_seed(0)
    options = VARIANTS.get(name, [{}])[0]
    return Stack(StackConfig(d_model=WIDTH, pattern=name, depth=1, mixers={name: options}))


def outputs_and_gradients(run, stack: Stack) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, weights = (torch.randn(2, LENGTH, WIDTH, generator=generator) for _ in range(2))
    x.requires_grad_()
    y, extra = run(x)
    named = {"x": x, **dict(stack.named_parameters())}
    gradients = torch.autograd.grad((y * weights).sum() + extra, list(named.values()), allow_unused=True)
    found = {f"gradient of {name}": g for name, g in zip(named, gradients, strict=True) if g is not None}
    return {"y": y.detach(), **found}


def compiled_agrees(name: str, backend: str) -> None:
    stack = block(name)
    mixers = [module for module in stack.modules() if isinstance(module, Mixer)]

    def run(x: Tensor) -> tuple[Tensor, Tensor | float]:
        y, _ = stack(x)
        losses = [mixer.auxiliary_loss() for mixer in mixers]
        return y, sum(loss for loss in losses if loss is not None)

    torch._dynamo.reset()
    expected = outputs_and_gradients(run, stack)
    got = outputs_and_gradients(torch.compile(run, fullgraph=True, backend=backend), stack)
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_close(got[key], tensor, BOUND, key)


TRACED = {members[0] for members in FAMILIES.values()}
"""Mixers that are traced in every run of the tests: a mixer of each family."""


@pytest.mark.parametrize("name", sorted(TRACED))
def test_the_graph_is_whole(name):
    """Forward and backward are one graph each in ``test_the_compiled_code_gives_the_same_numbers``, for every mixer."""
    compiled_agrees(name, "aot_eager")


@pytest.fixture(scope="module")
def new_cache() -> Iterator[None]:
    """Nothing that an earlier version of an operator left on disk; headers are compiled once for all mixers."""
    with fresh_cache():
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("new_cache")
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, inside its compiler
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning")  # torch's own, too
@pytest.mark.filterwarnings("ignore:Torchinductor does not support:UserWarning")  # complex numbers: FFTs run as ever
@pytest.mark.parametrize("name", MIXERS)
def test_the_compiled_code_gives_the_same_numbers(name):
    compiled_agrees(name, "inductor")
