"""The learning rate decides: recall against learning rate, with one layer and with two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from experiments.studies.recall_and_state import HEADS
from experiments.studies.study import Study
from experiments.studies.sweep import Sweep

ARMS = (
    "model=attention",
    HEADS["delta_net"] + "2",
    HEADS["gla"] + "2",
    "model=mamba2 model.mixers.mamba2.d_state=16",
)


class LearningRate(Study):
    name = "learning_rate"
    title = "The learning rate decides"
    sweeps: ClassVar[Mapping[str, Sweep]] = {
        "recorded": Sweep("experiment=recall_and_state seed=0,1,2 train.lr=1e-3,3e-3,1e-2,3e-2 model.depth=2,1", ARMS),
    }
