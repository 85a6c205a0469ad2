"""The questions of docs/results: a file each, and what they share. ``seqarch study NAME`` answers one."""

from __future__ import annotations

from typing import Any

from experiments.studies.conversion import Conversion
from experiments.studies.decoding import Decoding
from experiments.studies.hybrid_ratio import HybridRatio
from experiments.studies.initialisation import Initialisation
from experiments.studies.mup import Mup
from experiments.studies.needle import Needle
from experiments.studies.recall_state import RecallState
from experiments.studies.scaling import Scaling
from experiments.studies.state_tracking import StateTracking
from experiments.studies.study import Study
from experiments.studies.text_length import TextLength

STUDIES: dict[str, Study[Any, Any]] = {
    study.name: study
    for study in (
        *(Initialisation(), StateTracking(), RecallState(), Needle(), HybridRatio(), TextLength()),
        *(Scaling(), Decoding(), Mup(), Conversion()),
    )
}
"""The studies by name."""
