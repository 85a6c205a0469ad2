"""Sizes that are solved for a run's match: what is asked for is what a model really has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from experiments.config.build import build_model, resolve
from experiments.config.matching import matched, sizes
from experiments.config.overrides import compose
from experiments.config.schema import run_config, to_dict
from experiments.config.targets import MatchConfig
from experiments.sweeps.execute import resolve_composed
from experiments.training.dry_run import plan
from experiments.util.errors import ConfigError
from seqarch.layers import CHANNEL_MIXERS, MIXERS, build_channel_mixer, build_mixer, measured_state_bytes
from seqarch.layers.linear_attention.linear_attention import LinearAttention, LinearAttentionConfig
from seqarch.models import LanguageModel, LMConfig
from tests.support.runs import tiny_config

MATCHED = ["delta_net", "gated_delta_net", "kda", "gla", "mamba2", "mamba", "mlstm", "retention", "rwkv7"]


def options(pattern: str, depth: int = 2, **others) -> LMConfig:
    return LMConfig(**{"vocab_size": 64, "d_model": 64, "pattern": pattern, "depth": depth, **others})


def built(config: LMConfig, length: int) -> tuple[int, int, int]:
    """Parameters of all and of the layers, and the bytes of the state: of tensors, not by formula."""
    model = LanguageModel(config)
    with torch.no_grad():
        _, state = model(torch.zeros(1, length, dtype=torch.int64))
    layers = sum(parameter.numel() for parameter in model.stack.parameters())
    return sum(parameter.numel() for parameter in model.parameters()), layers, measured_state_bytes(state)


@pytest.mark.parametrize("name", MATCHED)
def test_parameters_and_state_are_within_the_tolerance(name):
    for kib in (8, 20, 64):
        match = MatchConfig(parameters="148k", state_bytes=f"{kib}KiB")
        config = matched(options(name), match, 32)
        parameters, _, state = built(config, 32)
        for given, wanted in ((parameters, 148_000), (state, 1024 * kib)):
            assert 1 / 1.03 <= given / wanted <= 1.03, (kib, config)
        assert matched(config, match, 32) == config  # What serves already stays.


@pytest.mark.parametrize("name", MIXERS)
def test_size_options_are_those_of_the_config(name):
    """Each brings a layer of another size, at the value that its attribute had already: the same layer."""
    mixer = MIXERS[name]
    config, given = mixer.Config(d_model=64), {}
    for option, attribute in mixer.Config.size_options.items():
        value = getattr(config, attribute)
        if value is not None:
            given[option] = value
    same, plain = build_mixer(name, d_model=64, **given), build_mixer(name, d_model=64)
    assert [p.shape for p in same.parameters()] == [p.shape for p in plain.parameters()]
    assert len(mixer.Config.size_options) <= 3


@pytest.mark.parametrize("name", CHANNEL_MIXERS)
def test_a_channel_mixer_brings_the_parameters(name):
    config = matched(options("attention", channel=name), MatchConfig(parameters="2M"), 16)
    assert built(config, 16)[0] == pytest.approx(2_000_000, rel=0.01)
    assert not config.mixers
    with torch.device("meta"):
        assert build_channel_mixer(name, d_model=64, **config.channels[name]).config.hidden is not None


def test_layers_are_counted_without_the_vocabulary():
    config = matched(options("gla", vocab_size=8192), MatchConfig(parameters="140k", count="layers"), 16)
    assert built(config, 16)[1] == pytest.approx(140_000, rel=0.01)


def test_without_a_channel_mixer_the_mixers_bring_both():
    config = matched(options("gla", channel="none"), MatchConfig(parameters="58k", state_bytes="20KiB"), 16)
    parameters, _, state = built(config, 16)
    assert parameters == pytest.approx(58_000, rel=0.03)
    assert state == pytest.approx(20 * 1024, rel=0.03)
    config = matched(options("attention", channel="none"), MatchConfig(parameters="60k"), 16)
    assert built(config, 16)[0] == pytest.approx(60_000, rel=0.03)
    assert config.mixers["attention"]["head_dim"] > 64


def test_in_a_hybrid_bounded_states_come_to_one_multiple_and_the_cache_stays():
    given = options("mamba2 gated_delta_net attention", depth=3)
    before = {name: build_mixer(name, d_model=64).state_bytes(32) for name in ("mamba2", "gated_delta_net")}
    config = matched(given, MatchConfig(parameters="300k", state_bytes="60KiB"), 32)
    parameters, _, state = built(config, 32)
    assert parameters == pytest.approx(300_000, rel=0.03)
    assert state == pytest.approx(60 * 1024, rel=0.03)
    assert "attention" not in config.mixers
    after = {name: build_mixer(name, d_model=64, **config.mixers[name]).state_bytes(32) for name in before}
    shares = [after[name] / before[name] for name in before]
    assert shares[0] == pytest.approx(shares[1], rel=0.1)


def test_branches_and_several_channel_mixers_are_counted():
    given = options("sliding_window+gla/mlp mamba2/swiglu", depth=4)
    config = matched(given, MatchConfig(parameters="300k", state_bytes="90KiB"), 256)
    parameters, _, state = built(config, 256)
    assert parameters == pytest.approx(300_000, rel=0.03)
    assert state == pytest.approx(90 * 1024, rel=0.03)


def test_sizes_that_a_pattern_gives_stay_and_the_others_are_solved_for():
    """Layers of one mixer with options of their own are weighed one by one."""
    pattern = "mamba2(d_state=8) mamba2 sliding_window(window=4)/mlp(hidden=10) mamba2(conv_width=2)/mlp"
    config = matched(options(pattern, 8, channel="none"), MatchConfig(parameters="350k", state_bytes="150KiB"), 64)
    model = LanguageModel(config)
    parameters, _, state = built(config, 64)
    assert parameters == pytest.approx(350_000, rel=0.03)
    assert state == pytest.approx(150 * 1024, rel=0.03)
    assert config.pattern == pattern
    first, second, third, fourth = (model.stack.layers[i] for i in range(4))
    assert first.mixers[0].config.d_state == 8
    assert second.mixers[0].config.d_state == fourth.mixers[0].config.d_state == config.mixers["mamba2"]["d_state"] != 8
    assert (third.mixers[0].config.window, third.channel.config.hidden) == (4, 10)
    assert fourth.channel.config.hidden == config.channels["mlp"]["hidden"]
    assert sizes(options("mamba2(d_state=8)", 2)).keys() == {"mamba2", "swiglu"}
    assert "d_state" not in sizes(options("mamba2(d_state=8)", 2))["mamba2"]


def test_the_state_is_measured_where_it_is_asked_for():
    """A window of w is full after w - 1 tokens."""
    config = matched(options("sliding_window"), MatchConfig(state_bytes="20KiB", state_length=256), 4)
    assert built(config, 256)[2] == pytest.approx(20 * 1024, rel=0.03)
    with pytest.raises(ConfigError, match="KiB of state after 4 tokens; the closest is sliding_window with window="):
        matched(options("sliding_window"), MatchConfig(state_bytes="20KiB"), 4)


REFUSED = {
    "a state that grows": (
        ("attention",),
        {"state_bytes": "20KiB"},
        "match.state_bytes: the state of attention grows with the sequence.* match.state_bytes=null .*num_kv_heads",
    ),
    "more parameters than are asked for": (
        ("min_gru",),
        {"parameters": "100k", "state_bytes": "20KiB"},
        "no sizes of min_gru, swiglu come within 3% of 20 KiB of state after 16 tokens and 100,000 parameters; the"
        r" closest is min_gru with d_inner=2560; swiglu with hidden=1: 20 KiB of state after 16 tokens and 1,002,176",
    ),
    "shared parameters": (("gla(share=a) gla(share=a)",), {"parameters": "100k"}, "layers share parameters"),
    "a cache that is larger alone": (
        ("mamba2 attention",),
        {"state_bytes": "4KiB"},
        "no sizes of mamba2 come within 3% of 4 KiB of state after 16 tokens; the closest is mamba2 with d_state=1",
    ),
}


@pytest.mark.parametrize(("given", "match", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_matched_is_refused_with_the_closest(given, match, message):
    with pytest.raises(ConfigError, match=message):
        matched(options(*given), MatchConfig(**match), 16)


def test_a_mixer_of_ones_own_takes_part(monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class OwnConfig(LinearAttentionConfig):
        size_options: ClassVar[dict[str, str]] = {"rank": "rank"}

        rank: int = 4

        def __post_init__(self):
            super().__post_init__()
            if self.rank % 3 == 0:
                raise ValueError("rank must be no multiple of 3")

        @property
        def keys(self) -> int:
            return 2 * self.rank

    class Own(LinearAttention):
        Config = OwnConfig

    class Fixed(LinearAttention):
        """Its config names no sizes."""

    class FixedConfig(LinearAttentionConfig):
        size_options: ClassVar[dict[str, str]] = {}

    Fixed.Config = FixedConfig
    monkeypatch.setitem(MIXERS, "own", Own)
    monkeypatch.setitem(MIXERS, "fixed", Fixed)
    with pytest.raises(ConfigError, match=r"the sizes of own cannot be solved for: .*no multiple of 3"):
        matched(options("own"), MatchConfig(state_bytes="10KiB"), 16)
    with pytest.raises(ConfigError, match="the state of fixed has no size_options in its config"):
        matched(options("fixed"), MatchConfig(state_bytes="10KiB"), 16)
    monkeypatch.setattr(OwnConfig, "__post_init__", LinearAttentionConfig.__post_init__)
    config = matched(options("own"), MatchConfig(state_bytes="10KiB"), 16)
    assert built(config, 16)[2] == pytest.approx(10 * 1024, rel=0.03)
    assert sizes(config)["own"] == config.mixers["own"]


WRONG = {
    "an unknown unit": (
        {"state_bytes": "20kib"},
        r"match: state_bytes: expected a number such as 20480, 20KiB or 20KB",
    ),
    "bytes of parameters": ({"parameters": "20KiB"}, r"match: parameters: .* \(units: k, M, G\), got '20KiB'"),
    "a truth value": ({"parameters": True}, "match: parameters: expected a number such as .* got True"),
    "a part": ({"parameters": "1.0005k"}, "match: parameters: expected a whole number of at least 1, got '1.0005k'"),
    "nothing": ({"state_bytes": 0}, "match: state_bytes: expected a whole number of at least 1, got 0"),
    "no tolerance": ({"tolerance": "0%"}, "match: tolerance must be above 0 and below 1"),
    "all tolerance": ({"tolerance": 3}, "match: tolerance must be above 0 and below 1 .*, got 3"),
    "no length": ({"state_length": 0}, "match: state_length must be at least 1 token, got 0"),
    "another key": ({"parameter": "1k"}, "match.parameter: unknown key, .*'parameters'"),
    "another count": ({"count": "mixers"}, "match.count is 'mixers'"),
}


@pytest.mark.parametrize(("match", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_match_is_named(tmp_path, match, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, match=match)


def test_numbers_with_units_and_without():
    assert MatchConfig(parameters="1.1k").wanted_parameters == 1100  # And not 1100.0000000000002.
    assert MatchConfig(parameters=1e6).wanted_parameters == 10**6
    assert [MatchConfig(state_bytes=text).wanted_state for text in (7, "20KB", "1.5KiB", "2 MiB")] == [
        *(7, 20_000, 1536),
        2 * 2**20,
    ]
    assert MatchConfig(tolerance="2.5%").share == MatchConfig(tolerance=0.025).share == 0.025
    assert not MatchConfig().asks


def test_a_run_is_identified_by_the_sizes_that_were_solved(tmp_path):
    config = tiny_config(tmp_path, model__pattern="gla", match={"state_bytes": "3KiB", "tolerance": "5%"})
    (solved,) = config.model.options.mixers.values()
    assert build_model(config).state_bytes(16) == pytest.approx(3 * 1024, rel=0.05)
    by_hand = tiny_config(tmp_path, model__pattern="gla", model__mixers={"gla": solved})
    assert config.folder() == by_hand.folder() != tiny_config(tmp_path, model__pattern="gla").folder()
    assert to_dict(config)["match"]["state_bytes"] == "3KiB"
    assert run_config(to_dict(config)) == config == resolve(config)
    planned = plan(config)
    assert planned.sizes == {"gla": sizes(config.model.options)["gla"]}
    assert f"key_width={planned.sizes['gla']['key_width']}" in str(planned)


def test_the_command_line_takes_units():
    given = ["experiment=mqar", "model=mamba2", "model.channel=swiglu", "match.parameters=180k", "match.tolerance=2%"]
    found = [resolve_composed(compose([*given, f"match.state_bytes={size}"])) for size in ("8KiB", "20KiB")]
    assert found[0].folder() != found[1].folder()
    for config, kib in zip(found, (8, 20), strict=True):
        with torch.device("meta"):
            model = build_model(config)
        assert model.num_parameters() == pytest.approx(180_000, rel=0.02)
        assert model.state_bytes(64) == pytest.approx(1024 * kib, rel=0.02)
