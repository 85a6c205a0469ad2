"""Derivatives beyond the first in reverse mode: each is the reference's, or refused by one error; none is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, linearize, vmap
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.modules.linear import Linear
from seqarch.ops import OPS, BackendError
from seqarch.ops.native import onednn
from seqarch.ops.triton import availability
from tests.support.backends import available

BOUND = 1e-10

# of torch itself: as it loads the forward-mode formulas that it has no code for, and as it writes down what is linear
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node with no underlying reference"),
]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def heads(length: int = 5) -> dict[str, Tensor]:
    return {"q": draw(2, length, 2, 3), "k": draw(2, length, 1, 3), "v": draw(2, length, 1, 2)}


def recurrent(**more: Tensor) -> dict[str, Tensor]:
    q, k = draw(2, 5, 1, 3), F.normalize(draw(2, 5, 1, 3), dim=-1)
    return {"q": q, "k": k, "v": draw(2, 5, 2, 2), "state": draw(2, 2, 3, 2), **more}


LISTS = torch.tensor([[0, -1], [0, 0], [1, 0], [1, -1], [2, 0]])[None, :, None].repeat(2, 1, 1, 1)

CASES: dict[str, Callable[[], tuple[str, dict[str, Tensor], dict[str, Any]]]] = {
    "attention": lambda: ("attention", heads(), {}),
    "window": lambda: ("attention", heads(), {"window": 2, "key_start": torch.tensor([0, 2])}),
    "sums": lambda: ("attention", {**heads(), "sinks": draw(2)}, {"return_lse": True}),
    "sticks": lambda: ("stick_breaking_attention", heads(), {"key_start": torch.tensor([0, 2])}),
    "paths": lambda: (
        "path_attention",
        {**heads(), "w": draw(2, 5, 1, 3), "beta": draw(2, 5, 1), "key_bias": draw(2, 5, 2)},
        {"key_start": torch.tensor([0, 2])},
    ),
    "biased": lambda: ("attention", {**heads(), "key_bias": draw(2, 5, 2)}, {}),
    "rnn": lambda: (
        "gated_rnn",
        {"x": draw(2, 3, 1, 4, 2), "weight": draw(1, 4, 2, 2), "bias": draw(1, 4, 2), "state": draw(2, 2, 1, 2)},
        {"cell": "lstm"},
    ),
    "lists": lambda: ("block_sparse_attention", heads(), {"block_index": LISTS, "block_size": 2, "window": 2}),
    "sums_of_lists": lambda: (
        "block_sparse_attention",
        heads(),
        {"block_index": LISTS, "block_size": 2, "window": 2, "return_lse": True},
    ),
    "wide_blocks": lambda: (
        "block_sparse_attention",
        heads(18),
        {"block_index": torch.zeros(2, 18, 1, 1, dtype=torch.int64), "block_size": 16},
    ),
    "compressed": lambda: (
        "compressed_attention",
        {"q": draw(2, 9, 2, 3), "k": draw(2, 3, 1, 3), "v": draw(2, 3, 1, 2)},
        {"compressed_length": 4, "compressed_stride": 2, "block_size": 2, "selected_blocks": 3,
         "key_start": torch.tensor([0, 2])},
    ),
    "indexer": lambda: (
        "indexer_loss",
        {"index_q": draw(2, 5, 2, 3), "index_k": draw(2, 5, 3), "weight": draw(2, 5, 2)},
        {"q": draw(2, 5, 2, 3), "k": draw(2, 5, 1, 3), "token_index": LISTS[:, :, 0]},
    ),
    "convolution": lambda: (
        "causal_conv1d",
        {"x": draw(2, 5, 3), "weight": draw(3, 3), "bias": draw(3), "state": draw(2, 2, 3)},
        {"activation": "silu"},
    ),
    "linear": lambda: ("linear_attention", recurrent(log_decay=-draw(2, 5, 2).abs()), {}),
    "delta": lambda: ("delta_rule", recurrent(beta=draw(2, 5, 2).sigmoid(), log_decay=-draw(2, 5, 2, 3).abs()), {}),
    "levels": lambda: (
        "log_linear_attention",
        {**recurrent(level_weight=draw(2, 5, 2, 4), beta=draw(2, 5, 2).sigmoid(), log_decay=-draw(2, 5, 2).abs()),
         "state": draw(2, 2, 3, 3, 2)},
        {"before": 3},
    ),
    "delta_apart": lambda: ("delta_rule", recurrent(read=draw(2, 5, 1, 3), erase=draw(2, 5, 1, 3)), {}),
    "scan": lambda: (
        "selective_scan",
        {
            **{name: draw(2, 5, 2) for name in ("x", "dt", "z")},
            **{"A": -draw(2, 3).abs(), "B": draw(2, 5, 3), "C": draw(2, 5, 3), "D": draw(2), "state": draw(2, 2, 3)},
        },
        {"dt_softplus": True},
    ),
    "experts": lambda: (
        "experts",
        {"x": draw(4, 3), "w_in": draw(3, 3, 4), "w_gate": draw(3, 3, 4), "w_out": draw(3, 4, 3),
         "expert_weight": draw(4, 2)},
        {"expert_index": torch.tensor([[0, 1], [1, 2], [2, -1], [1, 1]])},
    ),
    "biased_experts": lambda: (
        "experts",
        {"x": draw(4, 3), "w_in": draw(3, 3, 4), "w_gate": draw(3, 3, 4), "w_out": draw(3, 4, 3),
         "expert_weight": draw(4, 2), "b_in": draw(3, 4), "b_gate": draw(3, 4), "b_out": draw(3, 3)},
        {"expert_index": torch.tensor([[0, 1], [1, 2], [2, -1], [1, 1]]), "limit": 1.0, "value_offset": 1.0,
         "activation": "quick_gelu"},
    ),
}  # fmt: skip


Outputs = Callable[..., tuple[Tensor, ...]]


def total(outputs: Outputs) -> Callable[..., Tensor]:
    def summed(*inputs: Tensor) -> Tensor:
        weighed = [y.sin() * torch.linspace(-1, 1, y.numel()).view_as(y) for y in outputs(*inputs)]
        return torch.stack([each.sum() for each in weighed]).sum()

    return summed


def in_forward_mode(outputs: Outputs, inputs: list[Tensor], tangents: list[Tensor]) -> Any:
    with forward_ad.dual_level(), torch.no_grad():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        return [forward_ad.unpack_dual(y).tangent for y in outputs(*duals)]


def per_sample(outputs: Outputs, inputs: list[Tensor], tangents: list[Tensor]) -> Any:
    places = tuple(range(len(inputs)))
    return vmap(grad(total(outputs), places))(*(torch.stack([x, x + t]) for x, t in zip(inputs, tangents, strict=True)))


def forward_over_reverse(outputs: Outputs, inputs: list[Tensor], tangents: list[Tensor]) -> Any:
    return jvp(grad(total(outputs), tuple(range(len(inputs)))), tuple(inputs), tuple(tangents))[1]


def reverse_over_reverse(outputs: Outputs, inputs: list[Tensor], tangents: list[Tensor]) -> Any:
    leaves = [x.clone().requires_grad_() for x in inputs]
    first = torch.autograd.grad(total(outputs)(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(first, leaves, tangents)


def batched(outputs: Outputs, inputs: list[Tensor], tangents: list[Tensor]) -> Any:
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = outputs(*leaves)[0]
    upstream = torch.stack([torch.ones_like(y), y.detach().cos()])
    return torch.autograd.grad(y, leaves, upstream, is_grads_batched=True, allow_unused=True)


WAYS = {
    "jvp": lambda outputs, inputs, tangents: jvp(outputs, tuple(inputs), tuple(tangents))[1],
    "linearize": lambda outputs, inputs, tangents: linearize(outputs, *inputs)[1](*tangents),
    "in_forward_mode": in_forward_mode,
    "jacfwd": lambda outputs, inputs, _: jacfwd(outputs)(*inputs),
    "jacrev": lambda outputs, inputs, _: jacrev(outputs)(*inputs),
    "per_sample": per_sample,
    "forward_over_reverse": forward_over_reverse,
    "reverse_over_reverse": reverse_over_reverse,
    "batched": batched,
}
BY_EVERY_BACKEND = ("reverse_over_reverse", "batched")
"""What custom operators have a way for, whatever computes them."""


def called(op: str, names: list[str], options: dict[str, Any], backend: str) -> Outputs:
    def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = getattr(ops, op)(**dict(zip(names, inputs, strict=True)), **options, backend=backend)
        found = found if isinstance(found, tuple) else (found,)
        return tuple(y for y in found if y.is_floating_point())  # lists of blocks have no derivatives

    return outputs


SLOW_WAY, CASE_OF_IT = "linearize", "lists"
TRIALS = [(case, way) for case in CASES for way in WAYS if way != SLOW_WAY or case == CASE_OF_IT]


@pytest.mark.parametrize(("case", "way"), TRIALS)
def test_derivatives_of_any_kind_are_the_references_or_refused(case: str, way: str):
    op, tensors, options = CASES[case]()
    names, inputs = list(tensors), list(tensors.values())
    tangents = [torch.randn_like(x) for x in inputs]
    reference = "parallel_torch" if op == "block_sparse_attention" else OPS[op].reference
    expected = WAYS[way](called(op, names, options, reference), inputs, tangents)
    assert any(each.abs().max() > 0 for each in expected if each is not None)
    arguments = OPS[op].inputs(**tensors, **options)
    for backend in ("auto", *available(op)):
        if backend != "auto" and OPS[op].backends[backend].unsupported(arguments) is not None:
            continue
        outputs = called(op, names, options, backend)
        if backend == "auto" or OPS[op].backends[backend].transformable or way in BY_EVERY_BACKEND:
            found = WAYS[way](outputs, inputs, tangents)
            torch.testing.assert_close(found, expected, rtol=BOUND, atol=BOUND, msg=lambda text: f"{backend}: {text}")  # noqa: B023
        else:
            with pytest.raises(BackendError, match=f"{op}: backend '{backend}' cannot serve this call: .*expected one"):
                WAYS[way](outputs, inputs, tangents)


def test_the_references_second_derivatives_are_those_of_differences():
    """That of listed blocks, too, whose dense form stands in for it here. By differences over one step and
    two, whose error is of the step's fourth power: one of its square shows where derivatives are large.
    """
    for case, make in CASES.items():
        op, tensors, options = make()
        inputs, step = list(tensors.values()), 1e-5
        reference = "parallel_torch" if op == "block_sparse_attention" else OPS[op].reference
        slope = grad(total(called(op, list(tensors), options, reference)), tuple(range(len(inputs))))
        tangents = [torch.randn_like(x) for x in inputs]
        slopes = [slope(*(x + far * step * t for x, t in zip(inputs, tangents, strict=True))) for far in (1, -1, 2, -2)]
        found = reverse_over_reverse(called(op, list(tensors), options, "auto"), inputs, tangents)
        for one, high, low, higher, lower in zip(found, *slopes, strict=True):
            expected = (8 * (high - low) - (higher - lower)) / (12 * step)
            torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5, msg=case)


TRITON = [
    ("attention", "chunk_triton"),
    ("linear", "chunk_triton"),
    ("linear", "recurrent_triton"),
    ("lists", "grouped_triton"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="in float64 the kernels are interpreted alone")
@pytest.mark.parametrize(("case", "backend"), TRITON)
def test_second_derivatives_through_triton_kernels(case: str, backend: str):
    pytest.importorskip("triton")
    op, tensors, options = CASES[case]()
    names, inputs = list(tensors), list(tensors.values())
    tangents = [torch.randn_like(x) for x in inputs]
    expected = reverse_over_reverse(called(op, names, options, "auto"), inputs, tangents)
    with availability.interpreted():
        found = reverse_over_reverse(called(op, names, options, backend), inputs, tangents)
    torch.testing.assert_close(found, expected, rtol=BOUND, atol=BOUND)


def test_vmap_goes_over_what_chooses_too():
    """Lists of blocks and of experts, a batch of them."""
    _, tensors, options = CASES["lists"]()

    def of(*inputs: Any, backend: str = "auto") -> Tensor:
        return ops.block_sparse_attention(*inputs, 2, backend=backend)

    given = [x.unsqueeze(1) for x in (*tensors.values(), options["block_index"])]
    torch.testing.assert_close(vmap(of)(*given).squeeze(1), of(*tensors.values(), options["block_index"]))
    with pytest.raises(BackendError, match=r"block_index is batched by vmap.*expected one of parallel_torch"):
        vmap(partial(of, backend="recurrent_torch"))(*given)
    _, tensors, options = CASES["experts"]()
    w_in, w_out, w_gate = (tensors[name] for name in ("w_in", "w_out", "w_gate"))

    def each(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return ops.experts(x, w_in, w_out, index, weight, w_gate=w_gate)

    given = [tensors["x"], options["expert_index"], tensors["expert_weight"]]
    found = vmap(each)(*(x.unsqueeze(1) for x in given))
    torch.testing.assert_close(found.squeeze(1), each(*given))


def test_fused_attention_of_torch_has_first_derivatives_and_says_so():
    q, k, v = (torch.randn(1, 9, 2, 8, requires_grad=True) for _ in range(3))
    for backend, window in (("parallel_sdpa", None), ("chunk_sdpa", 3)):
        o = ops.attention(q, k, v, window=window, backend=backend)
        (first,) = torch.autograd.grad(o.sum(), q, retain_graph=True)
        assert first.abs().max() > 0
        with pytest.raises(BackendError, match=r"attention: torch's fused kernel has first derivatives only.*choose"):
            torch.autograd.grad(o.sum(), q, create_graph=True)


def test_hessians_through_half_precision_have_its_dtype():
    q, k, v = (torch.randn(1, 4, 1, 3, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = torch.autograd.grad(ops.linear_attention(q, k, v)[0].square().sum(), q, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), k)[0]
    assert first.dtype == second.dtype == torch.bfloat16
    assert second.abs().max() > 0


@pytest.mark.parametrize("rows", [2, 16])
def test_linear_maps_have_all_derivatives(rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onednn, "unavailable", lambda: None)
    layer, x = Linear(512, 300), torch.randn(rows, 512)
    weight = layer.weight.detach()
    with torch.no_grad():
        (tangent,) = in_forward_mode(lambda x: (layer(x),), [x], [x.cos()])
        torch.testing.assert_close(tangent, x.cos() @ weight.T)
    leaf = x.clone().requires_grad_()
    upstream = torch.randn(3, rows, 300)
    found = torch.autograd.grad(layer(leaf), (leaf, layer.weight), upstream, is_grads_batched=True)
    torch.testing.assert_close(found, (upstream @ weight, upstream.mT @ x), rtol=1e-4, atol=1e-4)
    loss = lambda parameters, x: functional_call(layer, parameters, (x,)).sum()  # noqa: E731
    each = vmap(grad(loss), (None, 0))(dict(layer.named_parameters()), x)
    torch.testing.assert_close(each["weight"], x[:, None].expand(-1, 300, -1))


def test_transforms_inside_torch_compile_go_the_same_way():
    _, tensors, options = CASES["linear"]()
    names, inputs = list(tensors), list(tensors.values())
    loss = total(called("linear_attention", names, options, "auto"))
    torch.compiler.reset()
    compiled = torch.compile(grad(loss, 2), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), grad(loss, 2)(*inputs))
