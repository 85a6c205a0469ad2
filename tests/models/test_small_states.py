"""States of 16, 8 and 4 bits: of every mixer, in every way to use a state, and what they cost."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import seqarch
from seqarch.layers import MIXERS, measured_state_bytes
from seqarch.layers.small_state import SmallState
from seqarch.models import LanguageModel, Stack, StackConfig, dequantize_state, quantize_state
from seqarch.models.stack import in_turn
from seqarch.serving import Generator
from seqarch.testing import assert_close, error
from tests.support.one_token import COMPILED

OPTIONS = {
    "moba": {"block_size": 4},
    "nsa": {"compressed_length": 4, "compressed_stride": 2, "block_size": 4, "window": 6},
    "big_bird": {"block_size": 4},
    "dsa": {"top_k": 4},
    "sliding_window": {"window": 6},
    "lolcats": {"window": 6},
    "longformer": {"window": 6},
}
"""So that short sequences meet blocks and windows that are full."""

FORMS: list[dict[str, Any]] = [
    {"name": "bfloat16", "rounding": "stochastic"},
    {"name": "int8"},
    {"name": "int8", "rounding": "stochastic", "error_feedback": True},
    {"name": "int4", "error_feedback": True, "group_size": 16},
]
BOUNDS = {"bfloat16": 0.02, "int8": 0.08, "int4": 0.8}
"""Of the outputs of any mixer with random weights after 20 tokens: the share by which they differ from full states."""

CACHED = ("attention", "mla", "moba", "nsa", "dsa", "sliding_window", "longformer", "big_bird")
"""Mixers whose state is all keys and values."""


def stack(*names: str, width: int = 32, **options: Any) -> Stack:
    torch.manual_seed(0)
    mixers = {name: OPTIONS[name] for name in names if name in OPTIONS}
    config = StackConfig(d_model=width, pattern=" ".join(names), depth=len(names), mixers=mixers, **options)
    return Stack(config).eval()


def read(model: Stack, x: Tensor, pieces: tuple[int, ...], room: int | None = None) -> tuple[Tensor, Any]:
    state = None if room is None else model.init_state(len(x), room)
    outputs = []
    for piece in x.split(pieces, 1):
        y, state = in_turn(model._layers(), piece, state, None)
        outputs.append(y)
    return torch.cat(outputs, 1), state


@torch.no_grad()
@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("forms", [FORMS[2:3], pytest.param(FORMS[:2] + FORMS[3:], marks=pytest.mark.slow)], ids=len)
def test_float32_is_the_mixer_itself_and_bytes_are_those_of_the_tensors(name: str, forms: list[dict[str, Any]]):
    model, x, pieces = stack(name), torch.randn(2, 20, 32), (7, 1, 3, 1, 1, 0, 7)
    expected, _ = read(model, x, pieces)
    quantize_state(model, "float32")
    got, state = read(model, x, pieces)
    assert torch.equal(got, expected)
    full = measured_state_bytes(state)
    for form in forms:
        got, state = read(quantize_state(model, **form), x, pieces)
        assert error(got, expected) < BOUNDS[form["name"]], form
        assert model.state_bytes(20, 2) == measured_state_bytes(state) < full
        assert measured_state_bytes(model.init_state(2, 20)) == model.state_bytes(20, 2)
    assert torch.equal(read(dequantize_state(model), x, pieces)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("name", [*CACHED[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in CACHED[1:])])
def test_any_split_of_a_sequence_reads_the_same_keys(name: str):
    """Keys and values have one code each, which their own token reads too."""
    model, x = quantize_state(stack(name).double(), "int4", rounding="stochastic"), torch.randn(2, 20, 32).double()
    whole, _ = read(model, x, (20,))
    for pieces in ((1, 19), (9, 2, 0, 9), (1,) * 20):
        for room in (None, 25):
            assert_close(read(model, x, pieces, room)[0], whole, 1e-6, f"{pieces} {room}")


@torch.no_grad()
@pytest.mark.parametrize(
    "form", [pytest.param(f, marks=[pytest.mark.slow] * (f is not FORMS[2])) for f in FORMS], ids=str
)
def test_rows_of_every_mixer_go_on_as_they_would_alone(form: dict[str, Any], tmp_path):
    """Packed, joined after files, chosen, taken back; the noise is of the position in each sequence."""
    torch.manual_seed(0)
    lm = LanguageModel(vocab_size=11, d_model=32, pattern=" ".join(MIXERS), depth=len(MIXERS), mixers=OPTIONS).double()
    quantize_state(lm.eval(), **form)
    rows, more = [torch.randint(11, (1, length)) for length in (6, 1, 9)], torch.randint(11, (3, 4))
    alone = [lm(row) for row in rows]
    expected = torch.cat([lm(more[i : i + 1], seqarch.state.clone(state))[0] for i, (_, state) in enumerate(alone)])
    packed, at = torch.cat(rows, 1), [0, 6, 7, 16]
    logits, state = lm(packed, None, at)
    assert_close(logits, torch.cat([own for own, _ in alone], 1), 1e-6)
    assert_close(lm(more, seqarch.state.clone(state))[0], expected, 1e-6, "packed")
    for i, (_, own) in enumerate(alone):
        seqarch.state.save(own, tmp_path / f"{i}", lm)
    joined = seqarch.state.join([seqarch.state.load(tmp_path / f"{i}", lm) for i in range(3)])
    assert_close(lm(more, seqarch.state.clone(joined))[0], expected, 1e-6, "joined")
    chosen = seqarch.state.select(joined, [2, 0])
    assert_close(lm(more[[2, 0]], chosen)[0], expected[[2, 0]], 1e-6, "chosen")
    twice = lm(torch.cat([more[i] for i in range(3)])[None], joined, [0, 4, 8, 12])[0]
    assert_close(twice.view(3, 4, -1), expected, 1e-6, "packed again")


CAPTURED = ("gated_delta_net", "mamba2", "gla", "attention", "min_gru")


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [*CAPTURED[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in CAPTURED[1:])]
)
def test_a_captured_token_reads_and_writes_codes(name: str):
    """The tape's rounding differs in the last bits, by which a code may fall on the other side."""
    model, x = stack(name, width=64), torch.randn(2, 30, 64)
    for form in FORMS[1:3]:
        quantize_state(model, **form)
        expected, _ = read(model, x, (9, *(1,) * 21), 40)
        _, state = model(x[:, :9], model.init_state(2, 40))
        outputs = []
        for t in range(9, 30):
            y, state = model(x[:, t : t + 1], state)
            outputs.append(y)
        assert_close(torch.cat(outputs, 1), expected[:, 9:], 1e-3)
        (said,) = model.explain_one_token()
        assert said.startswith(COMPILED)
        assert COMPILED != "compiled" or "seqarch.encode_state" in said
        assert model.state_bytes(40, 2) == measured_state_bytes(state)
    before, _ = read(quantize_state(model, "int4", rounding="stochastic"), x, (9, *(1,) * 21))
    after, _ = read(quantize_state(model, "int4", rounding="stochastic", seed=1), x, (9, *(1,) * 21))
    assert error(after, before) > 1e-3  # a program of the former seed would not be right


def test_a_model_is_the_same_before_and_after():
    model = stack("gated_delta_net", "attention+mamba2", "based")
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    quantize_state(model, "int8", keep="layers.1.mixers.1")
    small = [path for path, module in model.named_modules() if isinstance(module, SmallState)]
    assert small == ["layers.0.mixers.0", "layers.1.mixers.0", "layers.2.mixers.0"]
    assert list(model.state_dict()) == names
    x = torch.randn(1, 6, 32)
    expected = model(x)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x)[0], expected)
        assert other.state_bytes(9) == model.state_bytes(9)
    assert [type(module) for module in dequantize_state(model).modules()] == kinds


def gradients(model: Stack) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_gradients_pass_by_the_rounding_of_keys_and_stop_at_states():
    model = stack("attention", "gla").double()
    x = torch.randn(1, 8, 32, dtype=torch.float64)
    model(x)[0].square().sum().backward()
    full = gradients(model)
    model.zero_grad()
    y, state = quantize_state(model, "bfloat16")(x)
    y.square().sum().backward()
    for got, expected in zip(gradients(model), full, strict=True):
        assert_close(got, expected, 0.05)
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor))


@pytest.mark.slow
@torch.no_grad()
def test_requests_with_small_states_give_what_they_give_alone():
    torch.manual_seed(0)
    lm = LanguageModel(vocab_size=20, d_model=32, pattern="gated_delta_net attention", depth=2).eval()
    quantize_state(lm, "int8", rounding="stochastic")
    prompts = ([1, 2, 3, 4, 5], [6, 7], [8])
    generator = Generator(lm, max_rows=2)
    requests = [generator.submit(prompt, max_new_tokens=6) for prompt in prompts]
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.result().tolist() == lm.generate(prompt, 6)[0].tolist()


def test_what_does_not_fit_is_refused():
    model = stack("gla", "attention")
    x = torch.randn(1, 3, 32)
    _, full = model(x)
    _, small = quantize_state(model, "int8")(x)
    with pytest.raises(ValueError, match=r"state.recurrent is Tensor, expected Coded"):
        model(x, full)
    with pytest.raises(ValueError, match=r"state\.\w+\.codes is of shape"):
        quantize_state(model, "int4")(x, small)
    with pytest.raises(ValueError, match=r"state.recurrent is Coded .*, expected \[1, 4, 4, 8\]"):
        dequantize_state(model)(x, small)
    with pytest.raises(
        ValueError, match=r"state\.cache is CodedCache, expected KVCache: the state is of another format"
    ):
        model._mixers()[1](x, small[1][0])
    with pytest.raises(ValueError, match="no mixer whose state is quantised"):
        dequantize_state(model)
    with pytest.raises(ValueError, match="mixer to keep"):
        quantize_state(model, "int8", keep="layers.7")
    with pytest.raises(ValueError, match="no mixer left"):
        quantize_state(model, "int8", keep="layers.*")
    with pytest.raises(ValueError, match="format of states"):
        quantize_state(model, "int9")
    assert not any(isinstance(module, SmallState) for module in model.modules())
