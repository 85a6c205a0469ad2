"""The questions of docs/results: a file each, and what they share. ``python -m experiments.study NAME`` answers one."""

from __future__ import annotations

from experiments.studies.efficiency import Efficiency
from experiments.studies.experts import Experts
from experiments.studies.hybrids import Hybrids
from experiments.studies.learning_rate import LearningRate
from experiments.studies.length import Length
from experiments.studies.recall_and_state import RecallAndState
from experiments.studies.selective_copying import SelectiveCopying
from experiments.studies.state_tracking import StateTracking
from experiments.studies.study import Study

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        StateTracking(),
        SelectiveCopying(),
        RecallAndState(),
        Hybrids(),
        LearningRate(),
        Length(),
        Efficiency(),
        Experts(),
    )
}
"""The studies by name; each comes after those whose records it uses."""
