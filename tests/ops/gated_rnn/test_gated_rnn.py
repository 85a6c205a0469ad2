"""Gated recurrences against torch's own and their papers' equations, and every backend against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import ops
from seqarch.ops.gated_rnn import CELLS, recurrent_cpp
from seqarch.ops.native import cpu_library
from seqarch.testing import assert_close
from tests.support.backends import available

BACKENDS = available("gated_rnn")
NAMES = ("h", "last", "dx", "dweight", "dbias", "dstate")


Sizes = tuple[int, int, int, int]


def make(
    cell: str, sizes: Sizes = (2, 9, 2, 5), rows: int | None = None, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """x, weight, bias and state for B, T, H and W; n of an sLSTM is positive, and 0 in one channel, as c is there."""
    torch.manual_seed(0)
    B, T, H, W = sizes
    gates, states = CELLS[cell]
    x, bias = torch.randn(B, T, H, gates, W), torch.randn(H, gates, W)
    weight, state = torch.randn(H, gates, W, W) * W**-0.5, torch.randn(rows or B, states, H, W)
    if cell == "slstm":
        state[:, 2] = state[:, 2].abs() + 0.1
        state[:, 1:3, 0, 0] = 0
    return [x.to(dtype), *(each.to(torch.promote_types(dtype, torch.float32)) for each in (weight, bias, state))]


def call(cell: str, backend: str, **options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return ops.gated_rnn(x, weight, bias, cell=cell, state=state, backend=backend, **options)

    return run


def with_gradients(function: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor]) -> list[Tensor]:
    """Both results, and the gradients of a weighted sum of both."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*leaves)
    weights = [torch.linspace(-1, 1, each.numel(), dtype=torch.float64).cos().view_as(each) for each in results]
    total = torch.stack([(each * weight).sum() for each, weight in zip(results, weights, strict=True)]).sum()
    return [*(each.detach() for each in results), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_one_head_is_torchs_own(cell):
    x, weight, bias, state = make(cell, (3, 12, 1, 6))
    theirs = (nn.LSTM if cell == "lstm" else nn.GRU)(4, 6, batch_first=True).double()
    u = torch.randn(3, 12, 4, dtype=torch.float64)
    x = (u @ theirs.weight_ih_l0.T + theirs.bias_ih_l0).view(x.shape)
    weight, bias = theirs.weight_hh_l0.view(weight.shape), theirs.bias_hh_l0.view(bias.shape)
    first = state[:, 0].transpose(0, 1).contiguous()
    last: Any
    if cell == "lstm":
        h, last = theirs(u, (first, state[:, 1].transpose(0, 1).contiguous()))
        last = torch.stack(last, dim=2)
    else:
        h, last = theirs(u, first)
        last = last.unsqueeze(2)
    found, after = ops.gated_rnn(x, weight, bias, cell=cell, state=state)
    torch.testing.assert_close(found.flatten(2), h, rtol=0, atol=1e-12)
    torch.testing.assert_close(after.flatten(1), last.transpose(0, 1).reshape(3, -1), rtol=0, atol=1e-12)


def test_slstm_is_its_equations_without_a_stabiliser():
    """Eq. 8 to 14 of the paper, which would overflow with larger gates, and heads apart from each other."""
    x, weight, bias, _ = make("slstm", (2, 12, 3, 4))
    found, last = ops.gated_rnn(x, weight, bias, cell="slstm")
    for head in range(3):
        h, c, n = (torch.zeros(2, 4, dtype=torch.float64) for _ in range(3))
        for t in range(12):
            z, i, f, o = (x[:, t, head, g] + h @ weight[head, g].T + bias[head, g] for g in range(4))
            c = f.sigmoid() * c + i.exp() * z.tanh()
            n = f.sigmoid() * n + i.exp()
            h = o.sigmoid() * c / n
            torch.testing.assert_close(found[:, t, head], h, rtol=0, atol=1e-12)
        stabiliser = last[:, 3, head].exp()
        torch.testing.assert_close(last[:, 1, head] * stabiliser, c)
        torch.testing.assert_close(last[:, 2, head] * stabiliser, n)


def test_gates_of_any_size_are_finite():
    x, weight, bias, _ = make("slstm", (1, 40, 1, 8), dtype=torch.float32)
    for backend in BACKENDS:
        for scale in (1e2, 1e4, -1e4):
            results = with_gradients(call("slstm", backend), [scale * x, weight, bias, torch.zeros(1, 4, 1, 8)])
            assert all(each.isfinite().all() for each in results), (backend, scale)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "recurrent_torch"])
@pytest.mark.parametrize("cell", CELLS)
def test_every_backend_equals_the_reference(cell, backend):
    cases: list[tuple[Sizes, int | None, dict[str, Any]]] = [
        ((5, 37, 2, 5), None, {}),
        ((1, 1, 1, 1), None, {}),
        ((1, 40, 3, 17), 7, {"cu_seqlens": [0, 3, 3, 20, 21, 38, 39, 40]}),
    ]
    for sizes, rows, options in cases:
        inputs = make(cell, sizes, rows)
        expected = with_gradients(call(cell, "recurrent_torch", **options), inputs)
        found = with_gradients(call(cell, backend, **options), inputs)
        for what, a, b in zip(NAMES, found, expected, strict=True):
            assert_close(a, b, 1e-11, f"{sizes} {what}")


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell):
    """Also of c and n of an sLSTM, at the m that they are held at; what m itself gets is none."""
    inputs = [x.requires_grad_() for x in make(cell, (1, 4, 1, 2))]
    inputs[3].data[:, 1:, 0, 0] += 0.5

    def outputs(*given: Tensor) -> Tensor:
        return ops.gated_rnn(*given[:3], cell=cell, state=given[3])[0]

    if cell == "slstm":
        x, weight, bias, state = inputs
        m = state[:, 3:].detach()
        inputs = [x, weight, bias, state[:, :3].detach().clone().requires_grad_()]
        assert torch.autograd.gradcheck(lambda *g: outputs(*g[:3], torch.cat([g[3], m], dim=1)), inputs)
        h, _ = ops.gated_rnn(x, weight, bias, cell=cell, state=state)
        assert (torch.autograd.grad(h.sum(), state)[0][:, 3] == 0).all()
    else:
        assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("isa", cpu_library.supported_isas())
def test_every_instruction_set_and_number_of_threads(isa):
    for cell in CELLS:
        inputs = make(cell, (11, 70, 2, 33), dtype=torch.float32)
        wanted = with_gradients(call(cell, "recurrent_torch"), [x.double() for x in inputs])
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                with cpu_library.use_isa(isa):
                    results.append(with_gradients(call(cell, "recurrent_cpp"), inputs))
        finally:
            torch.set_num_threads(before)
        for what, a, b, c in zip(NAMES, *results, wanted, strict=True):
            assert torch.equal(a, b), (cell, what)
            assert_close(a, c, 3e-6, f"{cell} {what}")
        x, *others = inputs
        low = with_gradients(call(cell, "recurrent_cpp"), [x.bfloat16(), *others])
        assert low[0].dtype == low[2].dtype == torch.bfloat16
        assert_close(low[0], wanted[0], 0.02, f"{cell} in bfloat16")


@pytest.mark.slow
def test_the_compiled_operator_keeps_torchs_rules():
    if cpu_library.unavailable():
        return
    inputs = ops.OPS["gated_rnn"].inputs(*make("slstm")[:3], cell="slstm")
    given = recurrent_cpp.with_keep(inputs.replace(x=inputs.x.requires_grad_()))
    torch.library.opcheck(recurrent_cpp.operator.operator, given.values())
    with torch.no_grad():
        assert recurrent_cpp.operator(recurrent_cpp.with_keep(inputs))[2].numel() == 0


def test_wrong_arguments_are_named():
    x, weight, bias, state = make("lstm")
    for change, message in (
        ({"cell": "gru"}, "x has 4 gates, expected 3 for the cell 'gru'"),
        ({"cell": "lstmm"}, r"unknown cell of gated_rnn 'lstmm'.*lstm"),
        ({"weight": weight[:, :, :3]}, "weight has shape"),
        ({"state": state[:, :1]}, r"state has shape \[2, 1, 2, 5\], expected \[2, 2, 2, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.gated_rnn(**{"x": x, "weight": weight, "bias": bias, "state": state, "cell": "lstm", **change})


def test_the_normaliser_keeps_outputs_between_gates():
    """``|c / n| < 1``: an average of tanh(z), whatever the gates say."""
    x, weight, bias, _ = make("slstm", (2, 50, 1, 8))
    h, _ = ops.gated_rnn(x * 10, weight, bias, cell="slstm")
    assert (h.abs() <= 1).all()
    assert F.relu(h).sum() > 0
