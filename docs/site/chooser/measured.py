"""What the studies have measured of mixers, as the chooser shows it: from the committed records alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.report.statistics import mean_interval
from experiments.runs.recorded import RecordedRun
from experiments.studies import STUDIES, records
from experiments.studies.page import PAGES
from experiments.studies.trained_study import TrainedStudy
from experiments.util.errors import RunnerError
from seqarch.layers import mixer_class

REPORTING = "reporting"
"""The stage whose runs a study's page reports: of tuned learning rates, with seeds of their own."""


def measured(results: Path) -> dict[str, Any]:
    """The arms of every study that trains models and has records, and what is wrong with records that cannot be read.

    Args:
        results: the folder that has one of each study.
    """
    arms: list[dict[str, Any]] = []
    problems: list[str] = []
    for name, study in STUDIES.items():
        if not isinstance(study, TrainedStudy) or not (results / name / records.FILE).exists():
            continue
        try:
            runs = [run for run in records.read(results / name) if isinstance(run.record.get("study"), dict)]
            arms += [{"study": study.title, "page": PAGES[name].stem, **arm} for arm in _arms(runs)]
        except (RunnerError, ValueError, KeyError, TypeError, AttributeError) as error:
            said = " ".join(str(error).replace(f"{results}/", "").split())
            problems.append(f"The records of “{study.title}” cannot be read, so nothing of it is shown: {said}")
    return {"arms": arms, "problems": problems}


def _arms(runs: Sequence[RecordedRun]) -> Iterator[dict[str, Any]]:
    """Each arm with two seeds or more: its mean result, the 95 % interval, and how its models were made."""
    by_arm: dict[str, list[RecordedRun]] = {}
    for run in runs:
        if run.record["study"]["stage"] == REPORTING and run.record["status"] == "finished":
            by_arm.setdefault(run.record["study"]["arm"], []).append(run)
    for arm, own in by_arm.items():
        if len(own) < 2:
            continue
        config, record = own[0].config, own[0].record
        found = mean_interval(np.array([[run.record["results"]["test"]] for run in own]))
        yield {
            "arm": arm,
            "pattern": config["model"]["pattern"],
            "task": record["task"]["title"],
            "metric": record["metric"]["label"],
            "mean": found.estimate,
            "low": found.low,
            "high": found.high,
            "seeds": sorted(run.config["seed"] for run in own),
            "chance": record["metric"]["chance"],
            "width": config["model"]["d_model"],
            "layers": config["model"]["depth"],
            "length": config["task"].get("length"),
            "state_bytes": record["model"]["state_bytes"],
            "state_length": record["model"]["state_length"],
            "parameters": record["model"]["parameters"],
            "embedding_std": config["model"].get("embedding_std", 0.02),
            "slow_gates": _slow(config["model"]),
        }


def _slow(model: dict[str, Any]) -> bool:
    """Whether gates begin by options of their own, and not as released."""
    given = model.get("mixers", {}).get(model["pattern"], {})
    slow = mixer_class(model["pattern"]).Config.slow_gates if model["pattern"].isidentifier() else {}
    return bool(slow) and all(given.get(name) == value for name, value in slow.items())
