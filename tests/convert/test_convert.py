"""Models with other mixers, made of trained ones: what is copied, what is exact, and what refuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from seqarch import LanguageModel, Stack, ops, quantize
from seqarch.convert import carry_over, convert
from seqarch.convert.copying import ROLES, maps_by_role
from seqarch.layers import MIXERS, build_mixer, register_mixer
from seqarch.layers.linear_attention.linear_attention import LinearAttention, LinearAttentionConfig
from seqarch.layers.mixer import Mixer
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.rotary import apply_rotary
from seqarch.models import tile_pattern
from seqarch.models.pattern import write_pattern
from seqarch.testing import assert_close

WIDTH = 32
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
RICH = {**HEADS, "qk_norm": True, "qkv_bias": True, "output_gate": True, "rotary_base": 500.0, "sinks": True}

WHOLE = [name for name in MIXERS if set(ROLES) <= {each.role for each in build_mixer(name, d_model=WIDTH).head_maps()}]
"""Mixers that take all of attention."""


def teacher(pattern: str = "attention", depth: int = 3, options: Any = HEADS, **more: Any) -> LanguageModel:
    torch.manual_seed(0)
    made = LanguageModel(
        vocab_size=19, d_model=WIDTH, pattern=pattern, depth=depth, mixers={"attention": options}, **more
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.double().eval()


def tokens(length: int = 21) -> Tensor:
    return torch.randint(19, (2, length), generator=torch.Generator().manual_seed(1))


def mixer_of(model: Any, layer: int = 0) -> Mixer:
    return getattr(model, "stack", model).layers[layer].mixers[0]


@pytest.mark.parametrize("target", ["sliding_window(window=64)", "attention(window=64)", "longformer(window=64)"])
@pytest.mark.parametrize("options", [HEADS, RICH], ids=["plain", "rich"])
def test_what_computes_the_same_gives_the_same(target: str, options: Any):
    """Attention over a window longer than the text is attention: every part is in its place."""
    model = teacher(options={k: v for k, v in options.items() if k != "sinks" or "longformer" not in target})
    made, report = convert(model, target)
    assert_close(made(tokens())[0], model(tokens())[0], 1e-12)
    assert not any(each.refused for each in report.mixers)
    assert all(each.numbers[0] == each.numbers[1] for each in report.mixers)


def test_shared_heads_are_repeated():
    model = teacher(options=RICH)
    made, report = convert(model, "attention(num_kv_heads=4)")
    assert mixer_of(made).config.kv_heads == 4
    assert report.mixers[0].copied == {"q": 1, "k": 2, "v": 2, "o": 1}
    assert_close(made(tokens())[0], model(tokens())[0], 1e-12)


def test_linear_attention_is_the_kernel_on_the_teachers_heads():
    """Against the formula (Katharopoulos et al. 2020, eq. 9), written out on the teacher's own weights."""
    model = teacher(depth=1)
    made, _ = convert(model, "linear_attention")
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    attention: Any = mixer_of(model)
    q, k, v = attention.qkv_proj.linear.weight.split([32, 16, 16])
    q = rearrange(x @ q.mT, "b t (h c) -> b h t c", h=4)
    k, v = (repeat(x @ m.mT, "b t (g c) -> b (g n) t c", g=2, n=2) for m in (k, v))
    phi_q, phi_k = ((torch.nn.functional.elu(m) + 1) for m in (q, k))
    scores = torch.tril(phi_q @ phi_k.mT)
    o = rearrange(scores @ v / (scores.sum(-1, keepdim=True) + 1e-6), "b h t c -> b t (h c)")
    assert_close(mixer_of(made)(x)[0], o @ attention.out_proj.weight.mT, 1e-12)


def test_retention_keeps_the_rotation():
    """Queries and keys are turned as they were learnt: against the formula (Sun et al. 2023, eq. 5)."""
    model = teacher(depth=1, options={**HEADS, "rotary_base": 77.0})
    made, _ = convert(model, "retention")
    retention: Any = mixer_of(made)
    assert retention.config.rotary_base == 77.0
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    q, k, v = mixer_of(model).qkv_proj.linear.weight.split([32, 16, 16])  # type: ignore[union-attr, operator]
    at = torch.arange(9)[None]
    q = apply_rotary(rearrange(x @ q.mT, "b t (h c) -> b t h c", h=4), at, 77.0)
    k, v = (repeat(x @ m.mT, "b t (g c) -> b t (g n) c", g=2, n=2) for m in (k, v))
    k = apply_rotary(k, at, 77.0)
    decay = 1 - torch.exp2(-5.0 - torch.arange(4, dtype=torch.float64))
    age = (torch.arange(9)[:, None] - torch.arange(9)).clamp(min=0)
    weights = torch.einsum("bthc,bshc->bhts", q, k) * 8**-0.5 * torch.tril(decay[:, None, None] ** age)
    o = torch.einsum("bhts,bshv->bthv", weights, v)
    o = torch.nn.functional.rms_norm(o, (8,), eps=1e-6).flatten(2)
    gated = o * torch.nn.functional.silu(x @ retention.gate.weight.mT)
    assert_close(retention(x)[0], gated @ mixer_of(model).out_proj.weight.mT, 1e-12)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "attention"])
def test_every_mixer_takes_queries_keys_and_values_where_it_says(name: str):
    """The weights are the teacher's, and each role alone changes its own input of the mixer's operation."""
    model = teacher(depth=1, options={"num_heads": 4, "position": "none"})
    made, report = convert(model, name)
    assert report.mixers[0].copied == dict.fromkeys(ROLES, 1)
    assert not report.mixers[0].refused
    new, old = mixer_of(made), mixer_of(model)
    own, theirs = maps_by_role(new), maps_by_role(old)
    for role in ROLES:
        for place in own[role]:
            assert torch.equal(place.weight(new), theirs[role][0].weight(old))
    x = torch.randn(1, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    before = _inputs(new, x)
    for role in "qkv":
        weights = [place.weight(new) for place in own[role]]
        kept = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight in weights:
                weight.mul_(1.5)
        after = _inputs(new, x)
        changed = {each for each, given in before.items() if not torch.equal(given, after[each])}
        assert role in changed
        assert not changed & (set("qkv") - {role} - ALSO.get((name, role), set()))
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


ALSO = {
    **{("comba", "k"): {"q"}},
    **{(f"preconditioned_{name}", "k"): {"v"} for name in ("gated_delta_net", "kda")},
    **{(name, "k"): {"q", "v"} for name in ("mesa_net", "gated_kalma_net")},
}
"""Comba takes a share of the key from each query; preconditioners sum squares of keys, as if these were values; a
regression on the keys multiplies by their covariance, with keys as values and what it solves for as queries."""


def _inputs(mixer: Mixer, x: Tensor) -> dict[str, Tensor]:
    """The queries, keys and values of all of a mixer's operations along time, end to end."""
    with ops.record_calls() as calls, torch.no_grad():
        mixer(x)
    along = [call.inputs for call in calls if hasattr(call.inputs, "v")]
    return {role: torch.cat([getattr(given, role).flatten() for given in along]) for role in "qkv"}


def test_mamba2_reads_by_c_writes_by_b():
    """Against the dual form written out (Dao and Gu 2024, eq. 7) with the teacher's q, k, v for C, B, x."""
    model = teacher(depth=1, options={"num_heads": 4, "position": "none"})
    made, _ = convert(model, "mamba2(output_norm=none, A_min=1e-9, A_max=1e-9)")
    mamba: Any = mixer_of(made)
    x = torch.randn(1, 6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    q, k, v = (x @ m.mT for m in mixer_of(model).qkv_proj.linear.weight.split(32))  # type: ignore[union-attr, operator]
    q, k, v = (rearrange(torch.nn.functional.silu(m), "b t (h c) -> b h t c", h=4) for m in (q, k, v))
    z, _, dt = (x @ mamba.in_proj.weight.mT).split(mamba.sizes, dim=-1)
    dt = torch.nn.functional.softplus(dt + mamba.dt_bias).mT[..., None]
    total = -(mamba.A_log.exp()[:, None, None] * dt).cumsum(2)
    decay = torch.tril((total - total.mT).exp())
    o = ((q @ k.mT) * decay) @ (v * dt) + mamba.D[:, None, None] * v
    o = rearrange(o, "b h t c -> b t (h c)") * torch.nn.functional.silu(z)
    assert_close(mamba(x)[0], o @ mixer_of(model).out_proj.weight.mT, 1e-10)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("name", sorted(set(MIXERS) - {"attention"}))
def test_any_mixer_is_a_target(name: str):
    """In part where it cannot take all; what it has runs, in parts of a text too."""
    model = teacher(options={"num_heads": 4}, depth=2)
    made, report = convert(model, f"{name} attention", partial=True)
    assert [layer.mixers for layer in tile_pattern(made.config.pattern, 2)] == [(name,), ("attention",)]
    assert report.kept_layers == (1,)
    with torch.no_grad():
        whole, _ = made(tokens(12))
        first, state = made(tokens(12)[:, :5])
        rest, _ = made(tokens(12)[:, 5:], state)
    assert_close(torch.cat([first, rest], 1), whole, 1e-9)
    assert torch.equal(made.embedding.weight, model.embedding.weight)
    if name not in WHOLE:
        with pytest.raises(ValueError, match=f"layer 0: {name} .*(cannot take [qkvo]|no projection in common)"):
            convert(model, f"{name} attention")


def test_layers_are_kept_by_pattern_and_by_number(tmp_path: Path):
    model = teacher(depth=8, channel="mlp")
    made, report = convert(model, "3*gated_delta_net attention", keep_layers=[1])
    assert report.kept_layers == (1, 3, 7)
    assert [layer.mixers[0] for layer in tile_pattern(made.config.pattern, 8)] == [
        "gated_delta_net" if i not in (1, 3, 7) else "attention" for i in range(8)
    ]
    for i in (1, 3, 7):
        for name, tensor in model.stack.layers[i].state_dict().items():
            assert torch.equal(tensor, made.stack.layers[i].state_dict()[name])
    for name, tensor in model.state_dict().items():
        if ".mixers." not in name:
            assert torch.equal(tensor, made.state_dict()[name]), name
    shown = str(report).splitlines()
    assert shown[0] == "layers kept whole: 1, 3, 7"
    assert shown[1].startswith("layer 0, 2, 4-6: attention -> gated_delta_net; copied q, k (2 times), v (2 times), o; ")
    made.save_pretrained(tmp_path / "made")
    read = LanguageModel.from_pretrained(tmp_path / "made")
    assert read.config == made.config
    assert torch.equal(read(tokens())[0], made(tokens())[0])
    assert torch.equal(*(each.generate([[1, 2, 3]], max_new_tokens=4)[0] for each in (read, made)))


def test_all_kept_is_the_same_model():
    model = teacher("attention mamba2", depth=2, channel="none")
    made, report = convert(model, "gated_delta_net", keep_layers=range(2))
    assert made.config == model.config
    assert report.mixers == ()
    assert torch.equal(made(tokens())[0], model(tokens())[0])
    assert made is not model
    assert made.head.weight is not model.head.weight


def test_a_stack_and_mixers_side_by_side():
    torch.manual_seed(0)
    stack = Stack(d_model=WIDTH, pattern="attention", depth=2, mixers={"attention": {"num_heads": 4}}).double()
    made, report = convert(stack, "sliding_window(window=4)+gated_delta_net attention")
    assert isinstance(made, Stack)
    assert report.new == ("layers.0.branch_weights",)
    assert [each.target for each in report.mixers] == ["sliding_window", "gated_delta_net"]
    back, report = convert(made, "attention(window=4)+kda attention")
    assert report.new == ()
    assert [(each.source, each.target) for each in report.mixers] == [
        ("sliding_window", "attention"), ("gated_delta_net", "kda")
    ]  # fmt: skip
    assert torch.equal(back.layers[0].branch_weights, made.layers[0].branch_weights)  # type: ignore[arg-type]


def test_constants_and_norms_of_the_old_mixer_hold_for_the_new_one():
    places = {"norm_placements": {"attention": "both"}, "output_factors": {"attention": 0.5}}
    model = teacher(depth=2, **places)
    made, _ = convert(model, "sliding_window(window=64) attention")
    assert made.config.norm_placements == {"attention": "both", "sliding_window": "both"}
    assert_close(made(tokens())[0], model(tokens())[0], 1e-12)


def test_constants_are_never_those_of_other_layers():
    """Of a mixer that stays, and of one that is named but is not there."""
    mixed = teacher("attention mamba2", depth=2, input_factors={"attention": 2.0})
    with pytest.raises(ValueError, match=r"input_factors is 1.0 for mamba2 in layers that stay, and would be 2.0"):
        convert(mixed, "mamba2")
    named = teacher(depth=1, input_factors={"mamba2": 2.0})
    assert convert(named, "mamba2")[0].config.input_factors == {"mamba2": 1.0}
    several = teacher("attention sliding_window", depth=2, norm_placements={"attention": "post"})
    with pytest.raises(ValueError, match="layer 1: norm_placements is 'pre' for sliding_window and 'post'"):
        convert(several, "gated_delta_net")


def test_dtype_mode_and_tied_embeddings_stay():
    model = teacher(tie_embeddings=True).bfloat16().train()
    model.norm.float()
    made, _ = convert(model, "2*gated_delta_net attention")
    assert made.head.weight is made.embedding.weight
    assert made.training
    assert {name: tensor.dtype for name, tensor in made.named_parameters() if "mixers" not in name} == {
        name: tensor.dtype for name, tensor in model.named_parameters() if "mixers" not in name
    }
    assert mixer_of(made).A_log.dtype == torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class OwnConfig(LinearAttentionConfig):
    """Options of :class:`Own`."""


class Apart(nn.Module):
    """Queries by one map, keys and values by another."""

    def __init__(self, d_model: int, heads: int, width: int):
        super().__init__()
        self.heads = heads
        self.reads, self.writes = Linear(d_model, heads * width), Linear(d_model, 2 * heads * width)

    def forward(self, x: Tensor, *_: Any) -> tuple[list[Tensor], None]:
        parts = self.reads(x), *self.writes(x).chunk(2, dim=-1)
        return [each.unflatten(-1, (self.heads, -1)) for each in parts], None


class Own(LinearAttention):
    """A mixer of somebody's own, with projections apart, which says where they are."""

    Config = OwnConfig

    @from_options
    def __init__(self, config: OwnConfig):
        super().__init__(config)
        self.qkv_proj = Apart(config.d_model, config.heads, config.head_width)  # type: ignore[assignment]

    def head_maps(self) -> list[HeadMap]:
        heads, width = self.config.heads, self.config.head_width
        return [
            HeadMap("q", "qkv_proj.reads", heads, width),
            HeadMap("k", "qkv_proj.writes", heads, width),
            HeadMap("v", "qkv_proj.writes", heads, width, heads * width),
            HeadMap("o", "out_proj", heads, width),
        ]


def test_a_mixer_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """It computes what linear attention does, and so must the two models that are made of one."""
    monkeypatch.setattr("seqarch.layers.MIXERS", dict(MIXERS))
    register_mixer("own", Own)
    model = teacher(depth=2, options={**HEADS, "qkv_bias": True})
    made, report = convert(model, "own attention")
    plain, _ = convert(model, "linear_attention attention")
    assert report.mixers[0].copied == {"q": 1, "k": 2, "v": 2, "o": 1}
    assert report.mixers[0].numbers[0] == report.mixers[0].numbers[1]
    x = torch.randn(1, 6, WIDTH, dtype=torch.float64)
    own: Any = mixer_of(made)
    with torch.no_grad():
        for name in ("reads", "writes"):
            bias = own.qkv_proj.get_parameter(f"{name}.bias")
            assert bias.any()
            bias.zero_()
    assert_close(own(x)[0], mixer_of(plain)(x)[0], 1e-12)
    made.save_pretrained(tmp_path / "own")
    assert torch.equal(LanguageModel.from_pretrained(tmp_path / "own")(tokens())[0], made(tokens())[0])


def test_a_short_convolution_begins_without_effect():
    model = teacher(depth=1, options={"num_heads": 4, "position": "none"})
    made, _ = convert(model, "linear_attention(conv_width=4)")
    plain, _ = convert(model, "linear_attention")
    assert_close(made(tokens())[0], plain(tokens())[0], 1e-12)


def test_what_has_no_place_is_reported():
    model = teacher(depth=1, options=RICH)
    _, report = convert(model, "gated_delta_net")
    assert sorted(report.mixers[0].refused) == [
        "gate", "key_norm", "query_norm", "sinks", "the bias of k", "the bias of q", "the bias of v"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pattern": "2*mamba2"}, "a depth of 3 does not fit the pattern"),
        ({"pattern": "mamba2/moe"}, "layer 0: the pattern says /moe, and channel mixers stay"),
        ({"pattern": "mamba2(share=a)"}, "layer 0: .* is shared"),
        ({"pattern": "mamba2", "keep_layers": [3]}, r"keep_layers has int 3, expected numbers of layers, 0 to 2"),
        ({"pattern": "lstm"}, "layer 0, 1, 2: lstm cannot take q .lstm has none., k .* of attention"),
        ({"pattern": "gated_delta_net(key_width=5)"}, r"cannot take q \(4 heads of 5, expected 4 heads of 8\), k \("),
        ({"pattern": "hgrn2"}, r"hgrn2 cannot take k \(hgrn2 has none\) of attention"),
        ({"pattern": "nothing"}, "unknown mixer 'nothing'"),
    ],
)
def test_wrong_patterns(given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        convert(teacher(), **given)


def test_wrong_models():
    with pytest.raises(ValueError, match=r"got .*Linear.*, expected a LanguageModel or a Stack"):
        convert(torch.nn.Linear(2, 2), "mamba2")  # type: ignore[type-var]
    small = quantize(teacher().float(), "int8", group_size=32)
    with pytest.raises(ValueError, match=r"layer 0: attention: .* is a Quantized.*, expected a linear map"):
        convert(small, "mamba2")
    tied = teacher("attention(give_kv=a) attention(take_kv=a) attention")
    with pytest.raises(ValueError, match="layer 0: attention gives tensors"):
        convert(tied, "mamba2")
    other = LanguageModel(vocab_size=20, d_model=WIDTH, pattern="mamba2", depth=3)
    with pytest.raises(ValueError, match="vocab_size is 19 in the teacher and 20 here"):
        carry_over(teacher().float(), other)
    narrow = LanguageModel(vocab_size=19, d_model=64, pattern="mamba2", depth=3)
    with pytest.raises(ValueError, match="d_model is 32 in the teacher and 64 here"):
        carry_over(teacher().float(), narrow)


@pytest.mark.parametrize(
    "pattern", ["attention", "3*mamba2 attention", "mamba2(d_state=8) 2*attention+mamba2/moe", "2*(mamba2 attention)"]
)
def test_a_pattern_is_written_as_it_is_read(pattern: str):
    layers = tile_pattern(pattern, 12)
    assert tile_pattern(write_pattern(layers), 12) == layers
    assert len(write_pattern(layers)) <= len(pattern)
