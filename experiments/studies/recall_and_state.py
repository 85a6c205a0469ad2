"""Recall is bought with state: MQAR accuracy against bytes of state, by mixer."""

from __future__ import annotations

from experiments.studies.study import Study
from experiments.studies.sweep import Sweep

HEADS = {
    name: f"model={name} model.mixers.{name}.num_heads="
    for name in ("delta_net", "gated_delta_net", "gla", "retention")
}
ARMS = (
    "model=attention",
    HEADS["delta_net"] + "16,8,2",
    HEADS["gla"] + "16,8,2",
    "model=mamba2 model.mixers.mamba2.d_state=4,16,64",
    HEADS["gated_delta_net"] + "16,2",
    HEADS["retention"] + "8,2",
    "model=linear_attention",
    "model=based model.mixers.based.key_width=8",
)
SMALL = (
    "model=attention",
    HEADS["delta_net"] + "16,2",
    HEADS["gla"] + "16,2",
    "model=mamba2 model.mixers.mamba2.d_state=4,16",
    HEADS["retention"] + "2",
)


class RecallAndState(Study):
    name = "recall_and_state"
    title = "Recall is bought with state"
    sweeps = {
        "recorded": Sweep("experiment=recall_and_state seed=0,1,2 train.lr=3e-3,1e-2", ARMS),
        "small": Sweep("experiment=recall_and_state seed=0,1,2 train.lr=1e-2", SMALL),
    }
