"""What every layer says of what it is given: inputs, states and options."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch

from seqarch.layers import CHANNEL_MIXERS, MIXERS, build_channel_mixer, build_mixer, clone_state, materialize
from seqarch.layers.materialize import VALUES
from seqarch.layers.mixer import MOST_COUNTED
from seqarch.layers.modules.kv_cache import KVCache
from seqarch.layers.modules.options import MOST
from seqarch.ops import record_calls
from seqarch.ops.dispatch.checks import annotated_kinds

LAYERS = {**dict.fromkeys(MIXERS, build_mixer), **dict.fromkeys(CHANNEL_MIXERS, build_channel_mixer)}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("x", "given"),
    [
        (torch.zeros(4, 32), r"torch.float32 of shape \[4, 32\]"),
        (torch.zeros(1, 4, 33), r"torch.float32 of shape \[1, 4, 33\]"),
        (torch.zeros(1, 4, 32, dtype=torch.int64), r"torch.int64 of shape \[1, 4, 32\]"),
        ([[0.0] * 32], "list"),
    ],
    ids=["two_dimensions", "width", "integers", "list"],
)
def test_inputs_of_another_kind_are_refused(name, x, given):
    with pytest.raises(ValueError, match=rf"x is {given}, expected floating point \[B, T, 32\]"):
        LAYERS[name](name, d_model=32)(x)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "moe"])  # whose operation widens what it gets
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float32, torch.bfloat16)])
def test_another_dtype_than_the_parameters_is_named(name, dtypes):
    layer = LAYERS[name](name, d_model=32)
    for own, given in (dtypes, dtypes[::-1]):
        with pytest.raises(ValueError, match=rf"x is {given}, its parameters are {own}: expected one dtype"):
            layer.to(own)(torch.zeros(1, 4, 32, dtype=given))
    layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.zeros(1, 4, 32).bfloat16())


def refusal(name: str, **options) -> str | None:
    """Why the layer cannot be built; ``None`` if it can."""
    try:
        with torch.device("meta"):
            LAYERS[name](name, **{"d_model": 64, **options})
    except ValueError as error:
        return str(error)
    return None


def integer(name: str, option: str) -> bool:
    return int in annotated_kinds({**MIXERS, **CHANNEL_MIXERS}[name].Config)[option]


@pytest.mark.parametrize("name", LAYERS)
def test_every_wrong_option_is_an_error_that_names_it(name):
    for option in (field.name for field in fields({**MIXERS, **CHANNEL_MIXERS}[name].Config)):
        for value in (0, -1, 1.5, 7, 1000, 1e300, "x", None, True):
            message = refusal(name, **{option: value})
            assert message is None or (option in message and name in message), message
        for value in (MOST_COUNTED, MOST):
            message = refusal(name, **{option: value})
            assert message is None or (option in message and name in message), message
        for value in (math.nan, math.inf, [1], *([2**63] if integer(name, option) else [])):
            assert f"{option} must be" in str(refusal(name, **{option: value}))


@pytest.mark.parametrize("name", MIXERS)
def test_states_of_another_mixer_width_or_batch_are_named(name):
    mixer, wide, x = build_mixer(name, d_model=32), build_mixer(name, d_model=64), torch.randn(2, 5, 32)
    other = build_mixer("mamba" if hasattr(mixer(x)[1], "cache") else "attention", d_model=32)
    wrong = [
        (other(x)[1], "state is .*, expected .*State, as this mixer returns"),
        (x, "state is Tensor, expected .*State"),
        ((), "state is tuple, expected .*State"),
        (wide(torch.randn(2, 5, 64))[1], r"state\..* is of shape \[2, .*\], expected \[2, "),
        (mixer(torch.randn(3, 5, 32))[1], "the state has 3 rows, the call 2 sequences"),
        (mixer(torch.randn(1, 5, 32))[1], "the state has 1 rows, the call 2 sequences"),
    ]
    good = mixer(x)[1]
    parts = [name for name in good._fields if name != "lengths"]
    wrong += [(good._replace(**{part: "x"}), rf"state\.{part} is str 'x', expected") for part in parts]
    for state, message in wrong:
        with pytest.raises(ValueError, match=f"{type(mixer).__name__}: {message}"):
            mixer(x, state)
    packed = mixer(torch.randn(1, 10, 32), None, [0, 4, 10])[1]
    with pytest.raises(ValueError, match="the state has 2 rows, the call 1 sequences"):
        mixer(x[:1], packed)
    assert mixer(x, packed)[0].shape == x.shape


def test_an_attention_does_not_take_a_window_for_all_keys_nor_all_keys_for_a_window():
    full, window = build_mixer("attention", d_model=32), build_mixer("sliding_window", d_model=32, window=4)
    x = torch.randn(1, 9, 32)
    with pytest.raises(ValueError, match=r"keys is of shape \[1, 9, 1, 32\], expected \[1, 0 to 3, 1, 32\]"):
        window(x, full(x)[1])
    with pytest.raises(ValueError, match="the state holds 3 keys, expected 9"):
        full(x, window(x)[1])


@pytest.mark.parametrize("name", MIXERS)
def test_sizes_of_states_are_checked(name):
    mixer = build_mixer(name, d_model=32)
    for wrong in (-1, 1.5, "2", True, None, 2**63):
        with pytest.raises(ValueError, match=f"batch_size is .*{wrong}.*, expected an int of at least 0"):
            mixer.init_state(wrong)  # pyright: ignore[reportArgumentType]
        if wrong is not None:
            with pytest.raises(ValueError, match=f"max_length is .*{wrong}.*, expected an int of at least 0"):
                mixer.init_state(1, wrong)  # pyright: ignore[reportArgumentType]
    for wrong in ("float32", torch.int64):
        with pytest.raises(ValueError, match=rf"dtype is .*{wrong}.*, expected a floating point torch.dtype"):
            mixer.init_state(1, dtype=wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0), (0, 1)])
@pytest.mark.parametrize("name", LAYERS)
def test_no_rows_and_no_tokens_are_empty_outputs(name, shape):
    layer, x = LAYERS[name](name, d_model=32), torch.randn(*shape, 32, requires_grad=True)
    if name in CHANNEL_MIXERS:
        y = layer(x)
    else:
        y, state = layer(x)
        y = y + layer(x, layer(x, state)[1])[0]
        y = y + layer(x, layer.init_state(shape[0], max_length=9))[0]
    assert y.shape == (*shape, 32)
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", LAYERS)
def test_every_parameter_receives_a_gradient_at_every_length(name):
    """Of zeros where nothing depends on it yet: processes that add gradients up wait for each."""
    layer = LAYERS[name](name, d_model=32)
    for length in (1, 2, 5, 31, 32, 33):
        layer.zero_grad()
        x = torch.randn(2, length, 32)
        state = layer.init_state(2, max_length=3) if name in MIXERS else None
        y = layer(x)[0] + layer(x, state)[0] if name in MIXERS else layer(x)
        extra = layer.auxiliary_loss()
        (y.sum() + (0 if extra is None else extra)).backward()
        without = [key for key, parameter in layer.named_parameters() if parameter.grad is None]
        assert without == [], f"{length} tokens"
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    if name in MIXERS:
        after_others(layer)


def after_others(mixer):
    """A few tokens more, from a state that gradients do not go through, of rows alike and of packed ones."""
    with torch.no_grad():
        states = [mixer(torch.randn(2, 40, 32))[1], mixer(torch.randn(1, 44, 32), None, [0, 40, 44])[1]]
    for state in states:
        mixer.zero_grad()
        y, _ = mixer(torch.randn(2, 3, 32), state)
        extra = mixer.auxiliary_loss()
        (y.sum() + (0 if extra is None else extra)).backward()
        assert all(parameter.grad is not None for parameter in mixer.parameters())


@pytest.mark.parametrize("name", MIXERS)
def test_shapes_are_known_without_data(name):
    with torch.device("meta"):
        mixer, x = build_mixer(name, d_model=32), torch.empty(2, 7, 32)
        y, state = mixer(x)
        assert mixer(x[:, :1], state)[0].shape == (2, 1, 32)
        with torch.no_grad():
            _, state = mixer(x[:, :1], state)
            assert mixer(x[:, :1], state)[0].shape == (2, 1, 32)
    assert y.shape == x.shape


@pytest.mark.parametrize("name", MIXERS)
def test_materialize_of_no_tokens_is_empty(name):
    mixer, x = build_mixer(name, d_model=32), torch.randn(2, 0, 32)
    with record_calls() as calls:
        mixer(x)
    if any(call.op in VALUES for call in calls):
        assert all(found.matrix.shape[-2:] == (0, 0) for found in materialize(mixer, x))


@pytest.mark.parametrize("name", MIXERS)
def test_a_step_without_gradients_leaves_earlier_graphs_alone(name):
    mixer, x = build_mixer(name, d_model=32), torch.randn(2, 5, 32)
    y, state = mixer(x, mixer.init_state(2, max_length=20))
    with torch.no_grad():
        _, after = mixer(x, clone_state(state))
        _, same = mixer(x, state)
    y.sum().backward()
    kept = [leaf for part in after for leaf in (part if isinstance(part, KVCache) else (part,))]
    again = [leaf for part in same for leaf in (part if isinstance(part, KVCache) else (part,))]
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True) if isinstance(a, torch.Tensor))


def test_a_cache_that_queries_alone_learn_from_is_not_written_in_place():
    mixer, x = build_mixer("attention", d_model=32, position="none"), torch.randn(2, 5, 32)
    for parameter in mixer.parameters():
        parameter.requires_grad_(False)
    mixer.query_norm = torch.nn.RMSNorm(32)
    y, state = mixer(x, mixer.init_state(2, max_length=20))
    again, _ = mixer(x, state)
    (y + again).sum().backward()
    assert mixer.query_norm.weight.grad is not None


@pytest.mark.parametrize("width", [32, 96, 160, 256])
@pytest.mark.parametrize("name", MIXERS)
def test_defaults_fit_every_multiple_of_32(name, width):
    mixer = build_mixer(name, d_model=width)
    with torch.no_grad():
        y, state = mixer(torch.randn(1, 3, width))
        y, _ = mixer(torch.randn(1, 1, width), state)
    assert y.shape == (1, 1, width)
    assert y.isfinite().all()
