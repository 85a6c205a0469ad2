"""With ``mup_base_width`` starts and rates follow the maximal update parametrisation, for every mixer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from seqarch.layers import CHANNEL_MIXERS, MIXERS
from seqarch.models import LanguageModel, LMConfig, parameter_groups
from seqarch.models.mup import scalings

BASE = 64


def config(pattern: str = "attention", width: int = 256, **options: Any) -> LMConfig:
    """Of a pattern, with a channel mixer that is four times as wide as the model at every width."""
    own = {"d_model": width, "pattern": pattern, "channel": "mlp", "mup_base_width": BASE}
    return LMConfig(**{"vocab_size": 32, "depth": 1, **own, **options})


def heads(name: str, width: int) -> dict[str, Any]:
    """Options with which heads are as large as at the base width."""
    at_base = MIXERS[name].Config(d_model=BASE)
    if not hasattr(at_base, "num_heads"):
        return {}
    return {name: {"num_heads": (at_base.num_heads or at_base.heads) * width // BASE}}


def test_table_3_of_tensor_programs_v():
    """Embeddings and vectors keep start and rate; hidden maps have 1/r of the rate; the head's start falls besides."""
    model = LanguageModel(config())
    found = scalings(model)
    assert found["embedding.weight"] == (1, 1) == found["norm.weight"]
    maps = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(maps) >= 5
    for name, each in found.items():
        assert each == ((0.5, 0.25) if name == "head.weight" else (1, 0.25) if name in maps else (1, 1)), name


def test_starts_are_those_of_the_library_times_the_factors():
    torch.manual_seed(0)
    plain = LanguageModel(replace(config(), mup_base_width=None))
    torch.manual_seed(0)
    scaled = LanguageModel(config())
    for name, parameter in plain.named_parameters():
        factor = 0.5 if name == "head.weight" else 1.0
        assert torch.equal(scaled.get_parameter(name), factor * parameter), name


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_nothing_changes_at_the_base_width(name):
    """And every parameter of every mixer is known to grow or not: none is refused at another width."""
    torch.manual_seed(0)
    at_base = LanguageModel(config(name, BASE))
    assert set(scalings(at_base).values()) == {(1, 1)}
    with torch.device("meta"):
        wide = LanguageModel(config(name, 4 * BASE, mixers=heads(name, 4 * BASE)))
    found = scalings(wide)
    maps = {name for name, module in wide.stack.named_modules() if isinstance(module, nn.Linear)}
    assert any(found[f"stack.{name}.weight"].lr == 0.25 for name in maps)


@pytest.mark.parametrize("name", sorted(CHANNEL_MIXERS))
def test_channel_mixers(name):
    with torch.device("meta"):
        model = LanguageModel(config(channel=name))
    found = {key: each for key, each in scalings(model).items() if ".channel" in key}
    assert {round(each.lr, 1) for each in found.values()} <= {1.0, 0.3, 0.2}, found
    assert all(each.lr < 1 for key, each in found.items() if ".w_" in key or "proj" in key)
    assert {each.init for key, each in found.items() if key.endswith("router.weight")} <= {0.5}


def test_groups_have_the_rates_and_keep_the_share_that_decay_takes():
    model = LanguageModel(config("mamba2"))
    groups = parameter_groups(model, 0.1, 0.01)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        assert group["lr"] == 0.01 * group["lr_scale"]
        assert group["weight_decay"] == 0 or math.isclose(group["lr"] * group["weight_decay"], 0.001)
    assert {group["lr_scale"] for group in groups} == {1.0, 0.25}
    assert all("lr" not in group for group in parameter_groups(model, 0.1))


class Growing(nn.Module):
    """A map of its own, which says what it sums over or does not."""

    fan_in_dims: ClassVar[dict[str, int]] = {}

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"pattern": "gla", "mixers": {"gla": {"num_heads": 2}}},
        "2 heads of gla at width 256 are 0.5 at width 64; expected a",
    ),
    ({"pattern": "hgrn2", "mup_base_width": 32}, "heads of one size"),
    ({"pattern": "attention(num_heads=4)"}, "give num_heads of attention under mixers, not in the pattern"),
    ({"mup_base_width": 33}, "there is no such model of width 33"),
    ({"tie_embeddings": True}, r"need a logit_scale of mup_base_width / d_model .* here 0\.25"),
    ({"mup_base_width": 0}, "mup_base_width must be at least 1, got 0"),
]


@pytest.mark.parametrize(("options", "expected"), WRONG)
def test_what_cannot_be_scaled_is_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        LanguageModel(config(**{"pattern": "attention", **options}))


def test_a_map_that_does_not_say_what_it_sums_over_is_named(monkeypatch):
    made = LanguageModel.__init__

    def with_map(self, config):
        made(self, replace(config, mup_base_width=None))
        self.config, self.extra = config, Growing(config.d_model)

    monkeypatch.setattr(LanguageModel, "__init__", with_map)
    model = LanguageModel(config())
    with pytest.raises(ValueError, match=r"extra.weight grows with the width in dimensions \[0, 1\]"):
        scalings(model)
    monkeypatch.setattr(Growing, "fan_in_dims", {"weight": 0})
    assert scalings(model)["extra.weight"] == (1, 0.25)
