"""Length: trained on short sequences, judged on long ones: who extrapolates, at which cost a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from experiments.studies.study import Study
from experiments.studies.sweep import Sweep

ARMS = (
    "model=attention,sliding_window,mamba2,gated_delta_net",
    "model=attention model.name=attention_no_position model.mixers.attention.position=none",
)


class Length(Study):
    name = "length"
    title = "Beyond the length of training"
    sweeps: ClassVar[Mapping[str, Sweep]] = {
        "recorded": Sweep("experiment=length_text seed=0,1,2 train.lr=3e-3,1e-2", ARMS),
        "small": Sweep("experiment=length_text seed=0,1,2 train.lr=1e-2 train.steps=120", ARMS),
        "large": Sweep(
            "experiment=length_text seed=0,1,2,3,4 train.lr=5e-4,1e-3,2e-3 model.d_model=512 model.depth=12"
            " task.length=512 task.eval_length=16384 train.batch_size=128 train.steps=20000 train.eval_every=1000"
            " train.device=cuda",
            (*ARMS, "model=retention,rwkv7,hybrid"),
        ),
    }
