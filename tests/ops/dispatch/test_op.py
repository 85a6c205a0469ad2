"""Dispatch: which backend runs, why the others do not, and what was recorded."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections import Counter

import pytest
import torch

from seqarch import ops
from seqarch.ops import OPS, BackendError
from seqarch.ops.dispatch.op import Op


def arguments(length: int = 5) -> dict[str, torch.Tensor]:
    return {name: torch.randn(1, length, 2, 4) for name in ("q", "k", "v")}


def test_auto_follows_the_written_order():
    op = OPS["linear_attention"]
    for length, order in ((5, op.order), (1, op.step_order)):
        first = next(name for name in order if op.backends[name].unavailable() is None)
        assert ops.explain("linear_attention", **arguments(length)).backend == first


def test_explain_gives_a_reason_for_each_other_backend():
    for name, kwargs in {"linear_attention": arguments(), "attention": arguments()}.items():
        explanation = ops.explain(name, **kwargs)
        assert explanation.backend not in explanation.reasons
        assert {explanation.backend, *explanation.reasons} == set(OPS[name].backends)
        assert all(explanation.reasons.values())
        assert f"{name}: {explanation.backend} would run" in str(explanation)


def test_a_named_backend_runs_or_raises():
    with ops.record_backends() as used:
        ops.linear_attention(**arguments(), backend="recurrent_torch")
        ops.linear_attention(**arguments())
        ops.linear_attention(**arguments(1))
    chosen = [ops.explain("linear_attention", **arguments(length)).backend for length in (5, 1)]
    assert used == {"linear_attention": Counter(["recurrent_torch", *chosen])}
    with pytest.raises(ValueError, match="unknown backend of linear_attention 'gpu'"):
        ops.linear_attention(**arguments(), backend="gpu")
    with pytest.raises(BackendError, match=r"backend 'chunk_sdpa' cannot serve this call: .*window"):
        ops.attention(**arguments(), backend="chunk_sdpa")


def test_use_backends_changes_auto_within_the_block_only():
    with ops.use_backends(linear_attention="recurrent_torch"), ops.record_backends() as inside:
        ops.linear_attention(**arguments())
        assert ops.explain("linear_attention", **arguments()).backend == "recurrent_torch"
    with ops.record_backends() as outside:
        ops.linear_attention(**arguments())
    assert inside == {"linear_attention": {"recurrent_torch": 1}}
    assert outside == {"linear_attention": {ops.explain("linear_attention", **arguments()).backend: 1}}
    with pytest.raises(ValueError, match=r"unknown operation 'linear_atention'.*Did you mean 'linear_attention'"):
        ops.explain("linear_atention")
    with pytest.raises(TypeError, match="linear_attention: its inputs are the same for every backend"):
        ops.explain("linear_attention", **arguments(), backend="chunk_torch")
    with pytest.raises(ValueError, match="unknown operation 'linear'"), ops.use_backends(linear="chunk_torch"):
        pass


def test_what_needs_no_more_than_torch_is_available_everywhere():
    plain = [(op, name) for op in OPS for name in OPS[op].backends if name.endswith(("_torch", "_sdpa"))]
    assert len(plain) >= 2 * len(OPS) - 1
    assert [(op, name) for op, name in plain if OPS[op].backends[name].unavailable()] == []


def test_where_no_backend_is_available_the_error_says_why(monkeypatch):
    module = OPS["linear_attention"].backends["chunk_torch"].module
    op = Op("linear_attention", order=(module,), reference=module)
    monkeypatch.setattr(module, "unavailable", lambda: "no such package", raising=False)
    with pytest.raises(BackendError, match=r"(?s)no backend would run.*chunk_torch: no such package"):
        op("auto", OPS["linear_attention"].inputs(**arguments()))


def test_import_brings_no_heavy_package():
    """``import seqarch`` and its parts load torch and einops alone."""
    heavy = "triton hydra omegaconf wandb matplotlib mamba_ssm flash_attn polars pandas"
    code = f"""
import sys, seqarch.models
print([name for name in {heavy.split()!r} if name in sys.modules])
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


EXAMPLES: dict[str, dict[str, object]] = {
    "attention": dict(arguments()),
    "block_sparse_attention": {
        **arguments(),
        "block_index": torch.zeros(1, 5, 2, 1, dtype=torch.int64),
        "block_size": 2,
    },
    "causal_conv1d": {"x": torch.randn(1, 5, 3), "weight": torch.randn(3, 4)},
    "compressed_attention": {
        "q": torch.randn(1, 5, 2, 3),
        **{name: torch.randn(1, 4, 1, 3) for name in "kv"},
        **{"compressed_length": 2, "compressed_stride": 1, "block_size": 2, "selected_blocks": 3},
    },
    "delta_rule": dict(arguments()),
    "experts": {
        "x": torch.randn(5, 3),
        "w_in": torch.randn(2, 3, 3),
        "w_out": torch.randn(2, 3, 3),
        "expert_index": torch.zeros(5, 1, dtype=torch.int64),
        "expert_weight": torch.ones(5, 1),
    },
    "gated_rnn": {"x": torch.randn(1, 5, 2, 4, 3), "weight": torch.randn(2, 4, 3, 3), "cell": "slstm"},
    "index_topk": {
        "q": torch.randn(1, 5, 2, 3),
        "k": torch.randn(1, 5, 3),
        "weight": torch.randn(1, 5, 2),
        "top_k": 2,
    },
    "indexer_loss": {
        "index_q": torch.randn(1, 5, 2, 3),
        "index_k": torch.randn(1, 5, 3),
        "weight": torch.randn(1, 5, 2),
        **{name: torch.randn(1, 5, 2, 3) for name in "qk"},
    },
    "linear_attention": dict(arguments()),
    "log_linear_attention": {**arguments(), "level_weight": torch.randn(1, 5, 2, 4)},
    "path_attention": {**arguments(), "w": torch.randn(1, 5, 2, 4), "beta": torch.rand(1, 5, 2)},
    "stick_breaking_attention": dict(arguments()),
    "selective_scan": {
        **{name: torch.randn(1, 5, 3) for name in ("x", "dt")},
        "A": -torch.ones(3, 2),
        **{name: torch.randn(1, 5, 2) for name in ("B", "C")},
    },
}


@pytest.mark.parametrize("name", OPS)
def test_arguments_of_another_type_are_named(name):
    op, given = getattr(ops, name), EXAMPLES[name]
    op(**given)
    for argument, parameter in inspect.signature(op).parameters.items():
        if argument == "backend":
            continue
        wrong = [{1.5}, "x", True, 3, None]
        if "Sequence" in parameter.annotation:
            wrong.remove("x")
        for kind, value in (("bool", True), ("int", 3), ("float", 3), ("None", None), ("str", "x")):
            if kind in parameter.annotation and value in wrong:
                wrong.remove(value)
        for value in wrong:
            with pytest.raises(TypeError, match=rf"{name}: {argument} is .*expected"):
                op(**{**given, argument: value})
            with pytest.raises(TypeError, match=rf"{name}: {argument} is .*expected"):
                ops.explain(name, **{**given, argument: value})


@pytest.mark.parametrize("backend", [None, 3, ["auto"]])
def test_backends_are_names(backend):
    with pytest.raises(ValueError, match="unknown backend of attention"):
        ops.attention(**arguments(), backend=backend)
