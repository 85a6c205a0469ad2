"""Latent attention: its equation, its two forms, and a cache that holds latents alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from seqarch import ops
from seqarch.layers import build_mixer, measured_state_bytes
from seqarch.layers.attention.mla import MLA
from seqarch.layers.modules.rotary import apply_rotary

WIDTHS = {"num_heads": 4, "qk_nope_head_dim": 8, "v_head_dim": 6, "qk_rope_head_dim": 4, "kv_lora_rank": 12}


def build(**options) -> MLA:
    torch.manual_seed(0)
    mixer = build_mixer("mla", d_model=32, **{**WIDTHS, **options}).double()
    assert isinstance(mixer, MLA)
    torch.nn.init.uniform_(mixer.norm.weight, 0.5, 2)
    return mixer


def inputs(length: int, batch: int = 2, width: int = 32) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def rms(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize("position", ["rotary", "none"])
@pytest.mark.parametrize("q_lora_rank", [None, 5])
def test_the_layer_is_its_equation(position: str, q_lora_rank: int | None):
    mixer, x = build(position=position, q_lora_rank=q_lora_rank), inputs(9)
    if q_lora_rank is None:
        q = x @ mixer.query.weight.T
    else:
        first, norm, last = mixer.query
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
        q = (rms(x @ first.weight.T) * norm.weight) @ last.weight.T
    q, p = q.unflatten(-1, (4, 12)).split([8, 4], dim=-1)
    latent, r = (x @ mixer.compress.weight.T).split([12, 4], dim=-1)
    r = r[:, :, None]
    if position == "rotary":
        p, r = (apply_rotary(m, torch.arange(9)) for m in (p, r))
    latent = rms(latent) * mixer.norm.weight
    outputs = []
    for head, weight in enumerate(mixer.expand.weight.split(14)):
        k, v = (latent @ weight.T).split([8, 6], dim=-1)
        scores = q[:, :, head] @ k.mT + p[:, :, head] @ r[:, :, 0].mT
        above = torch.ones(9, 9, dtype=torch.bool).triu(1)
        outputs.append((scores / 12**0.5).masked_fill(above, -torch.inf).softmax(-1) @ v)
    same(mixer(x)[0], torch.cat(outputs, dim=-1) @ mixer.out_proj.weight.T)


@pytest.mark.parametrize("options", [{}, {"key_start": torch.tensor([0, 3])}, {"cu_seqlens": [0, 2, 7]}], ids=str)
def test_both_forms_read_the_same(options: dict):
    mixer, packed = build(), "cu_seqlens" in options
    q = inputs(7 if packed else 3, batch=1 if packed else 2, width=48).unflatten(-1, (4, 12)).requires_grad_()
    entries = inputs(7, batch=1 if packed else 2, width=16).unsqueeze(2).requires_grad_()
    found = []
    attend = partial(ops.attention, scale=12**-0.5, **options)
    for o in (attend(q, *mixer.expanded(entries)), mixer._absorbed(q, entries, attend)):
        found.append((o, *torch.autograd.grad(o.sin().sum(), [q, entries, mixer.expand.weight])))
    for a, b in zip(*found, strict=True):
        same(a, b)


def read_width(mixer: MLA, length: int, state) -> tuple[int, object]:
    with ops.record_calls() as calls, torch.no_grad():
        _, state = mixer(inputs(length), state)
    return next(call for call in calls if call.op == "attention").inputs.k.shape[-1], state


def test_the_cheaper_form_is_taken():
    """Keys are of width 8 + 4 when expanded, 12 + 4 when absorbed: a pair costs 2 * 12 - 8 - 6 = 10 more per head
    there, an earlier latent 12 * 14 = 168 less."""
    expanded, absorbed = 12, 16
    mixer = build()
    width, state = read_width(mixer, 40, None)
    assert width == expanded
    width, state = read_width(mixer, 1, state)
    assert width == absorbed
    # 41 latents are held, worth 6888: 15 queries make 735 pairs, worth 7350, and 14 of them make 679, worth 6790
    assert mixer.costs(14, 55)[0] > mixer.costs(14, 55)[1]
    assert mixer.costs(15, 56)[0] < mixer.costs(15, 56)[1]
    assert read_width(mixer, 15, state)[0] == expanded
    assert read_width(build(kv_lora_rank=5), 40, None)[0] == 5 + 4  # a latent below the mean of K and V


def test_the_cache_holds_one_latent_and_one_shared_key_a_token():
    mixer = build()
    _, state = mixer(inputs(11))
    assert measured_state_bytes(state) == 2 * 11 * (12 + 4) * 8 == mixer.state_bytes(11, 2)


def test_a_step_costs_as_counted_by_hand():
    mixer = build(q_lora_rank=5)
    maps = 32 * 5 + 5 * 4 * 12 + 32 * 16 + 12 * 4 * 14 + 4 * 6 * 32
    assert mixer.step_flops(99, 3) == 3 * 2 * (maps + 100 * 4 * (16 + 16))  # whole entries are read as values


def test_defaults_are_the_ratios_of_the_paper():
    config = build_mixer("mla", d_model=256).config
    assert (config.heads, config.keys, config.values, config.shared, config.rank) == (4, 64, 64, 32, 256)
    with pytest.raises(ValueError, match="even qk_rope_head_dim, got 5"):
        build_mixer("mla", d_model=32, qk_rope_head_dim=5)
