"""The matrices that mixers apply to their values: against the outputs, and against what their papers say they are."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers import MIXERS, build_mixer
from seqarch.layers.materialize import VALUES, Materialized, materialize
from seqarch.layers.modules.rotary import apply_rotary
from seqarch.ops import Call
from seqarch.testing import assert_close, inputs

LENGTH = 40


def linear_in_values(name: str) -> bool:
    with ops.record_backends() as used, torch.no_grad():
        build_mixer(name, d_model=32)(inputs(2, dtype=torch.float32))
    return bool(set(used) & set(VALUES))


def materialized(name: str, **options) -> tuple[list[Materialized], list[Call]]:
    """The matrices, and the calls that they represent."""
    torch.manual_seed(0)
    mixer, x = build_mixer(name, d_model=32, **options).double(), inputs(LENGTH)
    with ops.record_calls() as calls, torch.no_grad():
        mixer(x)
    return materialize(mixer, x), [call for call in calls if call.op in VALUES]


@pytest.mark.parametrize("name", [name for name in MIXERS if linear_in_values(name)])
def test_the_matrices_are_causal_and_give_the_outputs(name):
    for op, matrix, values, output in materialized(name)[0]:
        assert_close(matrix.tril(), matrix, 0.0, f"{op} of {name}: the part that is causal")
        if op == "selective_scan":
            values, output = values.unsqueeze(-1), output.unsqueeze(-1)
        repeats = matrix.shape[1] // values.shape[2]
        applied = matrix @ values.transpose(1, 2).repeat_interleave(repeats, dim=1)
        assert_close(applied.transpose(1, 2), output, 1e-12, f"{op} of {name}")


def test_rows_of_attention_are_distributions():
    (found,), _ = materialized("sliding_window", window=5)
    assert_close(found.matrix.sum(-1), torch.ones(2, *found.matrix.shape[1:3]), 1e-12)
    assert (found.matrix.triu(-4).sum(-1) > 1 - 1e-12).all()


def test_retention_is_a_product_of_scores_and_powers_of_the_decay():
    (found,), (call,) = materialized("retention", num_heads=2)
    q, k = call.inputs.q, call.inputs.k
    steps = torch.arange(LENGTH)
    distance = (steps[:, None] - steps).double()
    for head in range(2):
        decay = (1 - 2.0 ** (-5 - head)) ** distance
        scores = q[:, :, head] @ k[:, :, head].transpose(1, 2) / q.shape[-1] ** 0.5
        assert_close(found.matrix[:, head], (scores * decay).tril(), 1e-12)
    torch.manual_seed(0)
    mixer = build_mixer("retention", d_model=32, num_heads=2).double()
    part = mixer.qkv_proj.linear(inputs(LENGTH))[..., :32].unflatten(-1, (2, 16))
    assert_close(q, apply_rotary(part, steps), 1e-12, "queries are turned")


def test_mamba2_is_semiseparable():
    """Dao and Gu 2024, section 5.1: ``M = L * (C B^T)`` with ``L_ij = a_i ... a_{j+1}`` (eq. 6)."""
    (found,), (call,) = materialized("mamba2", d_state=8, head_dim=16)
    C, B, log_decay = call.inputs.q, call.inputs.k, call.inputs.log_decay
    sums = log_decay.cumsum(1).transpose(1, 2)
    decay = (sums[..., :, None] - sums[..., None, :]).exp()
    scores = C[:, :, 0] @ B[:, :, 0].transpose(1, 2)
    assert_close(found.matrix, (scores[:, None] * decay).tril(), 1e-12)


def test_mamba_sums_its_states_decays():
    (found,), (call,) = materialized("mamba", d_state=3)
    _, dt, A, B, C, D, z, dt_bias = call.inputs.values()[:8]
    B, C = B.squeeze(2), C.squeeze(2)
    step = F.softplus(dt if dt_bias is None else dt + dt_bias)
    sums = (step.unsqueeze(-1) * A).cumsum(1).movedim(1, 2)  # [B, D, T, N]
    decay = (sums[:, :, :, None] - sums[:, :, None]).exp()
    matrix = torch.einsum("btn,bdtsn,bsn,bsd->bdts", C, decay, B, step).tril()
    matrix = matrix + torch.diag_embed(D[None, :, None].expand(2, -1, LENGTH))
    gate = F.silu(z).transpose(1, 2).unsqueeze(-1)
    assert_close(found.matrix, matrix * gate, 1e-12)


def test_the_delta_rule_is_a_triangular_solve():
    """``T = (I + tril(diag(beta) K K^T, -1))^-1 diag(beta)``, ``M = tril(Q K^T) T`` (Yang et al. 2024, section 3)."""
    (found,), (call,) = materialized("delta_net", num_heads=2)
    q, k, _, beta = (tensor.transpose(1, 2) for tensor in call.inputs.values()[:4])
    system = torch.eye(LENGTH).double() + (beta.unsqueeze(-1) * (k @ k.mT)).tril(-1)
    solved = torch.linalg.solve(system, torch.diag_embed(beta))
    assert_close(found.matrix, (q @ k.mT / q.shape[-1] ** 0.5).tril() @ solved, 1e-10)


def test_a_mixer_without_such_an_operation_is_refused():
    class Nothing(torch.nn.Module):
        def forward(self, x):
            return x, None

    with pytest.raises(ValueError, match=r"Nothing calls no operation.*expected one of attention.*it calls none"):
        materialize(Nothing(), inputs(3))  # pyright: ignore[reportArgumentType]
