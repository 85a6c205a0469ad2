"""The verdicts of a study by the project beside those of ``verdicts.py``, which is code of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.studies import records
from experiments.studies.claims import decide
from experiments.studies.trained import Results, Version
from tests.support.verdicts import recompute

NEAR = 0.15
"""An end of an interval that lies so near to the margin, as a share of its width, may fall on either side: the project
draws bootstraps, the other code has a formula."""


def compare(version: Version, folder: Path) -> dict[str, str]:
    """The answers, each of which the other code gives too."""
    found = decide(Results(version, records.read(folder)))
    ours, theirs = {each.claim.name: each for each in found}, recompute(folder)
    assert ours.keys() == theirs.keys()
    for name, decision in ours.items():
        again = theirs[name]
        if again.near > NEAR:
            assert decision.verdict.answer == again.answer, f"{name}: {decision.verdict} and {again}"
        if decision.interval is not None and again.answer != "unresolved":
            width = again.high - again.low
            ends = decision.interval.low, decision.interval.high
            assert ends == pytest.approx((again.low, again.high), abs=max(0.15 * width, 1e-6)), name
    return {name: decision.verdict.answer for name, decision in ours.items()}
