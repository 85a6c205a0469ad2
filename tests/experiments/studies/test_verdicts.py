"""Every verdict of the committed records, and of made-up ones, computed a second time by code of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.studies import STUDIES, plan, records
from experiments.studies.claims import decide
from experiments.studies.page import RESULTS
from experiments.studies.protocol import Arm, Protocol
from experiments.studies.trained import Claim, Learnt, Results, Version
from experiments.studies.trained_study import TrainedStudy
from experiments.studies.trained_tables import not_learnt_text, training
from experiments.util.items import encode_items
from tests.support.compare_verdicts import compare
from tests.support.paths import ROOT

HOME = ROOT / RESULTS
RECORDED = [name for name, study in STUDIES.items()
            if isinstance(study, TrainedStudy) and (HOME / name / records.FILE).exists()]  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_the_verdicts_of_committed_records(name):
    compare(STUDIES[name].versions["recorded"], HOME / name)


LEVELS = {
    "stuck": (0.9, 0.9),
    "soon": (0.9, 0.9),
    "good": (0.9, 0.9),
    "same": (0.905, 0.905),
    "poor": (0.6, 0.6),
    "late": (0.7, 0.8),
    "doubtful": (0.7, 0.7),
    "noisy": (0.68, 0.68),
}
"""The accuracy of made-up arms in reporting, and at twice the budget."""
VERSION = Version(
    "experiment=mqar",
    tuple(Arm(name, "model=attention") for name in (*LEVELS, "edge", "unfinished")),
    Protocol(rates=(-5, -4, -3), most_rates=3, tuning_seeds=(100, 101), reporting_seeds=(0, 1, 2, 3, 4), gain=0.05),
    (
        Claim("far", "", (("good", "poor"),), "more", 0.05),
        Claim("not far", "", (("same", "good"),), "more", 0.05),
        Claim("alike", "", (("same", "good"),), "equal", 0.05),
        Claim("not alike", "", (("good", "poor"),), "equal", 0.05),
        Claim("who knows", "", (("noisy", "poor"),), "more", 0.05),
        Claim("of two", "", (("good", "poor"), ("same", "poor")), "more", 0.05),
        Claim("not converged", "", (("good", "late"),), "more", 0.05),
        Claim("at the edge", "", (("good", "edge"),), "more", 0.05),
        Claim("not there yet", "", (("good", "unfinished"),), "more", 0.05),
        Claim("sooner", "", (("poor", "good"),), "more", 1.0, threshold=0.5),
        Claim("no sooner", "", (("same", "good"),), "more", 1.0, threshold=0.5),
        Claim("never there", "", (("good", "poor"),), "more", 1.0, threshold=0.8),
        Claim("given up early", "", (("stuck", "good"),), "more", 9.0, threshold=0.5),
        Claim("and late", "", (("stuck", "good"),), "more", 1.0, threshold=0.5),
        Claim("between two evaluations", "", (("soon", "good"),), "more", 0.5, threshold=0.5),
    ),
)
ANSWERS = [
    "yes",
    "no",
    "yes",
    "no",
    "unresolved",
    "yes",
    *["unresolved"] * 3,
    "yes",
    "no",
    "unresolved",
    "unresolved",
    "yes",
    "unresolved",
]


LEARNT = replace(
    VERSION,
    claims=(
        Claim("against one that did not", "", (("good", "poor"),), "more", 0.05),
        Claim("by one that did not", "", (("poor", "good"),), "more", -0.5),
        Claim("not by one that did not", "", (("poor", "good"),), "more", 0.05),
        Claim("not even against one that did not", "", (("good", "poor"),), "more", 0.5),
        Claim("equal to one that did not", "", (("good", "poor"),), "equal", 0.5),
        Claim("unequal to one that did not", "", (("good", "poor"),), "equal", 0.05),
        Claim("both did", "", (("same", "good"),), "equal", 0.05),
        Claim("one of two did not", "", (("good", "poor"), ("same", "good")), "more", 0.05),
        Claim("in steps", "", (("poor", "good"),), "more", 1.0, threshold=0.5),
        Claim("in shares", "", (("good", "stuck"),), "more", -0.3),
        Claim("by shares", "", (("good", "doubtful"),), "more", 0.25),
        Claim("by whole sequences", "", (("good", "doubtful"),), "more", 0.25, whole=True),
    ),
    learnt=Learnt("test", 0.65),
)
"""``poor`` did not learn; ``doubtful`` did, and has .7 of the answers right but few sequences throughout."""
LEARNT_ANSWERS = ["unresolved", "yes", "unresolved", "no", *["unresolved"] * 2, "yes", "unresolved", *["yes"] * 2, "no",
                  "yes"]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return written(VERSION, tmp_path)


def written(version: Version, folder: Path) -> Path:
    """Records of arms whose accuracies are known, 200 test sequences of 8 answers each."""
    draws, lines = np.random.default_rng(0), []

    def add(arm: str, stage: str, rate: float, seed: int, level: float, spread: float = 0.01) -> None:
        level = float(np.clip(level + spread * draws.standard_normal(), 0, 1))
        items = draws.binomial(8, level, 200) / 8
        pace = {"poor": 1200, "stuck": 9999, "soon": 300}.get(arm, 200)
        metrics = [
            {"step": step, "validation_accuracy": level if step >= pace else 0.1} for step in range(50, 1501, 50)
        ]
        config = {"experiment": "x", "seed": seed, "model": {"pattern": "attention"}, "train": {"lr": rate}}
        results = {"test": float(items.mean()), "validation": level, "items": encode_items(items)}
        metric = {"name": "accuracy", "unit": "", "higher_is_better": True}
        study = {"arm": arm, "stage": stage, "plan": version.plan}
        record = {"status": "finished", "study": study, "results": results, "metric": metric}
        record |= {
            "model": {"parameters": 1000, "state_bytes": 2**13},
            "cost": {"steps": 500, "processor_seconds": 9.0},
        }
        line = {"format": 2, "run": "run", "config": config, "record": record}
        lines.append(json.dumps({**line, "metrics": metrics}))

    for arm in version.arms:
        level, doubled = LEVELS.get(arm.name, (0.7, 0.7))
        best = 0.03 if arm.name == "edge" else 0.01
        for rate in (0.003, 0.01, 0.03):
            for seed in (100, 101):
                add(arm.name, "tuning", rate, seed, level - (rate != best) * 0.3, 0.001)
        for seed in range(2 if arm.name == "unfinished" else 5):
            add(arm.name, "reporting", best, seed, level, 0.12 if arm.name == "noisy" else 0.01)
        add(arm.name, "doubled", best, 0, doubled)
        for seed in range(1, 5):  # Which seed is in the middle is drawn, too.
            add(arm.name, "doubled", best, seed, doubled)
    (folder / records.FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    plan.settle(version, folder, recorded=False)
    return folder


def test_the_verdicts_of_made_up_records(folder):
    assert list(compare(VERSION, folder).values()) == ANSWERS


def test_runs_that_did_not_learn_decide_nothing_in_favour_of_others(tmp_path):
    """By scores, whichever side they are on; and a claim may count whole sequences."""
    folder = written(LEARNT, tmp_path)
    assert list(compare(LEARNT, folder).values()) == LEARNT_ANSWERS
    results = Results(LEARNT, records.read(folder))
    assert decide(results)[0].verdict.reason == "5 of 5 seeds of poor did not learn"
    assert "poor (5 of 5), noisy (2 of 5)." in not_learnt_text(results)
    assert [row[-1] for row in training(results).rows][:3] == ["did not learn", "0 of 5", "0 of 5"]


def test_a_plan_without_an_entry_test_has_no_word_of_one():
    """So that plans that are older keep their hashes."""
    assert "learnt" not in VERSION.fixed
    assert "whole" not in VERSION.fixed["claims"]["far"]
    assert LEARNT.fixed["learnt"] == {"split": "test", "least": 0.65}
    assert LEARNT.fixed["claims"]["by whole sequences"]["whole"] is True
