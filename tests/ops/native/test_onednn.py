"""float32 products by oneDNN, and where the linear layer takes them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from seqarch.layers.modules.linear import Linear
from seqarch.ops.native import onednn
from seqarch.testing import assert_close

BOUND = 1e-6


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Taken on every processor, and counted."""
    calls, product = [], onednn.product
    monkeypatch.setattr(onednn, "unavailable", lambda: None)
    monkeypatch.setattr(onednn, "product", lambda a, b: calls.append(1) or product(a, b))
    return calls


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("sizes", [(8, 1, 1), (9, 3, 2), (64, 33, 130), (130, 256, 64)])
def test_products_and_gradients_equal_float64(sizes: tuple[int, int, int], calls: list[int]):
    torch.manual_seed(0)
    rows, depth, width = sizes
    x, weight, bias, upstream = (torch.randn(s) for s in ((2, rows, depth), (width, depth), (width,), (2, rows, width)))
    for b in (bias, None):
        given = [x, weight] if b is None else [x, weight, b]
        own, wide = leaves(*given), leaves(*(each.double() for each in given))
        y, expected = onednn.linear(*own[:2], own[2] if b is not None else None), F.linear(*wide)
        assert_close(y, expected, BOUND)
        y.backward(upstream)
        expected.backward(upstream.double())
        for mine, theirs in zip(own, wide, strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            assert_close(mine.grad, theirs.grad, BOUND)
    assert len(calls) == 6


def test_strided_inputs_and_second_derivatives(calls: list[int]):
    torch.manual_seed(0)
    x, weight = torch.randn(20, 70)[:, 3:40], torch.randn(37, 50).t()[::2]
    own, wide = leaves(x, weight), leaves(x.double(), weight.double())
    for (a, b), multiply in ((own, onednn.linear), (wide, F.linear)):
        slope = torch.autograd.grad(multiply(a, b, None).square().sum(), a, create_graph=True)[0]
        slope.square().sum().backward()
    for mine, theirs in zip(own, wide, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert_close(mine.grad, theirs.grad, BOUND)


def test_the_layer_takes_it_for_many_rows_of_float32_alone(calls: list[int]):
    layer, x = Linear(48, 40), torch.randn(2, 8, 48, requires_grad=True)

    def taken(layer: Linear, x: Tensor) -> bool:
        calls.clear()
        y = layer(x)
        assert y.shape == (*x.shape[:-1], layer.out_features)
        return bool(calls)

    assert taken(layer, x)
    assert not taken(layer, x[:, :3])  # too few rows
    assert not taken(layer.double(), x.double())
    assert not taken(layer.bfloat16(), x.bfloat16())
    layer.float()
    assert not taken(layer, torch.randn(0, 48))
    with torch.autocast("cpu"):
        assert not taken(layer, x)
    with FlopCounterMode(display=False) as counter:
        assert not taken(layer, x)
    assert counter.get_total_flops() == 2 * 16 * 48 * 40
    torch._C._set_mkldnn_enabled(False)  # as torch.backends.mkldnn.flags does, which also sets what warns on a CPU
    try:
        assert not taken(layer, x)
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert torch.func.vmap(layer)(x).shape == (2, 8, 40)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_where_it_is_the_faster_library(monkeypatch: pytest.MonkeyPatch, tmp_path):
    def reason(capability: str, processor: str) -> str | None:
        file = tmp_path / "cpuinfo"
        file.write_text(f"processor : 0\nvendor_id : {processor}\n")
        monkeypatch.setattr(onednn, "PROCESSOR", file)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        return onednn.unavailable.__wrapped__()

    assert reason("AVX512", "AuthenticAMD") is None
    assert "AVX-512 here" in str(reason("AVX512", "GenuineIntel"))
    assert "no AVX-512" in str(reason("AVX2", "AuthenticAMD"))


def test_oneDNN_sees_few_sizes_of_what_differs_from_call_to_call(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    seen, product = set(), onednn._product
    monkeypatch.setattr(onednn, "unavailable", lambda: None)
    monkeypatch.setattr(onednn, "_product", lambda a, b: seen.add((a.shape, b.shape)) or product(a, b))
    weight = torch.randn(9, 5)
    for count in (*range(8, 60), *range(200, 700, 9)):
        x, upstream = torch.randn(count, 5), torch.randn(count, 9)
        y = onednn.fastest_product(x, weight)
        assert y.is_contiguous()
        assert_close(y, x.double() @ weight.double().t(), BOUND)
        assert_close(onednn.fastest_product(upstream.t(), x.t()), upstream.double().t() @ x.double(), BOUND)
    assert len(seen) < 120  # of 216
    counts = [onednn.rounded(count) for count in range(1, 5000)]
    assert all(count <= most <= 1.125 * count for count, most in enumerate(counts, 1))
    assert len(set(counts)) < 16 * 10
    assert [onednn.rounded(count) for count in (8, 64, 96, 384, 4096)] == [8, 64, 96, 384, 4096]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_sizes_that_experts_had():
    program = """
import torch
from seqarch.layers import build_channel_mixer
from seqarch.ops.native import onednn

onednn.unavailable = lambda: None
torch.manual_seed(0)
torch.set_num_threads(1)
mixer = build_channel_mixer("moe", d_model=32, num_experts=8, top_k=2)

def resident(steps):
    for _ in range(steps):
        mixer(torch.randn(1, int(torch.randint(40, 2000, ())), 32)).square().mean().backward()
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

before = resident(2)
print(resident(150) - before)
"""
    grown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=600)
    assert float(grown.stdout) < 250  # 620 with a size a call
