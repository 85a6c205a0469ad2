"""Log-linear attention against the paper's partition, written apart, and every backend against the reference."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch import ops
from seqarch.ops.log_linear_attention import flops
from seqarch.testing import assert_close
from tests.support.backends import available

BACKENDS = available("log_linear_attention")
EXACT = 1e-11
RULES = ("linear", "delta")


def make(
    rule: str, length: int, rows: int = 2, levels: int = 10, heads: int = 4, groups: int = 2, decays: bool = True
) -> dict[str, Tensor]:
    """Inputs in float64 for rows of so many tokens; keys of unit norm with the delta rule."""
    torch.manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(rows, length, *sizes, dtype=torch.float64)

    k = F.normalize(draw(groups, 5), dim=-1)
    given = {"q": draw(groups, 5), "k": k, "v": draw(heads, 3), "level_weight": draw(heads, levels).exp()}
    given |= {"beta": 2 * draw(heads).sigmoid()} if rule == "delta" else {}
    return given | ({"log_decay": -draw(heads).abs()} if decays else {})


def level(t: int, j: int) -> int:
    """The level at which token t sees token j: the paper's greedy partition of the tokens before t (section 3.1), in
    which one after the other the largest power of two of them is taken off its start."""
    if t == j:
        return 0
    start = 0
    while True:
        size = 1 << ((t - start).bit_length() - 1)  # the largest power of two of tokens that is left before t
        if start <= j < start + size:
            return size.bit_length()
        start += size


def dense(rule: str, given: dict[str, Tensor]) -> Tensor:
    """``((M o Lambda) V``, M being the matrix that the base operation applies to its values, head by head."""
    rows, length, heads, _ = given["v"].shape
    units = torch.eye(length, dtype=torch.float64)[None, :, None].expand(rows, -1, heads, -1)
    rates = {name: given[name] for name in ("beta", "log_decay") if name in given}
    operation = ops.delta_rule if rule == "delta" else ops.linear_attention
    matrix, _ = operation(given["q"], given["k"], units, **rates, backend="recurrent_torch")
    table = torch.tensor([[level(t, min(t, j)) for j in range(length)] for t in range(length)])
    weights = given["level_weight"].gather(-1, table[None, :, None].expand(rows, -1, heads, -1))
    return torch.einsum("bthj,bjhv->bthv", matrix * weights, given["v"])


def with_gradients(given: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Both results, and the gradients of a weighted sum of both."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    results = ops.log_linear_attention(**leaves, **options)
    weights = [torch.linspace(-1, 1, each.numel(), dtype=torch.float64).cos().view_as(each) for each in results]
    total = torch.stack([(each * weight).sum() for each, weight in zip(results, weights, strict=True)]).sum()
    return [*(each.detach() for each in results), *torch.autograd.grad(total, list(leaves.values()))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_outputs_are_those_of_the_papers_partition(rule: str, backend: str):
    for length in (1, 2, 7, 64, 150):
        given = make(rule, length)
        o, _ = ops.log_linear_attention(**given, backend=backend)
        assert_close(o, dense(rule, given), EXACT, f"{length} tokens")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_with_weights_of_one_it_is_the_base_operation(rule: str, backend: str):
    given = make(rule, 150)
    weight = given.pop("level_weight")
    o, states = ops.log_linear_attention(**given, level_weight=torch.ones_like(weight), backend=backend)
    expected, state = (ops.delta_rule if rule == "delta" else ops.linear_attention)(**given)
    assert_close(o, expected, EXACT)
    assert_close(states.sum(2), state, EXACT, "the sum of all states")


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_held_is_a_binary_counter(backend: str):
    for length in (1, 5, 64, 100, 128):
        _, states = ops.log_linear_attention(**make("delta", length, levels=8), backend=backend)
        held = [place for place in range(7) if states[:, :, place].abs().max() > 0]
        assert held == [place for place in range(7) if length >> place & 1], length
    given = make("linear", 6, levels=4, decays=False)
    _, states = ops.log_linear_attention(**given, backend=backend)
    outer = torch.einsum("btgk,btgrv->bgrtkv", given["k"], given["v"].unflatten(2, (2, 2))).flatten(1, 2)
    assert_close(states[:, :, 2], outer[:, :, :4].sum(2), EXACT, "the first four tokens")
    assert_close(states[:, :, 1], outer[:, :, 4:].sum(2), EXACT, "the two after them")


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "recurrent_torch"])
@pytest.mark.parametrize("rule", RULES)
def test_every_backend_equals_the_reference(rule: str, backend: str):
    """From empty states and from those of other tokens, of rows that stand at different tokens, packed and apart."""
    counts = (100, 37)
    states = [ops.log_linear_attention(**make(rule, n, rows=1), backend="recurrent_torch")[1] for n in counts]
    cases: list[tuple[dict[str, Tensor], dict[str, Any]]] = [
        (make(rule, 70), {}),
        (make(rule, 66, decays=False, groups=1), {"scale": 0.3}),
        (make(rule, 20) | {"state": torch.cat(states[1:] * 2)}, {"before": 37}),
        (make(rule, 91) | {"state": torch.cat(states)}, {"before": counts}),
        (make(rule, 91, rows=1) | {"state": torch.cat(states)}, {"before": counts, "cu_seqlens": [0, 64, 91]}),
        (make(rule, 3, rows=1, levels=3), {"cu_seqlens": [0, 0, 3]}),
        (make(rule, 4, levels=3), {}),
    ]
    for given, options in cases:
        expected = with_gradients(given, **options, backend="recurrent_torch")
        found = with_gradients(given, **options, backend=backend)
        for what, a, b in zip(("o", "last state", *given), found, expected, strict=True):
            assert_close(a, b, EXACT, f"{what}, {options}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_any_split_gives_the_same(rule: str, backend: str):
    given = make(rule, 150)
    o, last = ops.log_linear_attention(**given, backend=backend)
    for cuts in ((64,), (1, 2, 3), (63, 66), (100,), (0, 128)):
        state, outputs, starts = torch.zeros_like(last), [], (0, *cuts, 150)
        for start, end in pairwise(starts):
            piece = {name: x[:, start:end] for name, x in given.items()}
            part, state = ops.log_linear_attention(**piece, state=state, before=start, backend=backend)
            outputs.append(part)
        assert_close(torch.cat(outputs, 1), o, EXACT, f"{cuts}")
        assert_close(state, last, EXACT, f"the state after {cuts}")


@pytest.mark.parametrize("rule", RULES)
def test_gradcheck(rule: str):
    given = {name: x.requires_grad_() for name, x in make(rule, 6, rows=1, levels=4, heads=2, groups=1).items()}

    def outputs(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ops.log_linear_attention(**dict(zip(given, tensors, strict=True)), backend="recurrent_torch")

    assert torch.autograd.gradcheck(outputs, tuple(given.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_decays_of_any_strength_are_finite_and_right(backend: str):
    for rule in RULES:
        given = make(rule, 130)
        given["log_decay"] = given["log_decay"] * torch.tensor([0.0, 1.0, 100.0, torch.inf], dtype=torch.float64)
        given["log_decay"] = given["log_decay"].nan_to_num(nan=0.0, neginf=-torch.inf)
        o, last = ops.log_linear_attention(**given, backend=backend)
        expected, state = ops.log_linear_attention(**given, backend="recurrent_torch")
        assert o.isfinite().all()
        assert_close(o, expected, EXACT)
        assert_close(last, state, EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_within_its_rounding(backend: str):
    given = make("delta", 130)
    exact, _ = ops.log_linear_attention(**{name: x.bfloat16().double() for name, x in given.items()})
    low, state = ops.log_linear_attention(**{name: x.bfloat16() for name, x in given.items()}, backend=backend)
    assert (low.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close(low, exact, 0.02)


def test_flops_count_the_states_that_are_there():
    def slowly(length: int, delta: bool) -> int:
        read = sum(t.bit_count() for t in range(length))
        return 2 * 3 * 4 * 5 * 6 * (2 * length + (3 if delta else 1) * read)

    for length in (0, 1, 2, 37, 64, 100):
        for delta in (False, True):
            assert flops(length, 3, 8, 4, 5, 6, delta) == slowly(length, delta), (length, delta)


def test_wrong_arguments_are_named():
    given = make("delta", 4, levels=3)
    for change, message in (
        (
            {"level_weight": given["level_weight"][..., :2]},
            "a row has 4 tokens, expected at most 2: level_weight has 2",
        ),
        ({"level_weight": given["level_weight"][..., :1]}, "level_weight has 1 levels, expected at least 2"),
        (
            {"before": 1},
            r"a row has 5 tokens, expected at most 4: level_weight has 3 levels, and each more serves twice",
        ),
        ({"before": (0, 1, 2)}, r"before is \(0, 1, 2\), expected 2 whole numbers of at least 0, or one"),
        ({"before": -1}, "before is -1, expected 2 whole numbers"),
        ({"state": torch.zeros(2, 4, 3, 5, 3)}, r"state has shape \[2, 4, 3, 5, 3\], expected \[2, 4, 2, 5, 3\]"),
        ({"log_decay": torch.zeros(2, 4, 4, 5)}, r"log_decay has shape .*, expected \[H\] or \[B, T, H\]"),
        ({"beta": torch.zeros(2, 4, 3)}, "beta has shape"),
    ):
        with pytest.raises(ValueError, match=f"^log_linear_attention: {message}"):
            ops.log_linear_attention(**{**given, **change})
