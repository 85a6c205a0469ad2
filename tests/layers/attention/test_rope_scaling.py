"""Rotary positions for longer sequences: the formulas of transformers, and what mixers make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from seqarch.layers import build_mixer
from seqarch.layers.attention.mla import MLAConfig
from seqarch.layers.modules.rope_scaling import ROPE_TYPES, rope_scaling
from seqarch.layers.modules.rotary import rotary_tables
from seqarch.testing import Case, assert_close
from seqarch.testing.laws import causality, split

LONG = {"short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.0, 2.0, 5.0, 9.0]}
ORIGINAL = {"original_max_position_embeddings": 48}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0, **ORIGINAL},
    {"rope_type": "dynamic", "factor": 4.0, "length": 200, **ORIGINAL},
    {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.2, "mscale_all_dim": 0.7, "beta_fast": 16.0, **ORIGINAL},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "truncate": False, "beta_slow": 2.0, **ORIGINAL},
    {"rope_type": "yarn", "factor": 0.5, **ORIGINAL, "original_max_position_embeddings": 4096},
    {"rope_type": "longrope", "factor": 4.0, **LONG, **ORIGINAL},
    {"rope_type": "longrope", "factor": 4.0, "length": 49, **LONG, **ORIGINAL},
    {"rope_type": "longrope", "attention_factor": 1.25, **LONG, **ORIGINAL},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
]


@pytest.mark.parametrize("options", SCALINGS, ids=lambda options: options["rope_type"])
@pytest.mark.parametrize("base", [100.0, 500000.0])
def test_frequencies_and_amplitudes_are_those_of_transformers(options: dict[str, Any], base: float):
    length = options.get("length")
    theirs = {name: value for name, value in options.items() if name != "length"} | {"rope_theta": base}
    original = options.get("original_max_position_embeddings", 48)
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=original, rope_parameters=theirs
    )
    expected, amplitude = ROPE_INIT_FUNCTIONS[options["rope_type"]](config, torch.device("cpu"), seq_len=length)
    scaling = rope_scaling(options, "rotary", base, [8])
    assert scaling is not None
    torch.testing.assert_close(scaling.frequencies(8, base).float(), expected, rtol=2e-6, atol=0)
    assert scaling.amplitude == pytest.approx(amplitude, rel=1e-12)
    cos, sin = rotary_tables(torch.arange(200), 8, base, scaling)
    angle = torch.arange(200).double()[:, None, None] * expected.double()
    torch.testing.assert_close(cos, amplitude * angle.cos(), rtol=0, atol=1e-3)
    torch.testing.assert_close(sin, amplitude * angle.sin(), rtol=0, atol=1e-3)


def test_every_type_is_compared():
    assert {options["rope_type"] for options in SCALINGS} == ROPE_TYPES.keys()


@pytest.mark.parametrize("name", ["attention", "dsa", "moba", "mla", "nsa", "sparse_mla"])
@pytest.mark.parametrize("options", [SCALINGS[2], SCALINGS[4], SCALINGS[8]], ids=lambda options: options["rope_type"])
def test_mixers_turn_by_it_and_keep_the_laws(name: str, options: dict[str, Any]):
    widths = {"qk_rope_head_dim": 8}
    options_of = {"dsa": {"index_width": 8}, "mla": widths, "moba": {"block_size": 16}, "sparse_mla": widths}
    more = options_of.get(name, {})
    layer = type(build_mixer(name, d_model=32))
    case, plain = (
        Case(layer, "", "", {"num_heads": 4, **more, **scaled}) for scaled in ({"rope_scaling": options}, {})
    )
    causality(case)
    split(case)
    with torch.no_grad():
        assert not torch.allclose(case.build()(case.inputs(70))[0], plain.build()(case.inputs(70))[0], atol=1e-3)


def test_latent_attention_scales_all_scores_besides():
    """DeepSeek-V3's ``yarn_apply_mscale``."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

    for options in SCALINGS[3:6]:
        config = MLAConfig(d_model=32, qk_nope_head_dim=16, qk_rope_head_dim=8, rope_scaling=options)
        assert config.scale == pytest.approx(yarn_apply_mscale(options, 24**-0.5), rel=1e-12)
    with torch.no_grad():
        mixer = build_mixer("mla", d_model=32, rope_scaling=SCALINGS[4]).double()
        x = torch.randn(1, 12, 32, dtype=torch.float64)
        steps, state = [], None
        for t in range(12):  # absorbed, the whole sequence expanded
            y, state = mixer(x[:, t : t + 1], state)
            steps.append(y)
        assert_close(torch.cat(steps, dim=1), mixer(x)[0], 1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 2.0}, "rope_type None, expected one of dynamic, linear"),
        ({"rope_type": "lama3"}, "unknown rope_type 'lama3': .* Did you mean 'llama3'"),
        ({"rope_type": "linear"}, "rope_type 'linear': it needs factor"),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "rope_type 'linear' has no option 'rope_theta'"),
        ({"rope_type": "linear", "factor": 0.0}, "factor must be positive, got 0.0"),
        ({"rope_type": "longrope", **LONG, **ORIGINAL}, "needs factor or attention_factor"),
        ({"rope_type": "longrope", "factor": 2.0, **LONG, **ORIGINAL, "long_factor": [1.0]}, "1 numbers, expected 4"),
        ({"rope_type": "longrope", "factor": 2.0, **LONG, **ORIGINAL, "long_factor": [1, 1, 1, 0]}, "positive numbers"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0, **ORIGINAL}, "below"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        build_mixer("attention", d_model=32, num_heads=4, rope_scaling=options)


def test_nothing_else_is_scaled():
    linear = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(ValueError, match="rope_scaling needs position='rotary', got position='none'"):
        build_mixer("attention", d_model=32, position="none", rope_scaling=linear)
    with pytest.raises(ValueError, match="needs at least 4 channels that turn, got 2"):
        build_mixer("attention", d_model=4, num_heads=2, rope_scaling={**linear, "rope_type": "dynamic", **ORIGINAL})
    with pytest.raises(ValueError, match="'yarn' needs a rotary_base above 1, got 1"):
        build_mixer("attention", d_model=32, rotary_base=1.0, rope_scaling={**linear, "rope_type": "yarn", **ORIGINAL})
