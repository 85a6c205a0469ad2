"""Made-up records of a study: every arm tuned, reported and checked, with accuracies that a test names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.studies import plan, records
from experiments.studies.protocol import Arm, rate_of
from experiments.studies.trained import Version
from experiments.util.items import encode_items

Level = Callable[[Arm, str], float]
"""The accuracy of an arm on a test split."""

METRIC = {"name": "accuracy", "label": "Accuracy", "unit": "", "higher_is_better": True, "chance": 0.1,
          "chance_label": "at random"}  # fmt: skip
HARD = (np.arange(48) + 0.5) / 48
EDGES = [place / 10 for place in range(11)]


def write_records(
    version: Version,
    folder: Path,
    level: Level,
    splits: Mapping[str, int],
    model: Callable[[Arm], dict[str, Any]],
    lacking: str = "",
    whole: bool = False,
) -> None:
    """Write the plan and the records of a version.

    Args:
        splits: the tests of reporting runs by name, each with its length.
        model: what a record keeps of the model's options.
        lacking: an arm of which three reporting seeds are missing.
        whole: every sequence is right throughout or wrong, and the hardest are so for all; else shares of 64 answers.
    """
    draws, protocol = np.random.default_rng(0), version.protocol
    lines = []
    for arm in version.arms:
        for run in _runs(version, arm.name == lacking):
            bad = run["stage"] == "tuning" and run["rate"] != rate_of(protocol.rates[1])
            tested = splits if run["stage"] == "reporting" else {"test": splits["test"]}
            results = _results(arm, level, tested, draws, whole)
            results["validation"] -= 0.3 * bad
            lines.append(_line(version, arm, run, results, model(arm)))
    (folder / records.FILE).write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    plan.settle(version, folder, recorded=False)


def _runs(version: Version, lacks: bool) -> Iterator[dict[str, Any]]:
    """Every run that the protocol would have wanted, and doubled ones of every seed, since any may be the worst."""
    protocol = version.protocol
    best = rate_of(protocol.rates[1])
    for rate in map(rate_of, protocol.rates):
        yield from ({"stage": "tuning", "rate": rate, "seed": seed} for seed in protocol.tuning_seeds)
    seeds = protocol.reporting_seeds[:-3] if lacks else protocol.reporting_seeds
    for stage in ("reporting", "doubled"):
        yield from ({"stage": stage, "rate": best, "seed": seed} for seed in seeds)


def _results(
    arm: Arm, level: Level, splits: Mapping[str, int], draws: np.random.Generator, whole: bool
) -> dict[str, Any]:
    """Seeds that differ by more than the chance of single answers, but on validation, which says who has converged."""
    tests = {}
    shift = 0.012 * draws.standard_normal()
    for name, length in splits.items():
        right = float(np.clip(level(arm, name) + shift, 0, 1))
        items = (right > HARD) * 1.0 if whole else draws.binomial(64, right, 48) / 64
        by = {"depth": {"edges": EDGES, "x": EDGES[:-1], "value": [right] * 9 + [None], "count": [4] * 9 + [0]}}
        tests[name] = {"length": length, "accuracy": float(items.mean()), "items": encode_items(items), "by": by}
    validation = float(np.clip(level(arm, "test") + 0.1 * shift, 0, 1))
    found = {"test": tests["test"]["accuracy"], "validation": validation,
             "stable_phase": {"ending": "plateau", "steps": 400}}  # fmt: skip
    if len(tests) == 1:
        return {**found, "items": tests["test"]["items"]}
    return {**found, "tests": tests, "curve": {"trained_to": splits["test"]}}


def _line(
    version: Version, arm: Arm, run: Mapping[str, Any], results: dict[str, Any], model: dict[str, Any]
) -> dict[str, Any]:
    named = {"arm": arm.name, "stage": run["stage"], "plan": version.plan}
    task = {"name": "mqar", "vocab_size": 64, "length": 64, "pairs": 8}
    train = {"lr": run["rate"], "steps": 500, "batch_size": 8}
    return {
        "format": 2,
        "run": "run",
        "config": {"experiment": "x", "seed": run["seed"], "model": model, "task": task, "train": train},
        "record": {
            "status": "finished",
            "study": named,
            "results": results,
            "metric": METRIC,
            "model": {"parameters": 1000, "state_bytes": 2**13},
            "cost": {"steps": 500, "processor_seconds": 9.0},
            "code": {"commit": "0" * 40, "dirty": False},
            "hardware": {"cpu": "a processor", "cores": 2, "threads": 1},
            "environment": {"python": "3", "torch": "2"},
        },
        "metrics": [{"step": 50, "validation_accuracy": results["validation"]}],
    }
