"""A study that trains models: the arms of its versions through the protocol, its claims by intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from experiments.studies import plan, records, trained_tables
from experiments.studies.study import Study, Table
from experiments.studies.sweep import train
from experiments.studies.trained import Results, Version


class TrainedStudy(Study[Version, Results]):
    """What studies that train have in common; each has an answer, figures and tables of its own.

    Attributes:
        history: metrics to keep of every evaluation on validation, as in :func:`experiments.studies.records.to_line`.
    """

    does = "trains"
    versions: ClassVar[Mapping[str, Version]]
    history: ClassVar[tuple[str, ...]] = ()

    def complete(self, version: Version, folder: Path, runs: Path, jobs: int) -> int:
        return train(version, folder, runs, jobs, self.history)

    def read(self, version: Version, folder: Path) -> Results:
        return Results(version, records.read(folder))

    def plans(self, results: Results) -> set[str]:
        return {run.record["study"]["plan"] for run in results.runs}

    def unfinished(self, results: Results) -> Sequence[str]:
        return trained_tables.unfinished(results)

    def verdicts(self, results: Results) -> Table:
        return trained_tables.verdicts(results)

    def made(self, results: Results) -> Sequence[Table | str]:
        return [trained_tables.training(results), trained_tables.failures(results.runs)]

    def provenance(self, results: Results) -> Sequence[str]:
        runs, name = results.runs, self.name
        seconds = sum(run.record["cost"]["processor_seconds"] for run in runs if "cost" in run.record)
        stages = Counter(run.record["study"]["stage"] for run in runs)
        counted = ", ".join(f"{number} for {stage}" for stage, number in stages.items())
        recorded = (
            f"Recorded, a line per run: [{records.FILE}]({name}/{records.FILE}); {len(runs)} runs ({counted}),"
            f" {seconds / 3600:.1f} hours of processor time in training steps. Margins and grids were committed before,"
            f" in [{plan.FILE}]({name}/{plan.FILE}), whose hash every line has."
        )
        return [recorded, "\n".join(trained_tables.machines(runs))]
