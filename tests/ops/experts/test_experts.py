"""The expert operation against a loop over the tokens, written apart from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from seqarch import ops
from seqarch.ops.experts import chunk_torch, flops, grouped_torch, groups
from seqarch.ops.experts.activations import ACTIVATIONS, DERIVATIVES
from seqarch.ops.native import onednn
from tests.support.backends import available

BACKENDS = available("experts")
TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 13, 6, 5, 7, 3


def make(
    dtype: torch.dtype = torch.float64, tokens: tuple[int, ...] = (TOKENS,), width: int = WIDTH, hidden: int = HIDDEN
) -> dict[str, Tensor]:
    """Random arguments; expert 4 is chosen by no token."""
    torch.manual_seed(0)
    choices = torch.rand(*tokens, EXPERTS).index_fill(-1, torch.tensor([4]), -1.0)
    weights = {"w_in": (width, hidden), "w_gate": (width, hidden), "w_out": (hidden, width)}
    return {
        "x": torch.randn(*tokens, width).to(dtype),
        **{name: (torch.randn(EXPERTS, *shape) / shape[0] ** 0.5).to(dtype) for name, shape in weights.items()},
        "expert_index": choices.topk(TOP_K).indices,
        "expert_weight": torch.rand(*tokens, TOP_K).to(dtype),
    }


def each_token(
    x, w_in, w_out, expert_index, expert_weight, w_gate=None, activation=F.silu, b_in=None, b_out=None, b_gate=None
) -> Tensor:
    b_in, b_out, b_gate = ([0] * EXPERTS if bias is None else bias for bias in (b_in, b_out, b_gate))
    rows = []
    for token in range(len(x)):
        y = torch.zeros_like(x[token])
        for e, weight in zip(expert_index[token].tolist(), expert_weight[token], strict=True):
            if e < 0:
                continue
            hidden = x[token] @ w_in[e] + b_in[e]
            hidden = activation(hidden) if w_gate is None else activation(x[token] @ w_gate[e] + b_gate[e]) * hidden
            y = y + weight * (hidden @ w_out[e] + b_out[e])
        rows.append(y)
    return torch.stack(rows)


def with_biases(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The arguments with biases of each product that they have."""
    sizes = {"w_in": HIDDEN, "w_out": WIDTH, "w_gate": HIDDEN}
    dtype = given["x"].dtype
    return given | {
        f"b_{name[2:]}": torch.randn(EXPERTS, size).to(dtype) for name, size in sizes.items() if name in given
    }


def gpt_oss(x, w_in, w_out, expert_index, expert_weight, w_gate, b_in, b_out, b_gate, limit=7.0) -> Tensor:
    """As ``each_token``, with the gated unit of GPT-OSS."""
    rows = []
    for token in range(len(x)):
        y = torch.zeros_like(x[token])
        for e, weight in zip(expert_index[token].tolist(), expert_weight[token], strict=True):
            gate = torch.minimum(x[token] @ w_gate[e] + b_gate[e], torch.tensor(limit, dtype=x.dtype))
            value = (x[token] @ w_in[e] + b_in[e]).clamp(-limit, limit)
            y = y + weight * ((gate / (1 + torch.exp(-1.702 * gate)) * (value + 1)) @ w_out[e] + b_out[e])
        rows.append(y)
    return torch.stack(rows)


def with_gradients(function, given: dict[str, Tensor]) -> dict[str, Tensor]:
    given = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in given.items()}
    y = function(**given)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).to(y.device).view_as(y)).sum().backward()
    return {"y": y.detach(), **{name: x.grad for name, x in given.items() if x.requires_grad and x.grad is not None}}


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "squared_relu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_equals_a_loop_over_the_tokens(backend, gated, activation):
    given = make()
    if not gated:
        del given["w_gate"]
    functions = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "squared_relu": lambda x: F.relu(x) ** 2}
    functions |= {
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "quick_gelu": lambda x: x / (1 + (-1.702 * x).exp()),
    }
    function = functions[activation]
    expected = with_gradients(lambda **g: each_token(activation=function, **g), given)
    found = with_gradients(lambda **g: ops.experts(activation=activation, backend=backend, **g), given)
    assert set(expected) == {"y", *given} - {"expert_index"}
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_biases_of_every_product(backend, gated):
    given = make()
    if not gated:
        del given["w_gate"]
    given = with_biases(given)
    given["expert_index"][3:5] = -1
    expected = with_gradients(each_token, given)
    found = with_gradients(lambda **g: ops.experts(backend=backend, **g), given)
    assert set(found) == set(expected) == {"y", *given} - {"expert_index"}
    assert found["y"][3].count_nonzero() == 0
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bounded_gates_and_values_are_those_of_gpt_oss(backend):
    """The bound is met by some gates and values on either side, and left alone by others."""
    given, limit = with_biases(make()), 1.5
    products = given["x"] @ given["w_in"] + given["b_in"][:, None], given["x"] @ given["w_gate"]
    assert all((each > limit).any() and (each < -limit).any() for each in products)
    options = {"activation": "quick_gelu", "limit": limit, "value_offset": 1.0, "backend": backend}
    expected = with_gradients(lambda **g: gpt_oss(limit=limit, **g), given)
    found = with_gradients(lambda **g: ops.experts(**options, **g), given)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_chosen_expert_learns_and_no_other(backend):
    found = with_gradients(lambda **g: ops.experts(backend=backend, **g), make())
    for name in ("w_in", "w_gate", "w_out"):
        learns = found[name].abs().amax(dim=(1, 2)) > 0
        assert learns.tolist() == [True] * 4 + [False] + [True] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_named_twice_counts_twice(backend):
    given = make()
    given["expert_index"] = torch.full((TOKENS, TOP_K), 2)
    expected = with_gradients(each_token, given)
    found = with_gradients(lambda **g: ops.experts(backend=backend, **g), given)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_choice_of_no_expert_adds_nothing(backend):
    given = make()
    index = given["expert_index"]
    none = torch.rand(index.shape) < 0.3
    none[3] = True
    unweighted = {**given, "expert_weight": given["expert_weight"].masked_fill(none, 0)}
    expected = with_gradients(each_token, unweighted)
    expected["expert_weight"].masked_fill_(none, 0)
    given["expert_index"] = index.masked_fill(none, -1)
    found = with_gradients(lambda **g: ops.experts(backend=backend, **g), given)
    assert found["y"][3].count_nonzero() == 0
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("gated", [True, False])
def test_chunks_are_the_whole(gated, monkeypatch):
    """Two tokens at a time, the last alone; some choose no expert."""
    given = make()
    given["expert_index"].masked_fill_(torch.rand(given["expert_index"].shape) < 0.2, -1)
    if not gated:
        del given["w_gate"]
    given = with_biases(given)
    expected = with_gradients(lambda **g: ops.experts(backend="parallel_torch", **g), given)
    for name in ("CHUNK_NUMBERS", "LEAST_ROWS"):
        monkeypatch.setattr(chunk_torch, name, 1)
    found = with_gradients(lambda **g: ops.experts(backend="chunk_torch", **g), given)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-13)


def test_chunks_add_up_wide(monkeypatch):
    """In bfloat16 a sum over many chunks is no worse than the products in it."""
    given = make(torch.bfloat16, (600,), 16, 16)
    exact = with_gradients(each_token, {name: x.double() if x.is_floating_point() else x for name, x in given.items()})
    errors = {}
    for numbers in (1, 2**22):
        for name in ("CHUNK_NUMBERS", "LEAST_ROWS"):
            monkeypatch.setattr(chunk_torch, name, numbers)
        found = with_gradients(lambda **g: ops.experts(backend="chunk_torch", **g), given)["w_in"]
        errors[numbers] = (found.double() - exact["w_in"]).norm() / exact["w_in"].norm()
    assert errors[1] < 1.2 * errors[2**22] < 0.02


def test_compiles_whole_and_is_checked_there_too():
    given = make()
    compiled = torch.compile(ops.experts, fullgraph=True, backend="aot_eager")
    expected = with_gradients(ops.experts, given)
    found = with_gradients(compiled, given)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-13)
    given["expert_index"][0, 0] = EXPERTS
    with pytest.raises(ValueError, match="expert_index holds 7"):
        compiled(**given)


def test_operators_keep_their_word():
    chosen = torch.tensor([2, 0, 0, 3, -1, 2])
    rows, right = (torch.randn(6, width, dtype=torch.float64, requires_grad=True) for width in (4, 3))
    weight = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    order, starts = groups.sort_by_expert(chosen, 5)
    assert order.tolist() == [4, 1, 2, 0, 5, 3]
    assert starts.tolist() == [1, 3, 3, 5, 6, 6]
    torch.library.opcheck(groups.sort_by_expert, (chosen, 5))
    torch.library.opcheck(grouped_torch.grouped_matmul, (rows, weight, starts))
    torch.library.opcheck(grouped_torch.grouped_outer, (rows, right, starts))
    given = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in with_biases(make()).items()}
    inputs = chunk_torch.ChunkInputs(**given, activation="silu", keep=True)
    torch.library.opcheck(chunk_torch.operator.operator, inputs.values())
    kept = chunk_torch.operator(inputs)[1].detach()
    detached = [x.detach() if isinstance(x, Tensor) else x for x in inputs.values()]
    for for_x, for_weights in ((True, True), (True, False), (False, True)):
        needed = [for_x, for_weights, for_weights, False, True, for_weights, False, *[for_weights] * 3, *[False] * 3]
        upstream = kept, torch.randn(TOKENS, WIDTH).double(), needed
        torch.library.opcheck(chunk_torch.operator.gradient, (*detached, *upstream))
    assert torch.autograd.gradgradcheck(lambda *x: grouped_torch.grouped_matmul(*x, starts), (rows, weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_and_flat_tokens_agree(backend):
    batched = make(tokens=(2, 5))
    flat = {name: x if name.startswith("w_") else x.flatten(0, 1) for name, x in batched.items()}
    y = ops.experts(**batched, backend=backend)
    assert y.shape == (2, 5, WIDTH)
    torch.testing.assert_close(y.flatten(0, 1), ops.experts(**flat, backend=backend), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    given = make(tokens=(4,), width=3, hidden=2)
    given |= {"b_in": torch.randn(EXPERTS, 2).double(), "b_out": torch.randn(EXPERTS, 3).double()}
    index = given.pop("expert_index")
    tensors = [x.requires_grad_() for x in given.values()]

    def call(*values):
        return ops.experts(expert_index=index, backend=backend, **dict(zip(given, values, strict=True)))

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    y = ops.experts(**make(tokens=(0,)), backend=backend)
    assert y.shape == (0, WIDTH)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_stays_within_its_own_rounding(backend):
    given = make(torch.bfloat16, tokens=(64,), width=64, hidden=96)
    exact = with_gradients(each_token, {name: x.double() if x.is_floating_point() else x for name, x in given.items()})
    found = with_gradients(lambda **g: ops.experts(backend=backend, **g), given)
    assert found["y"].dtype == torch.bfloat16
    for name, value in exact.items():
        error = (found[name].double() - value).square().mean() / value.square().mean()
        assert error.sqrt() < 0.01, name


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch"])
def library(request, monkeypatch):
    """What float32 products run on, on every processor."""
    monkeypatch.setattr(onednn, "unavailable", lambda: None if request.param else "not here")


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_float32_products_of_either_library(library, chunk, monkeypatch):
    monkeypatch.setattr(chunk_torch, "CHUNK_NUMBERS", chunk)
    monkeypatch.setattr(chunk_torch, "LEAST_ROWS", 20)
    given = make(torch.float32, (100,), 24, 40)
    exact = with_gradients(each_token, {name: x.double() if x.is_floating_point() else x for name, x in given.items()})
    found = with_gradients(lambda **g: ops.experts(backend="chunk_torch", **g), given)
    for name in exact:
        torch.testing.assert_close(found[name].double(), exact[name], rtol=1e-4, atol=1e-5 * exact[name].abs().max())


@pytest.mark.parametrize("trained", [{"x"}, {"w_in"}, {"w_out", "expert_weight"}, {"w_gate", "x"}, {"expert_weight"}])
def test_what_is_not_trained_costs_no_gradient(trained):
    given, gradients = make(), []
    for name in trained:
        given[name].requires_grad_()
    expected = torch.autograd.grad(each_token(**given).square().sum(), [given[name] for name in sorted(trained)])
    backward = torch.ops.seqarch.experts_backward.default

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is backward:
                names = chunk_torch.ChunkInputs.tensor_fields()
                gradients.append(dict(zip(names, result, strict=True)))
            return result

    loss = ops.experts(backend="chunk_torch", **given).square().sum()
    with Watch():
        found = torch.autograd.grad(loss, [given[name] for name in sorted(trained)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    weights = any(name.startswith("w_") for name in trained)
    assert (gradients[0]["x"].numel() > 0) == ("x" in trained)
    assert all((gradients[0][name].numel() > 0) == weights for name in ("w_in", "w_out", "w_gate"))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_autocast_around_the_backward_pass_alone_changes_nothing(activation):
    given = make(torch.float32)
    given["x"].requires_grad_()
    expected, found = (ops.experts(backend="chunk_torch", activation=activation, **given).sum() for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(found, given["x"])
    assert torch.equal(found, torch.autograd.grad(expected, given["x"])[0])


def test_what_is_kept_has_no_gradient_made():
    """As large as it is, zeros for it would be a quarter of the peak."""
    given = make()
    given["x"].requires_grad_()
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.append(getattr(result, "shape", None))
            return result

    loss = ops.experts(backend="chunk_torch", **given).sum()
    with Watch():
        loss.backward()
    assert (2, TOKENS * TOP_K, HIDDEN) not in made


def test_weights_of_any_strides_compile():
    given = make()
    given["expert_weight"] = given["expert_weight"].t().contiguous().t()
    given["x"] = given["x"].t().contiguous().t()
    given["w_in"] = given["w_in"].mT.contiguous().mT
    inputs = chunk_torch.ChunkInputs(**given, activation="silu", keep=True)
    kept = chunk_torch.operator(inputs)[1]
    upstream = kept, torch.randn(TOKENS, WIDTH).double(), [True] * 13
    torch.library.opcheck(chunk_torch.operator.gradient, (*inputs.values(), *upstream))


def test_every_activation_has_a_derivative():
    x = torch.linspace(-3, 3, 101, dtype=torch.float64, requires_grad=True)
    assert set(DERIVATIVES) == set(ACTIVATIONS)
    for name, function in ACTIVATIONS.items():
        (expected,) = torch.autograd.grad(function(x), x, x.detach())
        torch.testing.assert_close(DERIVATIVES[name](x.detach(), x.detach()), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_under_autocast(backend):
    given = make(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(lambda **g: ops.experts(backend=backend, **g), given)
    expected = with_gradients(each_token, given)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert ((found[name] - value).square().mean() / value.square().mean()).sqrt() < 0.02, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeating_the_call_gives_the_same_bits(backend):
    given = make(torch.float32, tokens=(300,))
    first, second = (with_gradients(lambda **g: ops.experts(backend=backend, **g), given) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("gated", [True, False])
def test_flops_equal_those_of_the_chosen_experts(gated):
    given = make()
    if not gated:
        del given["w_gate"]
    with FlopCounterMode(display=False) as counter:
        ops.experts(**given, backend="parallel_torch")
    assert counter.get_total_flops() == flops(TOKENS, TOP_K, WIDTH, HIDDEN, gated)
    assert counter.get_total_flops() == 2 * (3 if gated else 2) * WIDTH * HIDDEN * TOP_K * TOKENS


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"expert_index": torch.full((TOKENS, TOP_K), EXPERTS)}, ValueError, "holds 7, expected 0 to 6 for 7 experts"),
        ({"expert_index": torch.full((TOKENS, TOP_K), -2)}, ValueError, "holds -2, expected 0 to 6"),
        ({"expert_index": torch.zeros(TOKENS, TOP_K, dtype=torch.int32)}, TypeError, "dtype torch.int32"),
        ({"expert_index": torch.zeros(TOKENS, 2, dtype=torch.int64)}, ValueError, "expert_weight has shape"),
        ({"w_out": torch.zeros(EXPERTS, WIDTH, HIDDEN)}, ValueError, "w_out has shape"),
        ({"activation": "swish"}, ValueError, "unknown activation 'swish'"),
        ({"b_out": torch.zeros(EXPERTS, HIDDEN)}, ValueError, "b_out has shape"),
        ({"limit": 0.0}, ValueError, "limit is 0.0, expected a positive number or None"),
        ({"w_gate": None, "limit": 7.0}, ValueError, "limit is an option of gated experts, expected w_gate"),
        ({"w_gate": None, "value_offset": 1.0}, ValueError, "value_offset is an option of gated experts"),
        ({"backend": "grouped_trch"}, ValueError, "Did you mean 'grouped_torch'"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        ops.experts(**{**make(torch.float32), **change})
