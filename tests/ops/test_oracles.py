"""Values and gradients of independent implementations (``tests/data/oracles``), on every backend that runs here.

A record holds inputs ``in.*``, outputs ``out.*``, the weights ``cotangent.*`` of the scalar that was differentiated and
the gradients ``grad.*``, in float32; its metadata names the source. Bounds are those of float32.
"""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.linear_attention.ridge_regression import Covariance, solve
from seqarch.testing import assert_close
from tests.support.backends import available, on_device
from tests.support.paths import ORACLES

BOUND = {torch.float32: 2e-6, torch.float64: 1e-6}
"""The records themselves were rounded to float32 several times over: float64 does not come closer than that."""
ON_DEVICE = 1e-5
"""Of float32 products in three TF32 ones."""

RECORDS = {
    "causal_conv1d": "causal_conv1d",
    "delta_rule": "delta_rule",
    "delta_rule_dplr": "delta_rule",
    "delta_rule_scalar_decay": "delta_rule",
    "delta_rule_vector_decay": "delta_rule",
    "gated_slot_attention": "linear_attention",
    "linear_attention_head_decay": "linear_attention",
    "linear_attention_no_decay": "linear_attention",
    "linear_attention_scalar_decay": "linear_attention",
    "linear_attention_vector_decay": "linear_attention",
    "linear_attention_vector_decay_strong": "linear_attention",
    "log_linear_attention": "log_linear_attention",
    "mesa_net": "linear_attention",
    "native_sparse_attention": "block_sparse_attention",
    "path_attention": "path_attention",
    "preconditioned_delta_rule": "delta_rule",
    "selective_scan": "selective_scan",
    "ssd": "linear_attention",
    "stick_breaking_attention": "stick_breaking_attention",
}
HERE = [(record, name) for record, op in RECORDS.items() for name in available(op)]
THERE = [(record, name) for record, op in RECORDS.items() for name in on_device(op) if record != "delta_rule_dplr"]
"""No kernel of a device erases at other keys than it reads at."""

CASES = [(*case, "cpu", dtype, BOUND[dtype]) for case in HERE for dtype in BOUND]
CASES += [(*case, "cuda", torch.float32, ON_DEVICE) for case in THERE]


def compute(record: str, backend: str, scale: float, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The op's outputs under the record's names."""
    if record == "causal_conv1d":
        return dict(zip(("y", "state"), ops.causal_conv1d(**x, activation="silu", backend=backend), strict=True))
    if record == "selective_scan":
        x = {"B" if name == "Bm" else name: tensor for name, tensor in x.items()}
        return dict(zip(("y", "state"), ops.selective_scan(**x, dt_softplus=True, backend=backend), strict=True))
    if record == "native_sparse_attention":
        q, k, v = x["q"], x["k"], x["v"]
        selected = ops.block_sparse_attention(q, k, v, x["block_index"], 16, scale=scale, backend=backend)
        compressed = over_means(q, k, v, 16, scale)
        o = x["g_cmp"].unsqueeze(-1) * compressed + x["g_slc"].unsqueeze(-1) * selected
        return {"selected": selected, "compressed": compressed, "o": o}
    if record == "ssd":
        y, state = ops.linear_attention(
            x["C"], x["Bm"], x["x"], x["log_decay"], scale=1.0, state=x["state"], backend=backend
        )
        return {"y": y, "state": state}
    if record == "stick_breaking_attention":
        return dict(zip(("o", "rest"), ops.stick_breaking_attention(**x, scale=scale, backend=backend), strict=True))
    if record == "log_linear_attention":
        return {"o": ops.log_linear_attention(**x, scale=scale, backend=backend)[0]}
    if record == "gated_slot_attention":
        return {"o": of_slots(**x, scale=scale, backend=backend)}
    if record == "mesa_net":
        return of_regression(**x, backend=backend)
    if record == "path_attention":
        kept = {name: tensor for name, tensor in x.items() if name != "log_f"}
        bias = -scale * x["log_f"].cumsum(1)  # the plain form scales gates as it does scores, unlike the paper
        return {"o": ops.path_attention(**kept, key_bias=bias, scale=scale, backend=backend)[0]}
    if record == "preconditioned_delta_rule":
        return preconditioned(x, scale, backend)
    if record == "linear_attention_head_decay":
        decay = 1 - 2.0 ** (-5 - torch.arange(x["q"].shape[2], dtype=x["q"].dtype, device=x["q"].device))
        x = {**x, "log_decay": decay.log()}
    if record == "delta_rule_dplr":  # its correction is added, and reads the state before the decay
        read = -x["a"] * (-x["log_decay"]).exp()
        kept = {name: tensor for name, tensor in x.items() if name not in ("a", "b")}
        x = {**kept, "read": read, "erase": x["b"]}
    op = {"delta_rule": ops.delta_rule, "linear_attention": ops.linear_attention}[RECORDS[record]]
    return dict(zip(("o", "state"), op(**x, scale=scale, backend=backend), strict=True))


def of_slots(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, backend: str) -> Tensor:
    """Two linear attentions: to the slots, each a head one wide, and from them."""
    written = -torch.expm1(log_decay)
    options = {"scale": scale, "backend": backend}
    scores, _ = ops.linear_attention(q, k, written.flatten(2).unsqueeze(-1), log_decay.flatten(2), **options)
    return ops.linear_attention(scores.view(written.shape).softmax(-1), written, v, log_decay, **options)[0]


def of_regression(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, ridge: Tensor, backend: str
) -> dict[str, Tensor]:
    """Conjugate gradients, each step of which is a linear attention, and their implicit gradients."""
    nothing = q.new_zeros(q.shape[0], *k.shape[2:], v.shape[3])
    covariance = Covariance(k, beta.unsqueeze(-1) * k, log_decay, ridge, nothing)
    with ops.use_backends(linear_attention=backend):
        solved, last = solve(q, covariance, 30, None)
        o, state = covariance.sums(solved, v, nothing, None)
    return {"o": o, "covariance": last, "state": state}


def preconditioned(x: dict[str, Tensor], scale: float, backend: str) -> dict[str, Tensor]:
    """Keys of unit norm that are written at ``k x^(-r / (1 + |r|))``, x being 1.5."""
    q, k = (F.normalize(x[name], dim=-1) for name in "qk")
    one, added = torch.ones_like(k[..., :1]), x["sum_beta"].unsqueeze(-1) * k.square()
    sums, last = ops.linear_attention(one, one, added, x["sum_log_decay"], scale=1.0)
    r = (sums + 1e-6).log() - x["center"].unsqueeze(-1)
    written = k * 1.5 ** (-r / (1 + r.abs()))
    rates = {"beta": x["beta"], "log_decay": x["log_decay"], "read": k}
    o, state = ops.delta_rule(q, written, x["v"], **rates, scale=scale, backend=backend)
    return {"o": o, "state": state, "sums": last.squeeze(-2)}


def over_means(q: Tensor, k: Tensor, v: Tensor, size: int, scale: float) -> Tensor:
    """Attention over the means of the keys and values of blocks that are over."""
    k, v = (m.unflatten(1, (-1, size)).mean(2).repeat_interleave(q.shape[2] // m.shape[2], 2) for m in (k, v))
    block, time = (torch.arange(1, count + 1, device=q.device) for count in (k.shape[1], q.shape[1]))
    over = block * size <= time[:, None]
    scores = torch.einsum("bthk,bnhk->bhtn", q, k) * scale
    weights = scores.masked_fill(~over, -1e9).softmax(-1) * over
    return torch.einsum("bhtn,bnhv->bthv", weights, v)


@pytest.mark.parametrize(("record", "backend", "device", "dtype", "bound"), CASES, ids=str)
def test_values_and_gradients(record: str, backend: str, device: str, dtype: torch.dtype, bound: float):
    with safe_open(ORACLES / f"{record}.safetensors", "pt") as file:
        scale = float((file.metadata() or {}).get("scale", 1.0))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    parts = {part: {} for part in ("in", "out", "cotangent", "grad")}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        parts[part][key] = tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
    inputs = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in parts["in"].items()}
    outputs = compute(record, backend, scale, inputs)
    for name, expected in parts["out"].items():
        assert_close(outputs[name], expected, bound, name)
    scalar = torch.stack([(outputs[name] * weight).sum() for name, weight in parts["cotangent"].items()]).sum()
    gradients = torch.autograd.grad(scalar, [inputs[name] for name in parts["grad"]])
    for gradient, (name, expected) in zip(gradients, parts["grad"].items(), strict=True):
        assert_close(gradient, expected, bound, f"gradient of {name}")
