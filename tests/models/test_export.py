"""``torch.export`` of prefills and steps: programs that are saved, loaded and give the same numbers."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from seqarch import LanguageModel
from seqarch.layers import MIXERS, build_mixer
from seqarch.models.exporting import register_states

QUICK = ("gated_delta_net",)
LOG_LINEAR = {name for name in MIXERS if name.startswith("log_linear")}
LENGTH_IS_FIXED = {"hyena", "nsa", "path_attention", "s4d", "stick_breaking_attention", *LOG_LINEAR}
BATCH_IS_FIXED = {"hyena", *LOG_LINEAR}


class Prefill(nn.Module):
    """The outputs of a sequence, without the state."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[0]


class Step(nn.Module):
    """What follows a state, and the state after it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, state: Any) -> Any:
        return self.model(x, state)


def there_and_back(program: Any) -> nn.Module:
    """The program as it is loaded from what was saved of it."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def check_prefill(model: nn.Module, inputs: Any, length_is_fixed: bool, batch_is_fixed: bool) -> None:
    shapes = {"x": {0: Dim.STATIC if batch_is_fixed else Dim.AUTO, 1: Dim.STATIC if length_is_fixed else Dim.AUTO}}
    program = there_and_back(torch.export.export(Prefill(model), (inputs(2, 48),), dynamic_shapes=shapes))
    for batch, length in ((2, 48), (2 if batch_is_fixed else 3, 48 if length_is_fixed else 37)):
        x = inputs(batch, length)
        torch.testing.assert_close(program(x), model(x)[0], rtol=1e-5, atol=5e-6)


def check_step(model: Any, inputs: Any) -> None:
    """The state's tensors are inputs; whole numbers in it, such as a cache's length, are part of the program."""
    _, state = model(inputs(2, 33))
    x = inputs(2, 1)
    register_states(state)
    program = there_and_back(torch.export.export(Step(model), (x, state)))
    _, other = model(inputs(2, 33))
    for before in (state, other):
        (y, after), (expected, state_after) = program(x, before), model(x, before)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=5e-6)
        torch.testing.assert_close(after, state_after, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MIXERS]
)
@torch.no_grad()
def test_a_prefill_and_a_step_of_each_mixer(name):
    torch.manual_seed(0)
    mixer = build_mixer(name, d_model=64).eval()

    def inputs(batch: int, length: int) -> Tensor:
        return torch.randn(batch, length, 64)

    check_prefill(mixer, inputs, name in LENGTH_IS_FIXED, name in BATCH_IS_FIXED)
    check_step(mixer, inputs)


@torch.no_grad()
def test_a_whole_language_model():
    torch.manual_seed(0)
    model = LanguageModel(vocab_size=40, d_model=64, pattern="mamba2 attention/swiglu", depth=2).eval()

    def inputs(batch: int, length: int) -> Tensor:
        return torch.randint(40, (batch, length))

    check_prefill(model, inputs, False, False)
    check_step(model, inputs)
