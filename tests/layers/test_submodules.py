"""Submodules are called, never read: adapters, quantisers and hooks count in every way to compute a layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from seqarch.layers import CHANNEL_MIXERS, MIXERS, build_channel_mixer, build_mixer
from seqarch.layers.modules.linear import Linear
from seqarch.models import LanguageModel, LMConfig
from seqarch.testing import assert_close, error
from seqarch.testing.laws import FLOAT64_ERROR

OPTIONS: dict[str, dict[str, Any]] = {
    "attention": {"qk_norm": True, "output_gate": True, "conv_width": 4},
    "moba": {"block_size": 4},
    "dsa": {"top_k": 3},
    "sparse_mla": {"top_k": 3, "q_lora_rank": 5},
    "mla": {"q_lora_rank": 5},
    "lolcats": {"window": 4},
    "moe": {"shared_experts": 1, "shared_gate": True},
    "nsa": {"compressed_length": 4, "compressed_stride": 2, "block_size": 4, "window": 8},
}
SPLITS = ((12,), (1,) * 12, (5, 1, 1, 4, 1))


class Adapter(nn.Module):
    """A linear map and a low-rank change of it; like a quantiser, it has no ``weight``."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        like = {"dtype": base.weight.dtype}
        self.down = nn.Parameter(torch.randn(3, base.in_features, **like) * base.in_features**-0.5)
        self.up = nn.Parameter(torch.randn(base.out_features, 3, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        self.base.weight += self.up @ self.down
        return self.base


def linears(module: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[nn.Module, str, Any]]:
    """Each place in a module that holds one of a kind."""
    for owner in list(module.modules()):
        if not isinstance(owner, Adapter):
            yield from ((owner, name, child) for name, child in list(owner.named_children()) if type(child) is kind)


def adapted(layer: Any) -> tuple[Any, Any]:
    """The layer with an adapter on each linear map, and one with the same weights merged."""
    for owner, name, linear in linears(layer, Linear):
        owner._modules[name] = Adapter(linear)
    merged = copy.deepcopy(layer)
    for owner, name, adapter in linears(merged, Adapter):
        owner._modules[name] = adapter.merge()
    assert not any(isinstance(module, Adapter) for module in merged.modules())
    return layer, merged


def run(layer: Any, x: Tensor, pieces: tuple[int, ...], **options: Any) -> Tensor:
    state, outputs = None, []
    with torch.no_grad():
        for piece in x.split(pieces, dim=1):
            y, state = layer(piece, state, **options)
            outputs.append(y)
    return torch.cat(outputs, dim=1)


def inputs() -> Tensor:
    return torch.randn(2, 12, 32, dtype=torch.float64)


@pytest.mark.parametrize("name", MIXERS)
def test_adapters_count_as_their_merged_weights_do(name: str):
    mixer, x = build_mixer(name, d_model=32, **OPTIONS.get(name, {})).double(), inputs()
    before, costs = run(mixer, x, (12,)), [mixer.flops(9), mixer.step_flops(9), mixer.state_bytes(9)]
    wrapped, merged = adapted(mixer)
    assert [wrapped.flops(9), wrapped.step_flops(9), wrapped.state_bytes(9)] == costs  # adapters add no linear maps
    expected = run(merged, x, (12,))
    assert error(expected, before) > 0.01
    for pieces in SPLITS:
        assert_close(run(wrapped, x, pieces), expected, FLOAT64_ERROR, f"in pieces {pieces}")
    packed = run(wrapped, x.flatten(0, 1)[None], (24,), cu_seqlens=[0, 12, 24])
    assert_close(packed.view_as(x), expected, FLOAT64_ERROR, "packed")
    with torch.no_grad():
        reserved, _ = wrapped(x, wrapped.init_state(2, max_length=20))
    assert_close(reserved, expected, FLOAT64_ERROR, "from a state with room")


@pytest.mark.parametrize("name", MIXERS)
def test_lora_of_peft_reaches_every_projection(name: str):
    """Its layers have a ``weight``, which is that of the layer below: what reads it gets other numbers."""
    mixer, x = build_mixer(name, d_model=32, **OPTIONS.get(name, {})).double(), inputs()
    targets = [path for path, module in mixer.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(r=3, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    wrapped: Any = inject_adapter_in_model(config, mixer).double()
    layers = [module for module in wrapped.modules() if isinstance(module, BaseTunerLayer)]
    assert len(layers) == len(targets)
    y, _ = wrapped(x)
    (y.square().sum() + (0 if (extra := wrapped.auxiliary_loss()) is None else extra)).backward()
    adapters = {path: each for path, each in wrapped.named_parameters() if ".lora_" in path}
    assert len(adapters) == 2 * len(targets)
    assert [path for path, each in adapters.items() if each.grad is None or not each.grad.any()] == []
    merged = copy.deepcopy(wrapped)
    for module in merged.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    expected = run(merged, x, (12,))
    for pieces in SPLITS:
        assert_close(run(wrapped, x, pieces), expected, FLOAT64_ERROR, f"in pieces {pieces}")


class Added(nn.Module):
    """A parametrisation: what is used is another tensor than what is held."""

    def __init__(self, held: Tensor):
        super().__init__()
        self.more = nn.Parameter(0.3 * torch.randn_like(held))

    def forward(self, held: Tensor) -> Tensor:
        return held + self.more


@pytest.mark.parametrize("name", MIXERS)
def test_parametrised_tensors_count_as_what_they_come_to(name: str):
    mixer, x = build_mixer(name, d_model=32, **OPTIONS.get(name, {})).double(), inputs()
    merged: Any = copy.deepcopy(mixer)
    for path, tensor in merged.named_parameters():
        owner, _, own = path.rpartition(".")
        module = mixer.get_submodule(owner)
        parametrize.register_parametrization(module, own, Added(tensor.detach()))
        tensor.data.copy_(getattr(module, own))
    expected = run(merged, x, (12,))
    for pieces in SPLITS:
        assert_close(run(mixer, x, pieces), expected, FLOAT64_ERROR, f"in pieces {pieces}")


@pytest.mark.parametrize("name", CHANNEL_MIXERS)
def test_adapters_of_channel_mixers_count(name: str):
    wrapped, merged = adapted(build_channel_mixer(name, d_model=32, **OPTIONS.get(name, {})).double())
    x = inputs()
    assert_close(wrapped(x), merged(x), FLOAT64_ERROR)
    assert (wrapped.auxiliary_loss() is None) == (merged.auxiliary_loss() is None)


@pytest.mark.parametrize("name", MIXERS)
def test_each_submodule_is_called_in_every_way_to_compute(name: str):
    """With an output that a hook changes: what reads weights past the module would not see it."""
    mixer, x, called = build_mixer(name, d_model=32, **OPTIONS.get(name, {})).double(), inputs(), set()

    def louder(module: nn.Module, _: Any, y: Any) -> Any:
        called.add(module)
        return (1.25 * y[0], *y[1:]) if isinstance(y, tuple) else 1.25 * y

    own = [module for module in mixer.modules() if module is not mixer and module._parameters]
    for module in own:
        module.register_forward_hook(louder)
    expected = run(mixer, x, (12,))
    for pieces in SPLITS:
        called.clear()
        assert_close(run(mixer, x, pieces), expected, FLOAT64_ERROR, f"in pieces {pieces}")
        assert called == set(own), [type(module).__name__ for module in own if module not in called]


def test_filters_that_were_remembered_are_made_again_once_a_hook_changes_them():
    mixer, x = build_mixer("hyena", d_model=32, order=1).double(), inputs()
    with torch.no_grad():
        _, state = mixer(x[:, :10])
        _, state = mixer(x[:, 10:11], state)
        mixer.get_submodule("filters.last").register_forward_hook(lambda _, __, y: 2 * y)
        assert_close(mixer(x[:, 11:], state)[0], mixer(x)[0][:, 11:], FLOAT64_ERROR)


@pytest.mark.parametrize(("name", "part"), [("dsa", "_index"), ("hyena", "filters")])
def test_what_runs_in_float32_in_a_narrower_model_does_so_in_adapters(name: str, part: str):
    wrapped, _ = adapted(build_mixer(name, d_model=32, **OPTIONS.get(name, {})).bfloat16())
    wide, x = copy.deepcopy(wrapped).float(), inputs().bfloat16()
    assert wrapped(x)[0].dtype == torch.bfloat16
    given = (12,) if name == "hyena" else (x, torch.arange(12)[None])
    for got, expected in zip(getattr(wrapped, part)(*given), getattr(wide, part)(*given), strict=True):
        assert got.dtype == torch.float32
        assert_close(got, expected, 1e-6)


@pytest.mark.parametrize("pattern", ["mamba/swiglu", "mamba/mlp attention/moe"])
def test_adapters_of_a_model_count_in_its_loss_and_its_decoding(pattern: str):
    options = {"channels": {"mlp": {"activation": "silu"}}}
    torch.manual_seed(0)
    model = LanguageModel(LMConfig(vocab_size=11, d_model=32, pattern=pattern, depth=2, **options))
    tokens = torch.randint(11, (2, 9))
    with torch.no_grad():
        model(tokens[:, :1])  # the compiled call of one token is there before the adapters are
    wrapped, merged = adapted(model)
    assert wrapped.flops(9) == merged.flops(9)
    expected, _ = merged(tokens)
    got = run(wrapped, tokens, (1,) * 9)
    assert_close(got, expected, 1e-5)
    torch.testing.assert_close(wrapped.loss(tokens, tokens), merged.loss(tokens, tokens))
    assert all(torch.equal(*pair) for pair in zip(wrapped.generate([1, 2], 5), merged.generate([1, 2], 5), strict=True))


def test_weights_that_compute_for_themselves_are_asked():
    """A quantiser's subclass of tensors represents numbers that it does not hold."""

    class Halved(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            plain = [arg.as_subclass(Tensor) / 2 if isinstance(arg, Halved) else arg for arg in args]
            known = func is nn.functional.linear
            return func(*plain, **kwargs or {}) if known else super().__torch_function__(func, types, args, kwargs)

    linear, x = Linear(512, 512, bias=False), torch.randn(1, 9, 512)
    expected = linear(x) / 2
    weight = linear.weight.detach().as_subclass(Halved)
    del linear.weight
    linear.weight = weight  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        torch.testing.assert_close(linear(x), expected)
        torch.testing.assert_close(linear(x[:, :1]), expected[:, :1])
