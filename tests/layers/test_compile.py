"""``torch.compile`` takes a block of each mixer whole, forward and backward, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor.async_compile import AsyncCompile
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


def run_of(stack: Stack) -> Callable[[Tensor], tuple[Tensor, Tensor | float]]:
    mixers = [module for module in stack.modules() if isinstance(module, Mixer)]

    def run(x: Tensor) -> tuple[Tensor, Tensor | float]:
        y, _ = stack(x)
        losses = [mixer.auxiliary_loss() for mixer in mixers]
        return y, sum(loss for loss in losses if loss is not None)

    torch._dynamo.reset()
    return run


def compiled_agrees(name: str, backend: str) -> None:
    stack = block(name)
    run = run_of(stack)
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


WARNINGS = (
    "ignore:`torch.jit:DeprecationWarning",  # torch's own, inside its compiler
    "ignore:.torch._prims_common.check. is deprecated:FutureWarning",  # torch's own, too
    "ignore:.* should not be instantiated:DeprecationWarning",  # torch's own, too
    "ignore:Torchinductor does not support:UserWarning",  # complex numbers: FFTs run as ever
)

BY_THE_COMPILER = {
    *TRACED,
    *("stick_breaking_attention", "dsa", "nsa", "mlstm", "mamba", "mamba3"),
    *("log_linear_gated_delta_net", "rwkv7", "hgrn", "s4d", "mesa_net"),
}
"""Mixers whose C++ is compiled and run: of each family, and of each kind of arithmetic that the others are made of."""


@pytest.mark.slow
@pytest.mark.usefixtures("new_cache")
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings(*WARNINGS)
@pytest.mark.parametrize("name", sorted(BY_THE_COMPILER))
def test_the_compiled_code_gives_the_same_numbers(name):
    compiled_agrees(name, "inductor")


class Written(Exception):
    """The code is there, and is called."""


def not_compiled(*_: Any) -> Callable[..., None]:
    def kernel(*_: Any) -> None:
        raise Written

    return kernel


@pytest.mark.slow
@pytest.mark.usefixtures("new_cache")
@pytest.mark.filterwarnings(*WARNINGS)
@pytest.mark.parametrize("name", [name for name in MIXERS if name not in BY_THE_COMPILER])
def test_the_code_is_written_and_its_decompositions_give_the_same_numbers(name, monkeypatch: pytest.MonkeyPatch):
    """All of the compiler but g++, which takes four fifths of its time: graphs, decompositions, lowering and C++."""
    compiled_agrees(name, "aot_eager_decomp_partition")
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", not_compiled)
    stack = block(name)
    with functorch_config.patch(force_non_lazy_backward_lowering=True), pytest.raises(Written):
        outputs_and_gradients(torch.compile(run_of(stack), fullgraph=True, backend="inductor"), stack)
