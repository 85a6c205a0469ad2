"""Layers, stacks and models, made of their options as keywords."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import dataclass, fields

import pytest
import torch
from torch import nn

from seqarch import CHANNEL_MIXERS, MIXERS, LanguageModel, LMConfig, Mamba2, Mamba2Config, Stack, StackConfig, SwiGlu
from seqarch.layers.modules.configured import Configured

LAYERS = {**MIXERS, **CHANNEL_MIXERS}
STACK = {"d_model": 32, "pattern": "mamba2", "depth": 1}


@dataclass(frozen=True, kw_only=True)
class OwnConfig(Mamba2Config):
    """Somebody's own options."""

    gain: float = 2.0


class Own(Mamba2):
    """Written without a word about keywords."""

    Config = OwnConfig

    def __init__(self, config: OwnConfig, doubled: bool = False):
        super().__init__(config)
        self.gain = config.gain * (2 if doubled else 1)


class Reshaped(LanguageModel):
    """Made of something else."""

    def __init__(self, width: int):
        super().__init__(LMConfig(vocab_size=8, **{**STACK, "d_model": width}))


def same_weights(one: nn.Module, two: nn.Module) -> bool:
    here, there = one.state_dict(), two.state_dict()
    return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


def seeded(make):
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_its_options_is_that_of_their_config(name):
    layer = LAYERS[name]
    config = layer.Config(d_model=64)
    made = seeded(lambda: layer(d_model=64))
    assert made.config == config
    assert same_weights(made, seeded(lambda: layer(config)))
    assert same_weights(made, seeded(lambda: layer(config=config)))
    shown = inspect.signature(layer).parameters
    assert list(shown) == ["config", *(field.name for field in fields(layer.Config))]
    assert shown["d_model"].default is inspect.Parameter.empty
    assert all(shown[each.name].default == each.default for each in fields(layer.Config) if each.name != "d_model")
    assert next(iter(inspect.signature(made).parameters)) == "x"


@pytest.mark.parametrize(("kind", "options"), [(Stack, STACK), (LanguageModel, {**STACK, "vocab_size": 8})])
def test_stacks_and_models_of_their_options(kind, options):
    made = seeded(lambda: kind(**options))
    assert same_weights(made, seeded(lambda: kind(kind.Config(**options))))
    assert made.config == kind.Config(**options)
    assert set(inspect.signature(kind).parameters) == {"config", *(field.name for field in fields(kind.Config))}
    assert same_weights(pickle.loads(pickle.dumps(made)), made)
    assert same_weights(copy.deepcopy(made), made)


WRONG = [
    (lambda: Mamba2(d_model=64, d_stat=16), "Mamba2 has no option 'd_stat': it has d_model, .*Did you mean 'd_state'?"),
    (lambda: Mamba2(), r"Mamba2: it needs d_model \(given nothing\)"),
    (lambda: Mamba2(d_model="64"), r"Mamba2: d_model must be int, got '64' \(given d_model='64'\)"),
    (lambda: Mamba2(Mamba2Config(d_model=64), d_state=16), "Mamba2: given a config and d_state beside it"),
    (lambda: Mamba2({"d_model": 64}), "Mamba2: config is dict .*, expected a Mamba2Config, or options as keywords"),
    (lambda: Own(Mamba2Config(d_model=64)), "Own: config is Mamba2Config .*, expected a OwnConfig"),
    (lambda: SwiGlu(d_model=64, hiden=3), "SwiGlu has no option 'hiden'"),
    (lambda: Stack(**STACK, patern=""), "Stack has no option 'patern': .*Did you mean 'pattern'?"),
    (lambda: Stack(StackConfig(**STACK), depth=2), "Stack: given a config and depth beside it"),
    (lambda: LanguageModel(**STACK), r"LanguageModel: it needs vocab_size \(given d_model=32"),
    (lambda: LanguageModel(**{**STACK, "pattern": "mamba9"}, vocab_size=8), "LanguageModel: unknown mixer 'mamba9'"),
    (lambda: Own(d_model=64, gian=3.0), "Own has no option 'gian': .*Did you mean 'gain'?"),
    (lambda: Own(OwnConfig(d_model=64), trebled=True), "Own: given a config and trebled beside it"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[message[:24] for _, message in WRONG])
def test_a_wrong_option_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_somebodys_own_subclass_takes_its_options_too():
    assert Own(d_model=64, gain=3.0).gain == 3.0
    assert Own(OwnConfig(d_model=64), True).gain == 4.0
    assert Own(OwnConfig(d_model=64), doubled=True).gain == 4.0
    assert list(inspect.signature(Own).parameters)[-1] == "gain"
    made = Own(d_model=64)
    assert type(pickle.loads(pickle.dumps(made))) is Own
    assert type(copy.deepcopy(made)) is Own
    assert Reshaped(64).config.d_model == 64
    assert list(inspect.signature(Reshaped).parameters) == ["width"]


def test_a_compiled_layer_is_what_it_was():
    layer, x = Own(d_model=32).eval(), torch.randn(1, 5, 32)
    compiled = torch.compile(layer, backend="eager")
    assert torch.allclose(compiled(x)[0], layer(x)[0])


def test_what_takes_no_config_is_left_alone():
    class Plain(Configured):
        def __init__(self, width: int, *, bias: bool = False):
            super().__init__()
            self.linear = nn.Linear(width, width, bias=bias)

    assert Plain(3, bias=True).linear.bias is not None
    with pytest.raises(TypeError, match="unexpected keyword argument 'd_model'"):
        Plain(3, d_model=3)
