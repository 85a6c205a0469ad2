"""How gates begin: as released, or slowly by the options that each mixer's config names."""

from __future__ import annotations

import pytest
import torch

from experiments.report.starts import start_text
from experiments.studies.initialisation import SLOW
from seqarch import LanguageModel
from seqarch.layers import MIXERS, build_mixer

SLOWED = sorted(name for name, mixer in MIXERS.items() if mixer.Config.slow_gates)


def model(pattern: str, **options: object) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(vocab_size=16, d_model=64, pattern=pattern, depth=1, channel="none", **options)


def test_they_are_those_of_the_study():
    """What ``docs/results/initialisation.md`` measured, option by option."""
    assert set(SLOW) <= set(SLOWED)
    for name, overrides in SLOW.items():
        given = [each.removeprefix(f"model.mixers.{name}.").split("=") for each in overrides.split()]
        assert {option: float(value) for option, value in given} == MIXERS[name].Config.slow_gates


@pytest.mark.parametrize("name", SLOWED)
def test_a_slow_start_is_the_mixer_with_these_options(name):
    slow = model(name, init="slow_gates").stack.layers[0].mixers[0]
    plain = build_mixer(name, d_model=64, **MIXERS[name].Config.slow_gates)
    assert slow.config == plain.config
    released = model(name).stack.layers[0].mixers[0]
    assert released.config == build_mixer(name, d_model=64).config != slow.config
    x = torch.randn(1, 9, 64)
    assert not torch.equal(released(x)[0], slow(x)[0])  # by the gates alone, of the same random numbers


def test_given_options_go_before_them():
    one = model("gla", init="slow_gates", mixers={"gla": {"decay_bias": 2.0}})
    other = model("gla(decay_bias=1.5)", init="slow_gates", mixers={"gla": {"decay_bias": 2.0}})
    assert [each.stack.layers[0].mixers[0].config.decay_bias for each in (one, other)] == [2.0, 1.5]
    assert model("attention", init="slow_gates").config.options_of("attention", {}) == {}


def test_an_unknown_start_is_named():
    with pytest.raises(ValueError, match=r"unknown init 'slow': expected one of release, slow_gates"):
        model("gla", init="slow")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "embedding 0.02, gates as released"),
        ({"init": "slow_gates", "embedding_std": 1}, "embedding 1, gates slow"),
        ({"mixers": {"gla": {"decay_bias": 4, "num_heads": 2}, "kda": {"dt_min": 1e-4}}},
         "embedding 0.02, gates as released but for decay_bias 4"),
        ({"pattern": "gla(decay_bias=3) kda", "init": "slow_gates", "embedding_scale": 50},
         "embedding 0.02 times 50, gates slow but for decay_bias 3"),
    ],
)  # fmt: skip
def test_a_start_in_words(given, text):
    assert start_text({"pattern": "gla", **given}) == text
