"""How long the gates of a study keep a write at first: the rule and the tables of its page, from built mixers."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.config.overrides import compose
from seqarch.layers.delta_rule.gated_delta_net import GatedDeltaNet
from seqarch.layers.delta_rule.kda import KDA
from seqarch.layers.linear_attention.gla import Gla
from seqarch.layers.state_space.mamba2 import Mamba2
from tests.support.paths import ROOT

HEADS = 20_000
"""So many that medians over them are known to about 1 %."""

START = ("A_min", "A_max", "dt_min", "dt_max", "dt_floor", "decay_bias", "temperature")

KINDS = {
    "gla": (Gla, {"num_heads": 2, "key_width": 4, "value_width": 4}),
    "gated_delta_net": (GatedDeltaNet, {"num_heads": HEADS, "key_width": 1, "value_width": 1}),
    "kda": (KDA, {"num_heads": HEADS, "key_width": 1, "value_width": 1, "gate_rank": 1}),
    "mamba2": (Mamba2, {"d_inner": HEADS, "head_dim": 1, "d_state": 1}),
}

STUDIES = {"recall_state": ("gla", "gated_delta_net", "kda", "mamba2"), "needle": ("gated_delta_net", "mamba2")}


def horizons(mixer: str, options: dict[str, float]) -> Tensor:
    """Tokens after which 1 / e of a write is left at an input of 0, for each head."""
    torch.manual_seed(0)
    kind, sizes = KINDS[mixer]
    layer = kind(d_model=8, **sizes, **{name: value for name, value in options.items() if name in START})
    with torch.no_grad():
        if mixer == "gla":
            return -layer.config.temperature / F.logsigmoid(layer.decay[1].bias)
        return 1 / (layer.A_log.exp() * F.softplus(layer.dt_bias))


@pytest.mark.parametrize("name", STUDIES)
def test_gates_start_with_a_horizon_of_about_twice_the_training_length(name):
    """The medians lie between 1.4 and 3.6 times the length; the page has them, and what is left of a write by then."""
    composed = compose([f"experiment={name}"])
    length, page = composed["task"]["length"], (ROOT / f"docs/results/{name}.md").read_text(encoding="utf-8")
    for mixer in STUDIES[name]:
        model = compose([f"experiment={name}", f"model={mixer}"])["model"]
        found = horizons(mixer, model["mixers"][mixer])
        assert 1.4 <= found.median() / length <= 3.6, mixer
        row = re.search(rf"^\| `{mixer}` \|.*\| ([\d,]+) \| (\.\d\d) \|$", page, re.MULTILINE)
        assert row is not None, mixer
        assert float(row[1].replace(",", "")) == pytest.approx(float(found.median()), rel=0.03), mixer
        assert float(row[2]) == pytest.approx(float((-length / found).exp().mean()), abs=0.011), mixer
