"""A little attention goes a long way: layers of attention among recurrent ones, on recall and on text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from experiments.studies.study import Study
from experiments.studies.sweep import Sweep

PURE = "model=attention,delta_net"
OTHER = (
    "model=gla",
    "model=hybrid model.name=1_to_3_gla 'model.pattern=\"2*gla attention gla\"'",
)


def mixed(name: str, pattern: str) -> str:
    """An arm of one hybrid."""
    return f"model=hybrid model.name={name} 'model.pattern=\"{pattern}\"'"


RATIOS = (
    mixed("1_to_1", "delta_net attention"),
    mixed("1_to_3", "2*delta_net attention delta_net"),
)
PLACES = (
    mixed("1_to_3_first", "attention 3*delta_net"),
    mixed("1_to_3_last", "3*delta_net attention"),
)
RECALL, TEXT = ("experiment=hybrids_recall", "experiment=hybrids_text")
RATES = {RECALL: "train.lr=4e-3,1e-2", TEXT: "train.lr=3e-3,1e-2"}


class Hybrids(Study):
    name = "hybrids"
    title = "A little attention goes a long way"
    sweeps: ClassVar[Mapping[str, Sweep]] = {
        "recorded": Sweep(
            "seed=0,1,2",
            tuple(f"{RECALL} {RATES[RECALL]} {arm}" for arm in (PURE, *RATIOS, *PLACES, *OTHER))
            + tuple(f"{TEXT} {RATES[TEXT]} {arm}" for arm in (PURE, *RATIOS)),
        ),
    }
