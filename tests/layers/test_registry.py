"""Layers by name: registered, and by where they are imported from."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

import seqarch
from seqarch import CHANNEL_MIXERS, MIXERS, ChannelMixer, LayerConfig, Mamba2, Mixer, Retention, Stack, SwiGlu
from seqarch.layers import LayerConfig as Base
from seqarch.models import parse_pattern, tile_pattern


@dataclass(frozen=True, kw_only=True)
class ScaleConfig(LayerConfig):
    """Options of :class:`Scale`."""

    by: float = 2.0


class Scale(ChannelMixer):
    """``y = by x``."""

    Config = ScaleConfig

    def forward(self, x: Tensor) -> Tensor:
        return self.config.by * x

    def flops(self, length: int, batch_size: int = 1) -> int:
        return 0


class Leaky(Retention):
    """A mixer of somebody's own."""


class Unfinished(Mixer):
    """Without what a mixer owes."""

    Config = Base


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """What a test registers is gone after it."""
    for registry in (MIXERS, CHANNEL_MIXERS):
        for name in ("leaky", "scale"):
            monkeypatch.setitem(registry, name, SwiGlu)
            del registry[name]


def test_what_is_registered_is_in_patterns():
    seqarch.register_mixer("leaky", Leaky)
    seqarch.register_channel_mixer("scale", Scale)
    seqarch.register_mixer("leaky", Leaky)
    stack = Stack(d_model=32, pattern="leaky/scale mamba2", depth=2, channels={"scale": {"by": 3.0}})
    assert type(stack.layers[0].mixers[0]) is MIXERS["leaky"] is Leaky
    assert stack.layers[0].channel.config.by == 3.0
    assert type(seqarch.build_mixer("leaky", d_model=32)) is Leaky


def test_a_class_that_is_written_anew_takes_the_place_of_its_former_self():
    """As a cell that is run again, or a module that is reloaded, gives it."""
    again = type("Leaky", (Retention,), {"__module__": Leaky.__module__, "__qualname__": "Leaky"})
    seqarch.register_mixer("leaky", Leaky)
    seqarch.register_mixer("leaky", again)
    assert MIXERS["leaky"] is again


WRONG = [
    (
        "mamba2",
        Leaky,
        "mixer 'mamba2' is .*mamba2.Mamba2 already, and cannot be .*test_registry.Leaky too",
    ),
    ("zamba2", Leaky, "mixer 'zamba2' is seqarch.layers.hybrid.zamba2:Zamba2 already, and cannot be .*Leaky too"),
    ("my leaky", Leaky, "cannot register the name str 'my leaky', expected letters, digits and _"),
    ("2leaky", Leaky, "cannot register the name str '2leaky'"),
    (3, Leaky, "cannot register the name int 3"),
    ("none", Leaky, "cannot register the name str 'none'"),
    ("scale", Scale, "mixer: cannot register 'scale': .*test_registry.Scale is no class that derives from .*Mixer"),
    ("leaky", "Leaky", "cannot register 'leaky': str 'Leaky' is no class"),
    ("own", Unfinished, "test_registry.Unfinished does not define flops|.*mix, new_state"),
    ("own", type("Own", (Leaky,), {"Config": dict}), "the Config of .*Own is type .*, expected a frozen dataclass"),
]


@pytest.mark.parametrize(("name", "layer", "message"), WRONG)
def test_what_cannot_be_registered(name, layer, message):
    before = dict(MIXERS)
    with pytest.raises(ValueError, match=message):
        seqarch.register_mixer(name, layer)
    assert before == MIXERS
    if layer is Scale:
        with pytest.raises(ValueError, match=r"channel mixer 'swiglu' is .*SwiGlu already, and cannot be .*Scale too"):
            seqarch.register_channel_mixer("swiglu", Scale)
        assert CHANNEL_MIXERS["swiglu"] is SwiGlu


def test_a_path_stands_where_a_name_may():
    leaky, dotted, scale = f"{__name__}:Leaky", f"{__name__}.Leaky", f"{__name__}:Scale"
    pattern = f"2*mamba2 {leaky}+{dotted}/{scale}"
    assert [str(layer) for layer in parse_pattern(pattern)] == ["mamba2", "mamba2", f"{leaky}+{dotted}/{scale}"]
    assert tile_pattern(pattern, 6)[5].mixers == (leaky, dotted)
    options = {"mixers": {leaky: {"num_heads": 2}}, "channels": {scale: {"by": 3.0}}}
    stack = Stack(d_model=32, pattern=pattern, depth=3, **options)
    layer = stack.layers[2]
    assert [type(mixer) for mixer in layer.mixers] == [Leaky, Leaky]
    assert [mixer.config.num_heads for mixer in layer.mixers] == [2, None]
    assert layer.channel.config.by == 3.0
    assert stack(torch.randn(1, 4, 32))[0].shape == (1, 4, 32)
    assert seqarch.mixer_class("mamba2") is Mamba2
    assert type(seqarch.build_channel_mixer(scale, d_model=32)) is Scale
    assert leaky not in MIXERS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("leaky", "unknown mixer 'leaky': expected one of attention"),
        (f"{__name__}:Leeky", "has no Leeky. Did you mean 'Leaky'?"),
        (
            "nowhere.mixers:Leaky",
            "cannot import nowhere.mixers: No module named 'nowhere'; is its folder in PYTHON",
        ),
        (f"{__name__}:Scale", "Scale is no class that derives from seqarch.layers.Mixer"),
        ("a..b", "expected a registered name or an import path, as in 'package.module:Class'"),
        (f"{__name__}:Unfinished", "does not define"),
        (None, "unknown mixer None"),
    ],
)
def test_a_path_to_nothing(name, message):
    with pytest.raises(ValueError, match=message):
        seqarch.build_mixer(name, d_model=32)


def test_a_module_that_fails_says_so_itself(monkeypatch):
    module = ModuleType("half_made")
    monkeypatch.setitem(sys.modules, "half_made", module)
    with pytest.raises(ValueError, match="half_made has no Leaky"):
        Stack(d_model=32, pattern="half_made:Leaky", depth=1)
