"""The whole contract of the recurrences (linear attention, delta rule, selective scan), on every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from seqarch import ops
from seqarch.ops import OPS
from seqarch.ops.delta_rule import flops as delta_flops
from seqarch.ops.linear_attention import flops as linear_flops
from seqarch.ops.selective_scan import chunk_torch
from seqarch.ops.selective_scan import flops as scan_flops
from seqarch.testing import assert_close
from seqarch.testing.laws import LENGTHS
from tests.support.backends import available

B, H, K, V, D, N = 2, 4, 6, 5, 12, 3
DECAYS = ("none", "head", "step", "key")
TIMED = ("q", "k", "v", "beta", "x", "dt", "B", "C", "z")
"""Arguments with a time axis; ``log_decay`` is one too unless it has one dimension."""


@dataclass(frozen=True)
class Variant:
    """An operation with one kind of decay or grouping, and how to draw its inputs."""

    op: str
    kind: str
    make: Callable[[int, int], dict[str, Any]]

    def __str__(self) -> str:
        return f"{self.op}-{self.kind}"

    def run(self, backend: str, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
        return getattr(ops, self.op)(**inputs, backend=backend, **options)


def _decay(kind: str, batch: int, length: int, heads: int) -> Tensor | None:
    shapes = {"head": (heads,), "step": (batch, length, heads), "key": (batch, length, heads, K)}
    return None if kind == "none" else -torch.rand(shapes[kind], dtype=torch.float64).square() * 3


def _matrix_state(op: str, kind: str, groups: int) -> Variant:
    def make(length: int, batch: int = B) -> dict[str, Any]:
        torch.manual_seed(length)
        q, k = torch.randn(2, batch, length, groups, K, dtype=torch.float64)
        v = torch.randn(batch, length, H, V, dtype=torch.float64)
        inputs = {"q": q, "k": F.normalize(k, dim=-1), "v": v, "log_decay": _decay(kind, batch, length, H)}
        if op == "delta_rule":
            inputs["beta"] = 2 * torch.rand(batch, length, H, dtype=torch.float64)
        return inputs

    return Variant(op, f"{kind}-{groups}of{H}", make)


def _scan(kind: str, groups: int | None) -> Variant:
    def make(length: int, batch: int = B) -> dict[str, Any]:
        torch.manual_seed(length)
        shared = (batch, length, N) if groups is None else (batch, length, groups, N)
        inputs = {name: torch.randn(batch, length, D, dtype=torch.float64) for name in ("x", "dt")}
        inputs |= {name: torch.randn(shared, dtype=torch.float64) for name in ("B", "C")}
        inputs |= {"A": -torch.rand(D, N, dtype=torch.float64) * 4, "dt_softplus": True}
        if kind == "full":
            inputs |= {name: torch.randn(D, dtype=torch.float64) for name in ("D", "dt_bias")}
            inputs["z"] = torch.randn(batch, length, D, dtype=torch.float64)
        return inputs

    return Variant("selective_scan", f"{kind}-{groups}", make)


VARIANTS = [
    *(_matrix_state("linear_attention", kind, groups) for kind in DECAYS for groups in (H, 2)),
    *(_matrix_state("delta_rule", kind, groups) for kind in DECAYS for groups in (H, 1)),
    *(_scan(kind, groups) for kind, groups in (("bare", None), ("full", None), ("full", 3))),
]
EACH = [(variant, name) for variant in VARIANTS for name in available(variant.op)]
IDS = [f"{variant}-{backend}" for variant, backend in EACH]
each = pytest.mark.parametrize(("variant", "backend"), EACH, ids=IDS)


def cut(inputs: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """The inputs of tokens ``start`` to ``end``."""
    timed = {name for name in inputs if name in TIMED}
    if inputs.get("log_decay") is not None and inputs["log_decay"].ndim > 1:
        timed.add("log_decay")
    return {name: value[:, start:end] if name in timed else value for name, value in inputs.items()}


@each
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_reference(variant: Variant, backend: str, length: int):
    inputs = variant.make(length)
    y, state = variant.run(backend, inputs)
    expected, expected_state = variant.run(OPS[variant.op].reference, inputs)
    assert_close(y, expected, 1e-12, "output")
    assert_close(state, expected_state, 1e-12, "state")


@each
def test_gradients_equal_the_reference(variant: Variant, backend: str):
    inputs = variant.make(70)
    first_state = torch.randn_like(variant.run(backend, inputs)[1])

    def gradients(name: str) -> dict[str, Tensor]:
        leaves = {key: value.clone().requires_grad_() for key, value in inputs.items() if isinstance(value, Tensor)}
        leaves["state"] = first_state.clone().requires_grad_()
        y, state = variant.run(name, inputs | leaves)
        torch.manual_seed(1)
        total = (y * torch.randn(y.shape)).sum() + (state * torch.randn(state.shape)).sum()
        return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))

    got, expected = gradients(backend), gradients(OPS[variant.op].reference)
    for name, gradient in expected.items():
        assert_close(got[name], gradient, 1e-11, f"gradient of {name}")


@each
def test_a_split_sequence_is_the_whole(variant: Variant, backend: str):
    inputs = variant.make(130)
    y, last = variant.run(backend, inputs)
    outputs, state = [], None
    for start, end in ((0, 1), (1, 66), (66, 66), (66, 129), (129, 130)):
        out, state = variant.run(backend, cut(inputs, start, end), state=state)
        outputs.append(out)
    assert state is not None
    assert_close(torch.cat(outputs, 1), y, 1e-11, "outputs")
    assert_close(state, last, 1e-11, "state")


@each
def test_packed_is_separate(variant: Variant, backend: str):
    inputs, offsets = variant.make(200, 1), [0, 64, 65, 65, 130, 200]
    states = torch.randn(5, *variant.run(backend, inputs)[1].shape[1:], dtype=torch.float64)
    y, last = variant.run(backend, inputs, state=states, cu_seqlens=torch.tensor(offsets))
    for i in range(5):
        part = cut(inputs, offsets[i], offsets[i + 1])
        alone, state = variant.run(backend, part, state=states[i : i + 1])
        assert_close(y[:, offsets[i] : offsets[i + 1]], alone, 1e-12, f"sequence {i}") if alone.numel() else None
        assert_close(last[i : i + 1], state, 1e-12, f"state {i}")


@each
def test_strided_and_low_precision_inputs(variant: Variant, backend: str):
    inputs = variant.make(65)
    expected, _ = variant.run(backend, inputs)
    strided = {k: v.mT.contiguous().mT if isinstance(v, Tensor) and v.ndim > 1 else v for k, v in inputs.items()}
    assert_close(variant.run(backend, strided)[0], expected, 1e-12, "not contiguous")
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        low = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        exact = {name: value.double() if isinstance(value, Tensor) else value for name, value in low.items()}
        y, state = variant.run(backend, low)
        assert y.dtype == dtype
        assert state.dtype == torch.float32
        assert_close(y, variant.run(backend, exact)[0], bound, f"{dtype} inputs")


@each
def test_no_tokens_leave_the_state(variant: Variant, backend: str):
    inputs = variant.make(3)
    state = torch.randn_like(variant.run(backend, inputs)[1])
    y, last = variant.run(backend, cut(inputs, 0, 0), state=state)
    assert y.shape[1] == 0
    assert torch.equal(last, state)


@pytest.mark.parametrize("kind", ["step", "key"])
@pytest.mark.parametrize("strength", [20.0, 1e4, float("inf")])
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
def test_strong_decay_is_finite_and_right(op: str, strength: float, kind: str):
    """Weak decays among very strong ones, forward and backward, in float32 against a float64 reference."""
    variant = _matrix_state(op, kind, H)
    inputs = variant.make(130)
    some = torch.rand_like(inputs["log_decay"]) < 0.3
    inputs["log_decay"] = torch.where(some, -strength, -0.01 * torch.rand_like(inputs["log_decay"]))

    def run(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
        y, state = variant.run(backend, leaves)
        return y, state, *torch.autograd.grad(y.square().sum() + state.square().sum(), list(leaves.values()))

    exact = run("recurrent_torch", torch.float64)
    for backend in available(op):
        for got, expected in zip(run(backend, torch.float32), exact, strict=True):
            assert_close(got, expected, 2e-5, f"{op}, {backend}, {kind} decay of exp(-{strength})")


def test_selective_scan_forgets_at_once_under_strong_decay():
    inputs = _scan("bare", None).make(70)
    inputs["A"] = torch.full_like(inputs["A"], -1e6)
    y, _ = ops.selective_scan(**inputs, backend="chunk_torch")
    delta = F.softplus(inputs["dt"])
    assert_close(y, delta * inputs["x"] * (inputs["B"] * inputs["C"]).sum(-1, keepdim=True), 1e-12)


def test_the_operators_of_the_scan_are_what_torch_expects():
    u, delta, y = torch.rand(3, 2, 20, 6)
    B, C = torch.randn(2, 2, 20, 3, 4)
    A, state = -torch.rand(6, 4), torch.randn(2, 6, 4)
    leaves = tuple(m.requires_grad_() for m in (u, delta, B, C, A, state))
    torch.library.opcheck(chunk_torch.scan.operator, leaves)
    _, last, starts = (m.detach() for m in chunk_torch.scan.operator(*leaves))
    plain = [m.detach() for m in leaves]
    torch.library.opcheck(chunk_torch.scan.gradient, (*plain, starts, y, last, [True] * len(plain)))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_flops_are_what_a_counter_sees(variant: Variant):
    formulas = {
        "linear_attention": linear_flops(37, H, K, V, B),
        "delta_rule": delta_flops(37, H, K, V, B),
        "selective_scan": scan_flops(37, D, N, B),
    }
    with FlopCounterMode(display=False) as counter:
        variant.run(OPS[variant.op].reference, variant.make(37))
    assert counter.get_total_flops() == formulas[variant.op]


def test_the_delta_rule_recalls_what_it_was_told_last():
    """With beta = 1 and unit keys, reading a key gives exactly the value written under it last."""
    k = torch.eye(4, dtype=torch.float64)[[0, 1, 0, 2]].view(1, 4, 1, 4)
    v = torch.arange(8, dtype=torch.float64).view(1, 4, 1, 2)
    _, state = ops.delta_rule(k, k, v, torch.ones(1, 4, 1, dtype=torch.float64))
    assert torch.equal(state[0, 0, 0], v[0, 2, 0])
    assert torch.equal(state[0, 0, 1], v[0, 1, 0])


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("linear_attention", {"k": torch.randn(2, 5, H, K)}, r"k has shape \[2, 5, 4, 6\], expected .* T = 7 as in q"),
    ("linear_attention", {"v": torch.randn(2, 7, 3, V)}, r"heads of v \(3\) must be a multiple of .* \(4\)"),
    ("linear_attention", {"log_decay": torch.randn(2, 7)}, r"log_decay has shape \[2, 7\], expected \[H\], "),
    (
        "linear_attention",
        {"state": torch.randn(2, H, V, K)},
        r"state has shape .*, expected \[2, 4, 6, 5\]",
    ),
    ("linear_attention", {"q": torch.ones(2, 7, H, K).long()}, r"q has dtype torch.int64, expected a floating"),
    ("linear_attention", {"backend": "chunk_torhc"}, r"unknown backend .*'chunk_torhc'.*Did you mean 'chunk_torch'"),
    ("linear_attention", {"cu_seqlens": [0, 7]}, r"packs sequences into a batch of 1, got a batch of 2"),
    ("delta_rule", {"beta": torch.randn(2, 7)}, r"beta has shape \[2, 7\], expected \[B, T, H\]"),
    ("selective_scan", {"A": torch.randn(D + 1, N)}, r"A has shape \[13, 3\], expected .* D = 12 as in x"),
    ("selective_scan", {"B": torch.randn(2, 7, 5, N), "C": torch.randn(2, 7, 5, N)}, r"channels \(12\) must be a mult"),
]


@pytest.mark.parametrize(("op", "changes", "message"), WRONG)
def test_wrong_arguments_are_named(op: str, changes: dict[str, Any], message: str):
    variant = next(variant for variant in VARIANTS if variant.op == op)
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(ops, op)(**(variant.make(7) | changes))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 5, 3, 7], "must not decrease, got 5 then 3 at entry 2"),
        ([0, 5], "must end at the length 7, got 5"),
        ([1, 7], "must start at 0"),
        ([0, 2.7, 7], "must be whole numbers, got .0, 2.7, 7."),
        ("07", "must be whole numbers, got '07'"),
        (torch.tensor([0.0, 7.0]), "must be a 1-D int32 or int64 tensor, got torch.float32"),
    ],
)
def test_wrong_offsets_are_named(offsets: Any, message: str):
    for variant in (VARIANTS[0], VARIANTS[-1]):
        with pytest.raises(ValueError, match=message):
            variant.run("auto", variant.make(7, 1), cu_seqlens=offsets)
