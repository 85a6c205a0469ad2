"""What is added to the scores of each key: its values and gradients on every backend, against queries that carry it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqarch import ops
from seqarch.ops.attention import chunk_cpp, chunk_flash_attn, chunk_sdpa, chunk_triton
from seqarch.ops.native import cpu_library
from tests.ops.attention.test_attention import BACKENDS, CALLS, make, same, serves
from tests.ops.attention.test_log_sums import dense, with_gradients, with_sinks

NAMES = ("o", "lse", "dq", "dk", "dv", "dsinks", "dbias")
CHOSEN = ("grouped", "step_window", "more_queries_window", "bidirectional", "packed_window", "key_start_window",
          "long_more_keys", "long_window_packed")  # fmt: skip


def biased(inputs: list[Tensor]) -> list[Tensor]:
    """The inputs, sinks and a bias of some units for each key and head."""
    keys = inputs[1].shape[:2]
    bias = 2 * torch.randn(*keys, inputs[0].shape[2], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return [*with_sinks(inputs), bias.to(inputs[0].dtype)]


def expected(**options: Any):
    """The same by queries that end in a number for each head, which keys have the bias beside."""

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        scale = options.get("scale", q.shape[-1] ** -0.5)
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        q = torch.cat([q, torch.full_like(q[..., :1], 1 / scale)], dim=-1)
        return dense(q, torch.cat([k, bias.unsqueeze(-1)], dim=-1), v, sinks, **{**options, "scale": scale})

    return run


def call(backend: str, **options: Any):
    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(q, k, v, sinks=sinks, key_bias=bias, return_lse=True, backend=backend, **options)

    return run


@pytest.mark.parametrize("name", CHOSEN)
def test_every_backend_adds_it_to_the_scores(name):
    inputs, options = make(**CALLS[name])
    given = biased(inputs)
    wanted = with_gradients(expected(**options), given)
    served = [backend for backend in BACKENDS if serves(backend, inputs, {**options, "key_bias": given[-1]})]
    assert set(served) >= {*BACKENDS} - {"chunk_sdpa"}
    for backend in served:
        found = with_gradients(call(backend, **options), given)
        for what, a, b in zip(NAMES, found, wanted, strict=True):
            same(a, b, f"{backend} {what}")


def test_with_a_cap_it_is_added_after_it():
    (q, k, v), options = make((2, 5, 5, 2, 1, 4, 3), logit_cap=0.5)
    bias = biased([q, k, v])[-1]
    scores = 0.5 * torch.tanh(torch.einsum("bqhk,bsgk->bhqs", q, k) * 4**-0.5 / 0.5) + bias.transpose(1, 2)[:, :, None]
    weights = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
    found = ops.attention(q, k, v, key_bias=bias, **options)
    same(found, torch.einsum("bhqs,bsgv->bqhv", weights, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, monkeypatch):
    monkeypatch.setattr(chunk_sdpa, "BLOCKS", (2,))
    inputs, options = make((1, 5, 7, 4, 2, 2, 3), window=3)
    given = [x.requires_grad_() for x in biased(inputs)]
    assert torch.autograd.gradcheck(call(backend, **options), given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_16_bits_keep_it_in_float32(backend):
    """Of numbers near 1000, of which bfloat16 would leave nothing of what tells neighbours apart."""
    inputs, options = make((1, 300, 300, 4, 2, 32, 32), torch.bfloat16, window=40)
    fall = torch.linspace(1000, 990, 300)[None, :, None].expand(-1, -1, 4).contiguous()
    o = ops.attention(*inputs, key_bias=fall, backend=backend, **options)
    exact = ops.attention(*(x.double() for x in inputs), key_bias=fall.double(), backend="recurrent_torch", **options)
    assert o.dtype == torch.bfloat16
    assert ((o.double() - exact).square().mean() / exact.square().mean()).sqrt() < 0.01


@pytest.mark.parametrize("isa", cpu_library.supported_isas())
def test_every_instruction_set_and_number_of_threads(isa):
    inputs, options = make((2, 150, 150, 4, 2, 20, 37), torch.float32, window=50)
    wanted = with_gradients(call("recurrent_torch", **options), [x.double() for x in biased(inputs)])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with cpu_library.use_isa(isa):
                results.append(with_gradients(call("chunk_cpp", **options), biased(inputs)))
    finally:
        torch.set_num_threads(before)
    for found in results:
        for what, a, b, c in zip(NAMES, found, results[0], wanted, strict=True):
            assert torch.equal(a, b), what
            assert ((a.double() - c).square().mean() / c.square().mean()).sqrt() < 2e-6, what


def test_what_does_not_know_it_is_passed_over():
    (q, k, v), _ = make((1, 20, 20, 4, 2, 8, 8), torch.bfloat16)
    inputs = ops.OPS["attention"].inputs(q, k, v, key_bias=torch.zeros(1, 20, 4))
    assert "key_bias is given" in str(chunk_flash_attn.unsupported(inputs))
    assert chunk_triton.deprioritised(inputs) is None
    assert chunk_cpp.unsupported(inputs) is None


def test_wrong_ones_are_named():
    (q, k, v), _ = make((1, 6, 6, 4, 2, 8, 8), torch.float32)
    with pytest.raises(ValueError, match=r"key_bias has shape \[1, 6, 2\], expected \[B, Tk, H\]"):
        ops.attention(q, k, v, key_bias=torch.zeros(1, 6, 2))
    with pytest.raises(TypeError, match=r"key_bias has dtype torch\.int64"):
        ops.attention(q, k, v, key_bias=torch.zeros(1, 6, 4, dtype=torch.int64))
