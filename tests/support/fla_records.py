"""Computes records of ``tests/data/oracles`` by flash-linear-attention's forms in plain torch.

    pip install --no-deps fla-core==0.6.0
    python -m tests.support.fla_records [--write]

prints how far each record is from what the package computes of the record's inputs; ``--write`` draws inputs where
there is no record, and writes what it computes of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tests.support.paths import ORACLES

Tensors = dict[str, Tensor]


def draw(*shape: int) -> Tensor:
    return torch.randn(2, 70, *shape)


def log_linear_inputs() -> Tensors:
    k = F.normalize(draw(2, 16), dim=-1)
    return {
        "q": draw(2, 16),
        "k": k,
        "v": draw(4, 8),
        "level_weight": F.softplus(draw(4, 8)),
        "log_decay": -draw(4).abs(),
    }


def log_linear(x: Tensors) -> Tensors:
    from fla.ops.log_linear_attn.naive import naive_log_linear_attn  # pyright: ignore[reportMissingImports]

    return {"o": naive_log_linear_attn(x["q"], x["k"], x["v"], x["log_decay"], x["level_weight"], scale=0.25)}


def stick_breaking_inputs() -> Tensors:
    return {"q": draw(4, 16), "k": draw(2, 16), "v": draw(2, 8)}


def stick_breaking(x: Tensors) -> Tensors:
    from fla.ops.stickbreaking_attn.naive import naive_stickbreaking_attn  # pyright: ignore[reportMissingImports]

    return dict(zip(("o", "rest"), naive_stickbreaking_attn(x["q"], x["k"], x["v"], scale=0.25), strict=True))


def slots_inputs() -> Tensors:
    return {"q": draw(2, 16), "k": draw(2, 16), "v": draw(2, 8), "log_decay": F.logsigmoid(draw(2, 6)) / 8}


def slots(x: Tensors) -> Tensors:
    from fla.ops.gsa.naive import naive_recurrent_gsa  # pyright: ignore[reportMissingImports]

    written, g = -torch.expm1(x["log_decay"]), x["log_decay"]
    return {"o": naive_recurrent_gsa(x["q"], x["k"], x["v"], written, g, scale=1.0)[0]}


def preconditioned_inputs() -> Tensors:
    rates = {"beta": draw(2).sigmoid(), "sum_beta": draw(2).sigmoid()}
    decays = {"log_decay": -draw(2).abs(), "sum_log_decay": -draw(2).abs()}
    return {"q": draw(2, 16), "k": draw(2, 16), "v": draw(2, 8), **rates, **decays, "center": torch.randn(2)}


def preconditioned(x: Tensors) -> Tensors:
    from fla.ops.precond_gated_delta_rule.naive import (  # pyright: ignore[reportMissingImports]
        naive_recurrent_precond_gated_delta_rule,
    )

    given = (x[name] for name in ("q", "k", "v", "sum_log_decay", "log_decay", "sum_beta", "beta"))
    o, state, sums = naive_recurrent_precond_gated_delta_rule(
        *given, scale=0.25, output_final_state=True, log_atk_scale=x["center"]
    )
    return {"o": o, "state": state, "sums": sums}


def mesa_inputs() -> Tensors:
    unit = {name: F.normalize(draw(2, 16), dim=-1) for name in "qk"}
    rates = {"beta": draw(2).sigmoid(), "log_decay": -draw(2).abs() / 8}
    return {**unit, "v": draw(2, 16), **rates, "ridge": 0.25 + F.softplus(torch.randn(2, 16))}


def mesa(x: Tensors) -> Tensors:
    from fla.ops.mesa_net.naive import naive_mesa_net_exact  # pyright: ignore[reportMissingImports]

    given = (x[name] for name in ("q", "k", "v", "log_decay", "ridge", "beta"))
    return dict(zip(("o", "covariance", "state"), naive_mesa_net_exact(*given), strict=True))


def path_inputs() -> Tensors:
    factors = {"w": F.normalize(draw(2, 16), dim=-1), "beta": 2 * draw(2).sigmoid()}
    return {"q": draw(4, 16), "k": draw(2, 16), "v": draw(2, 8), **factors, "log_f": F.logsigmoid(draw(4) + 2)}


def path(x: Tensors) -> Tensors:
    from fla.ops.path_attn.naive import naive_path_attn  # pyright: ignore[reportMissingImports]

    return {"o": naive_path_attn(x["q"], x["k"], x["v"], x["w"], x["beta"], x["log_f"], 0.25)}


RECORDS: dict[str, tuple[Callable[[], Tensors], Callable[[Tensors], Tensors], str]] = {
    "gated_slot_attention": (slots_inputs, slots, "1.0"),
    "log_linear_attention": (log_linear_inputs, log_linear, "0.25"),
    "mesa_net": (mesa_inputs, mesa, "1.0"),
    "path_attention": (path_inputs, path, "0.25"),
    "preconditioned_delta_rule": (preconditioned_inputs, preconditioned, "0.25"),
    "stick_breaking_attention": (stick_breaking_inputs, stick_breaking, "0.25"),
}
"""By the record's name its inputs, what computes it and the scale."""


def computed(name: str, inputs: Tensors) -> Tensors:
    """The record with these inputs."""
    leaves = {
        key: x.double().requires_grad_() for key, x in inputs.items()
    }  # some forms compute in float32 all the same
    outputs = RECORDS[name][1](leaves)
    torch.manual_seed(1)
    weights = {key: torch.randn_like(x) for key, x in outputs.items()}
    total = torch.stack([(outputs[key] * weight).sum() for key, weight in weights.items()]).sum()
    gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    parts = {"in": inputs, "out": outputs, "cotangent": weights, "grad": gradients}
    return {f"{part}.{key}": x.detach().float().contiguous() for part, of in parts.items() for key, x in of.items()}


def inputs_of(name: str, path: Path) -> Tensors:
    if path.exists():
        return {key.removeprefix("in."): x for key, x in load_file(path).items() if key.startswith("in.")}
    torch.manual_seed(0)
    return RECORDS[name][0]()


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.support.fla_records", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put what is computed in the records' place")
    write = parser.parse_args().write
    for name, (_, _, scale) in RECORDS.items():
        path = ORACLES / f"{name}.safetensors"
        found = computed(name, inputs_of(name, path))
        if path.exists():
            with safe_open(path, "pt") as file:
                furthest = max(float((file.get_tensor(key) - x).abs().max()) for key, x in found.items())
            print(json.dumps({"record": name, "furthest": furthest}))
        if write:
            save_file(found, path, {"source": "fla-core 0.6.0", "op": name, "scale": scale})


if __name__ == "__main__":
    main()
