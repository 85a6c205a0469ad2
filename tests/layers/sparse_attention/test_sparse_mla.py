"""Latent attention to chosen tokens: its equation, its loss, its two forms, and what it keeps of a token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqarch import ops
from seqarch.layers import build_mixer, measured_state_bytes
from seqarch.layers.modules.rotary import apply_rotary
from seqarch.layers.sparse_attention.sparse_mla import SparseMLA
from seqarch.testing import assert_close, inputs

WIDTHS = {"num_heads": 4, "qk_nope_head_dim": 8, "v_head_dim": 6, "qk_rope_head_dim": 4, "kv_lora_rank": 12}
INDEX = {"q_lora_rank": 10, "top_k": 5, "index_heads": 3, "index_width": 6, "index_loss_weight": 0.5}


def build(**options) -> SparseMLA:
    torch.manual_seed(0)
    mixer = build_mixer("sparse_mla", d_model=32, **{**WIDTHS, **INDEX, **options}).double()
    assert isinstance(mixer, SparseMLA)
    for norm in (mixer.norm, mixer.index_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    return mixer


def turned(m: Tensor, width: int = 4) -> Tensor:
    """``[T, H, K]`` of which the first channels turn."""
    return torch.cat([apply_rotary(m[None, ..., :width], torch.arange(len(m)))[0], m[..., width:]], dim=-1)


def by_loop(mixer: SparseMLA, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of one sequence ``[T, D]`` and the sum of the indexer's divergences, token by token."""
    c = mixer.config
    if c.q_lora_rank is None:
        low, q = x, mixer.query(x)
    else:
        low = mixer.query[1](mixer.query[0](x))
        q = mixer.query[2](low)
    q, p = q.unflatten(-1, (4, 12)).split([8, 4], dim=-1)
    latent, r = mixer.compress(x).split([12, 4], dim=-1)
    k, v = mixer.expand(mixer.norm(latent)).unflatten(-1, (4, 14)).split([8, 6], dim=-1)
    p, r = turned(p), turned(r[:, None])[:, 0]
    index_q = turned(mixer.index_query(low).unflatten(-1, (c.index_heads, c.index_width)))
    index_k = turned(mixer.index_norm(mixer.index_key(x))[:, None])[:, 0]
    weight = mixer.index_weight(x) * (c.index_heads * c.index_width) ** -0.5
    rows, divergence = [], torch.zeros((), dtype=x.dtype)
    for t in range(len(x)):
        scores = torch.stack([(weight[t] * (index_q[t] @ index_k[s]).relu()).sum() for s in range(t + 1)])
        chosen = sorted(range(t + 1), key=(-scores).tolist().__getitem__)[: c.top_k]
        shares = [((k[chosen, h] @ q[t, h] + r[chosen] @ p[t, h]) * 12**-0.5).softmax(0) for h in range(4)]
        rows.append(mixer.out_proj(torch.cat([share @ v[chosen, h] for h, share in enumerate(shares)])))
        target, guess = torch.stack(shares).mean(0).detach(), scores[chosen].log_softmax(0)
        divergence = divergence + (target * (target.log() - guess)).sum()
    return torch.stack(rows), divergence


@pytest.mark.parametrize("options", [{}, {"q_lora_rank": None, "top_k": 64}, {"kv_lora_rank": 12, "top_k": 2}], ids=str)
def test_the_layer_is_its_equation_and_its_loss(options):
    mixer, x = build(**options), inputs(17)
    expected = [by_loop(mixer, row) for row in x]
    y, _ = mixer(x)
    assert_close(y, torch.stack([o for o, _ in expected]), 1e-12)
    loss, wanted = mixer.auxiliary_loss(), 0.5 * torch.stack([each for _, each in expected]).sum() / 34
    assert loss is not None
    assert_close(loss, wanted, 1e-12)
    indexer = [parameter for name, parameter in mixer.named_parameters() if name.startswith("index_")]
    for a, b in zip(*(torch.autograd.grad(each, indexer) for each in (loss, wanted)), strict=True):
        assert_close(a, b, 1e-12)


def test_both_forms_read_the_same_chosen_tokens():
    """A sequence from its start is expanded; one more token of many is absorbed, unless ``expand`` has a hook."""
    x = inputs(40)
    widths, found = [], []
    for hooked in (False, True):
        mixer = build()
        if hooked:
            mixer.expand.register_forward_hook(lambda *given: None)
        with torch.no_grad(), ops.record_calls() as calls:
            _, state = mixer(x[:, :39])
            found.append(mixer(x[:, 39:], state)[0])
        widths.append([call.inputs.k.shape[-1] for call in calls if call.op == "block_sparse_attention"])
    assert widths == [[8 + 4, 12 + 4], [8 + 4, 8 + 4]]
    assert_close(found[0], found[1], 1e-12)
    assert_close(found[0], build()(x)[0][:, 39:], 1e-12)


def test_without_a_weight_the_indexer_stays_as_it_is():
    mixer = build(index_loss_weight=0.0)
    y, _ = mixer(inputs(9))
    assert mixer.auxiliary_loss() is None
    named = dict(mixer.named_parameters())
    gradients = torch.autograd.grad(y.sum(), list(named.values()), allow_unused=True)
    for name, gradient in zip(named, gradients, strict=True):
        assert (gradient is None) == name.startswith("index_"), name


def test_the_cache_holds_a_latent_a_shared_key_and_the_indexers_key():
    mixer = build().float()
    _, state = mixer(inputs(11).float())
    assert measured_state_bytes(state) == 2 * 11 * (12 + 4 + 6) * 4 == mixer.state_bytes(11, 2)
    assert mixer.bfloat16().state_bytes(11) == 11 * ((12 + 4) * 2 + 6 * 4)


def test_the_indexer_needs_room_for_what_turns():
    with pytest.raises(ValueError, match=r"index_width \(3\) must hold the 4 channels that turn"):
        build(index_width=3)
