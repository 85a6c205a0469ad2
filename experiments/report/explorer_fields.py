"""What the explorer knows of a run: the columns of its table, and where a record has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.config.schema import without
from experiments.runs.recorded import RecordedRun, is_finite
from experiments.util.plot_style import family


@dataclass(frozen=True)
class Field:
    """A column.

    Attributes:
        label: of an axis or a filter.
        path: in the record, as of :meth:`RecordedRun.get`; empty where it is made otherwise.
        number: whether it can be an axis.
        log: whether the axis is logarithmic unless it is asked not to be.
    """

    label: str
    path: str = ""
    number: bool = False
    log: bool = False


FIELDS = {
    "run": Field("Run"),
    "study": Field("Study or experiment", "config.experiment"),
    "task": Field("Task", "config.task.name"),
    "model": Field("Model", "config.model.name"),
    "arm": Field("Arm of a study", "study.arm"),
    "pattern": Field("Pattern", "config.model.pattern"),
    "family": Field("Family"),
    "state_format": Field("Format of the state"),
    "status": Field("Status"),
    "reason": Field("Reason or note", "reason"),
    "metric": Field("Metric", "metric.name"),
    "test": Field("Metric on test", "results.test", number=True),
    "validation": Field("Metric on validation", "results.validation", number=True),
    "test_loss": Field("Loss on test (nats)", "results.test_loss", number=True),
    "chance": Field("Chance level", "metric.chance", number=True),
    "state_bytes": Field("State (bytes)", "model.state_bytes", number=True, log=True),
    "parameters": Field("Parameters", "model.parameters", number=True, log=True),
    "flops": Field("Training FLOPs", "cost.flops", number=True, log=True),
    "steps": Field("Training steps", "cost.steps", number=True),
    "train_seconds": Field("Training time (s)", "cost.train_seconds", number=True, log=True),
    "tokens_per_second": Field(
        "Tokens per second, trained or decoded", "cost.tokens_per_second", number=True, log=True
    ),
    "length": Field("Context (tokens)", "config.task.length", number=True, log=True),
    "lr": Field("Learning rate", "config.train.lr", number=True, log=True),
    "weight_decay": Field("Weight decay", "config.train.weight_decay", number=True),
    "d_model": Field("Width", "config.model.d_model", number=True, log=True),
    "depth": Field("Layers", "config.model.depth", number=True),
    "seed": Field("Seed", "config.seed", number=True),
    "commit": Field("Commit", "code.commit"),
    "source": Field("Read from"),
    "command": Field("Command"),
}
"""The columns of a run by name, which are those of the exported CSV."""

NUMBERS = tuple(name for name, field in FIELDS.items() if field.number)

Row = dict[str, Any]
"""A run by the names of :data:`FIELDS`, without what is not known, and as ``setting`` what it shares with its seeds."""


def row_of(run: RecordedRun, source: str, command: str) -> Row:
    """A recorded run as a row. What is no finite number is left out, so that nothing of it is drawn."""
    row: Row = {name: run.get(field.path) for name, field in FIELDS.items() if field.path}
    row |= {"run": run.name, "family": family(run.config["model"]["pattern"]), "status": run.recorded_status}
    row |= {"source": source, "command": command, "setting": setting_of(run.config)}
    return cleaned(row)


def cleaned(row: Mapping[str, Any]) -> Row:
    wrong = {name for name in NUMBERS if not is_finite(row.get(name)) or isinstance(row.get(name), bool)}
    return {name: value for name, value in row.items() if value is not None and name not in wrong}


def setting_of(config: Mapping[str, Any]) -> str:
    """All of a configuration but the seed and the learning rate, and what changes no result."""
    kept = without(config, ("seed", "train.lr", "format", "runs", "tracker", "machine", "plugins", "match"))
    return repr(_ordered(kept))


def _ordered(value: Any) -> Any:
    return {key: _ordered(value[key]) for key in sorted(value)} if isinstance(value, Mapping) else value
