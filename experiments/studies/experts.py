"""Mixtures of experts: quality at equal active parameters, loads over time, what each balancing method costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from experiments.studies.study import Study
from experiments.studies.sweep import Sweep

MOE = "model.channels.moe."
UNBALANCED = f"{MOE}load_balance_weight=0 {MOE}router_z_weight=0"
METHODS = {
    "dense": "model.channel=swiglu",
    "no_balancing": UNBALANCED,
    "loss": f"{MOE}load_balance_weight=0.01 {MOE}router_z_weight=0",
    "bias": f"{UNBALANCED} {MOE}expert_bias=true {MOE}bias_rate=0.01",
    "capacity": f"{UNBALANCED} {MOE}capacity_factor=1.25",
}
"""How the load is balanced, by the name that the model has."""

ARMS = tuple(f"model=delta_net model.name={name} {options}" for name, options in METHODS.items())


class Experts(Study):
    name = "experts"
    title = "Mixture of experts"
    history = ("largest_load", "/load", "dead_experts", "dropped_share", "validation_bits_per_byte")
    sweeps: ClassVar[Mapping[str, Sweep]] = {
        "recorded": Sweep("experiment=experts_text seed=0,1,2 train.lr=3e-3,1e-2", ARMS),
        "small": Sweep("experiment=experts_text seed=0,1,2 train.lr=1e-2 train.steps=120", ARMS),
        "large": Sweep(
            "experiment=experts_text seed=0,1,2,3,4 train.lr=5e-4,1e-3,2e-3 model.d_model=512 model.depth=12"
            " model.channels.moe.num_experts=64 model.channels.moe.top_k=8 task.length=2048 task.eval_length=16384"
            " train.batch_size=64 train.steps=20000 train.eval_every=500 train.device=cuda",
            ARMS,
        ),
    }
