"""Options of the state-space mixers against the mixers of transformers that have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import FalconMambaConfig, JambaConfig, Mamba2Config
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from seqarch.layers import build_mixer
from seqarch.testing import assert_close

NAMES = {
    "conv1d.weight": "conv.weight",
    "conv1d.bias": "conv.bias",
    "x_proj.weight": "select.weight",
    "dt_proj.weight": "dt.weight",
    "dt_proj.bias": "dt.bias",
    "dt_layernorm.weight": "dt_norm.weight",
    "b_layernorm.weight": "B_norm.weight",
    "c_layernorm.weight": "C_norm.weight",
}


def filled(theirs: nn.Module, ours: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both with the same random weights, in float64."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.rand(value.shape, generator=generator).double() - 0.4 for name, value in named(theirs)}
    theirs.double().load_state_dict(state)
    ours.double().load_state_dict(
        {NAMES.get(name, name): value.squeeze(1) if name == "conv1d.weight" else value for name, value in state.items()}
    )
    return theirs.eval(), ours


def named(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.state_dict().items())


def compare(theirs: nn.Module, ours: Any) -> None:
    x = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        expected = theirs(x)
        assert_close(ours(x)[0], expected, 1e-6, "sequence")  # their scans are in float32
        y, state = ours(x[:, :9])
        steps = [y]
        for token in x[:, 9:].split(1, dim=1):
            y, state = ours(token, state)
            steps.append(y)
    assert_close(torch.cat(steps, dim=1), expected, 1e-6, "steps")


def falcon() -> nn.Module:
    config = FalconMambaConfig(
        hidden_size=32, state_size=4, time_step_rank=3, expand=2, num_hidden_layers=1, mixer_rms_eps=1e-6
    )
    return FalconMambaMixer(config, layer_idx=0, initialize_mixer_weights=False)


def jamba() -> nn.Module:
    return JambaMambaMixer(JambaConfig(hidden_size=32, mamba_d_state=4, mamba_dt_rank=3), layer_idx=0)


@pytest.mark.parametrize(("make", "norm"), [(jamba, "rms"), (falcon, "rms_without_weights")])
def test_norms_of_the_step_size_and_of_what_is_written_and_read(make: Any, norm: str):
    theirs, ours = filled(make(), build_mixer("mamba", d_model=32, d_state=4, dt_rank=3, dt_bc_norm=norm))
    compare(theirs, ours)
    plain = build_mixer("mamba", d_model=32, d_state=4, dt_rank=3).double()
    plain.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(1, 9, 32).double()
    assert not torch.allclose(plain(x)[0], ours(x)[0], rtol=1e-2)


def test_limits_of_the_step_size():
    limits = 0.5, 0.8
    config = Mamba2Config(
        hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8, time_step_limit=limits
    )
    options = {"head_dim": 16, "d_state": 8}
    ours = build_mixer("mamba2", d_model=32, **options, dt_limit_min=limits[0], dt_limit_max=limits[1])
    theirs, ours = filled(Mamba2Mixer(config, layer_idx=0), ours)
    compare(theirs, ours)
    free = build_mixer("mamba2", d_model=32, **options).double()
    free.load_state_dict(ours.state_dict())
    x = torch.randn(1, 9, 32).double()
    assert not torch.allclose(free(x)[0], ours(x)[0], rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mamba", {"dt_bc_norm": "layer"}, "unknown dt_bc_norm 'layer': expected one of none, rms"),
        ("mamba2", {"dt_limit_min": 0.2, "dt_limit_max": 0.1}, r"dt_limit_min \(0.2\) must not be above dt_limit_max"),
        ("mamba2", {"dt_limit_max": 0.0}, "dt_limit_max must be positive, got 0.0"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        build_mixer(name, d_model=32, **options)
