"""Recorded runs, read from their folders alone, and grouped into what a report compares."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.config import NOT_IDENTITY, without
from experiments.errors import RunnerError
from experiments.files import read_json
from experiments.records import RunFolder, flat
from experiments.style import colours, family

TUNED = ("train.lr", "train.weight_decay")
"""What a comparison may choose for each model, by the median validation metric over seeds."""

NUMBER = (int, float)
OF_CONFIG = {
    "experiment": str, "seed": int, "model.name": str, "model.pattern": str, "task": dict, "train.lr": NUMBER,
    "train.weight_decay": NUMBER,
}  # fmt: skip
"""By path, what the configuration of every run holds."""

OF_RECORD = {
    "results.test": NUMBER, "results.validation": NUMBER,
    "cost.flops": NUMBER, "cost.tokens_per_second": NUMBER, "cost.steps": NUMBER, "cost.flops_formula": str,
    "model.parameters": NUMBER, "model.state_bytes": NUMBER, "model.state_length": NUMBER,
    "metric.name": str, "metric.label": str, "metric.unit": str, "metric.higher_is_better": bool,
    "metric.chance": NUMBER, "metric.chance_label": str,
    "task.title": str, "task.reading": str, "data.hash": str, "command": str,
    "hardware.cpu": str, "hardware.cores": NUMBER, "hardware.threads": NUMBER,
    "environment.python": str, "environment.packages.torch": str, "code.commit": (str, type(None)), "code.dirty": bool,
}  # fmt: skip
"""By path, what the record of every finished run holds."""

PARTS = ("results", "cost", "model", "metric", "data", "code")
"""Mappings of a record that is not finished, where they are there."""


@dataclass
class RecordedRun:
    """One folder: its configuration, record and metrics, as plain dictionaries."""

    path: Path
    config: dict[str, Any]
    record: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def status(self) -> str:
        return self.record.get("status", "not started")

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    def result(self, name: str) -> float:
        return self.record["results"][name]


@dataclass
class Variant:
    """One model of a comparison: the runs that differ in nothing but the seed.

    Attributes:
        colour: that of the family, or of the mixer's own where it has none; the same throughout a report.
        grid: what was chosen among, ``{"train.lr": [0.001, 0.003]}``.
    """

    label: str
    pattern: str
    colour: str
    runs: list[RecordedRun]
    grid: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return family(self.pattern)

    @property
    def finished(self) -> list[RecordedRun]:
        return [run for run in self.runs if run.finished]

    def values(self, get: Callable[[RecordedRun], float]) -> list[float]:
        return [get(run) for run in self.finished]

    def median(self, get: Callable[[RecordedRun], float]) -> float:
        return statistics.median(self.values(get))


@dataclass
class Comparison:
    """The runs of one experiment.

    Attributes:
        seeds: those that any of its runs has.
        remarks: what is missing or failed, a sentence each.
    """

    name: str
    variants: list[Variant]
    seeds: list[int]
    remarks: list[str]

    @property
    def shown(self) -> list[Variant]:
        return [variant for variant in self.variants if variant.finished]

    @property
    def sample(self) -> dict[str, Any]:
        """The record of some finished run, for what all have in common."""
        return self.shown[0].finished[0].record


def read_runs(root: Path) -> tuple[list[RecordedRun], list[str]]:
    """Every run below a folder, and a sentence on each folder that could not be read."""
    runs, problems = [], []
    for config_file in sorted(root.rglob("config.json")):
        folder = RunFolder(config_file.parent)
        try:
            config = read_json(config_file) or {}
            _require(config, OF_CONFIG, f"{folder.path}: its config.json is not that of a run")
            run = RecordedRun(folder.path, config, folder.record(), folder.metrics())
            wanted = OF_RECORD if run.finished else {part: dict for part in PARTS if part in run.record}
            _require(run.record, wanted, f"{folder.path}: its record is damaged")
            runs.append(run)
        except RunnerError as error:
            problems.append(str(error))
    return runs, problems


def _require(value: dict[str, Any], kinds: Mapping[str, Any], otherwise: str) -> None:
    """Raise an error that begins with ``otherwise`` unless each path leads to a value of its kind."""
    for path, kind in kinds.items():
        found: Any = value
        for key in path.split("."):
            if not isinstance(found, dict) or key not in found:
                raise RunnerError(f"{otherwise}, it lacks {path}")
            found = found[key]
        if not isinstance(found, kind):
            raise RunnerError(f"{otherwise}, {path} is {found!r}")


def compare(runs: list[RecordedRun]) -> list[Comparison]:
    """One comparison an experiment, the best model first."""
    names = sorted({run.config["experiment"] for run in runs})
    colour_of = colours(run.config["model"]["pattern"] for run in runs)
    return [_comparison(name, [run for run in runs if run.config["experiment"] == name], colour_of) for name in names]


def _comparison(name: str, runs: list[RecordedRun], colour_of: dict[str, str]) -> Comparison:
    variants = _choose(_variants(runs, colour_of))
    higher = next((run.record["metric"]["higher_is_better"] for run in runs if run.finished), True)
    variants.sort(key=lambda variant: _goodness(variant, "test", higher), reverse=True)
    seeds = sorted({run.config["seed"] for run in runs})
    remarks = []
    for variant in variants:
        for seed in seeds:
            run = next((run for run in variant.runs if run.config["seed"] == seed), None)
            if run is None:
                remarks.append(f"{variant.label}, seed {seed}: missing")
            elif not run.finished:
                reason = run.record.get("reason")
                remarks.append(f"{variant.label}, seed {seed}: {run.status}" + (f", {reason}" if reason else ""))
    return Comparison(name, variants, seeds, remarks)


def _variants(runs: list[RecordedRun], colour_of: dict[str, str]) -> list[Variant]:
    """Runs that share all but the seed, labelled by the model's name and whatever else tells them apart."""
    groups: dict[str, list[RecordedRun]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for run in runs:
        kept = flat(without(run.config, ("seed", *NOT_IDENTITY)))
        groups.setdefault(repr(sorted(kept.items())), []).append(run)
        settings[repr(sorted(kept.items()))] = kept
    variants = []
    for key, members in groups.items():
        model = members[0].config["model"]
        rivals = [other for other in settings.values() if other["model.name"] == model["name"]]
        own = settings[key]
        differing = {name for rival in rivals for name in {**rival, **own} if rival.get(name) != own.get(name)}
        told = [f"{name.rpartition('.')[2]}={own.get(name)}" for name in sorted(differing) if name not in TUNED]
        label = model["name"] + (f" ({', '.join(told)})" if told else "")
        ordered = sorted(members, key=lambda run: run.config["seed"])
        variants.append(Variant(label, model["pattern"], colour_of[model["pattern"]], ordered))
    return variants


def _choose(variants: list[Variant]) -> list[Variant]:
    """Of the variants that differ in tuned settings alone, the best on validation."""
    chosen = []
    for label in dict.fromkeys(variant.label for variant in variants):
        rivals = [variant for variant in variants if variant.label == label]
        finished = next((run for variant in rivals for run in variant.finished), None)
        higher = finished is None or finished.record["metric"]["higher_is_better"]
        best = max(rivals, key=lambda variant: _goodness(variant, "validation", higher))
        for name in TUNED:
            tried = sorted({flat(variant.runs[0].config)[name] for variant in rivals})
            best.grid[name] = tried
        chosen.append(best)
    return chosen


def _goodness(variant: Variant, name: str, higher: bool) -> tuple[float, int]:
    """The median over seeds, larger is better; where that is equal, the number of finished seeds.

    A failed seed counts as the worst: a setting that diverges on most seeds must not win by the one on which it does
    not.
    """
    worst, sign = float("-inf"), 1 if higher else -1
    failed = [worst for run in variant.runs if run.status == "failed"]
    finished = [sign * run.result(name) for run in variant.finished]
    return statistics.median([*failed, *finished] or [worst]), len(finished)
