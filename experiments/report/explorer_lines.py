"""The kinds of lines that the explorer reads: of studies that train, of formats of states, of decoding."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from experiments.config.schema import check_format
from experiments.report.checks import NUMBER, check_results, require
from experiments.report.explorer_fields import Row, cleaned
from experiments.report.explorer_table import Records
from experiments.runs.folder import RunFolder
from experiments.runs.recorded import RecordedRun, is_finite
from experiments.util.errors import RunnerError
from experiments.util.plot_style import family

OF_LINE = {
    "run": str, "config.experiment": str, "config.seed": int, "config.model.name": str, "config.model.pattern": str,
    "config.task.name": str, "config.train.lr": NUMBER, "record.status": str,
}  # fmt: skip
"""The types of what a line of a study's records holds, by path."""

OF_FINISHED = {
    "results.test": NUMBER, "results.validation": NUMBER,
    "metric.name": str, "metric.label": str, "metric.unit": str, "metric.higher_is_better": bool,
}  # fmt: skip
"""The types of what the record of a finished run there holds."""

OF_STATE = {"run": str, "mixer": str, "seed": int, "task": str, "trained": int, "length": int, "format": str,
            "bytes": int, "recall": list}  # fmt: skip
"""The types of a line of ``seqarch small-states``."""

OF_SPEED = {"model": str, "context": int, "implementation": str, "tokens_per_second": NUMBER}
"""The types of a row of ``seqarch bench decode``."""

DECODING_FORMAT = 1
"""Of the lines of the study of decoding."""

NOT_RUNS = ("models", "prefill")
"""The kinds of lines of the study of decoding that time no decoded token."""


def read_line(line: Any, where: str, records: Records) -> None:
    """Add what one line holds, by its kind.

    Raises:
        RunnerError: it is of no known kind or of another version, or lacks something.
    """
    given = line if isinstance(line, dict) else {}
    readers: dict[str, Callable[[Mapping[str, Any], str, Records], None]] = {
        "config": _add_run, "mixer": _add_state_format, "kind": _add_decoding, "context": _add_speed,
    }  # fmt: skip
    kind = next((key for key in readers if key in given), None)
    if kind is None:
        keys = ", ".join(sorted(given)[:8]) or "nothing"
        raise RunnerError(
            f"{where} is no record of a run: expected the keys format, run, config and record, or those of"
            f" `seqarch small-states`, of `seqarch bench decode` or of the study of decoding; it has {keys}"
        )
    readers[kind](given, where, records)


def _add_run(line: Mapping[str, Any], where: str, records: Records) -> None:
    check_format(line, where)
    otherwise = f"{where} is no record of a run"
    require(dict(line), OF_LINE, otherwise)
    metrics = line.get("metrics", [])
    if not isinstance(metrics, list) or not all(isinstance(each, dict) for each in metrics):
        raise RunnerError(f"{otherwise}, metrics is no list of objects")
    run = RecordedRun(RunFolder(line["run"]), line["config"], line["record"], kept_metrics=metrics)
    if run.recorded_status == "finished":
        require(run.record, OF_FINISHED, otherwise)
        check_results(run.record, otherwise)
    records.add(run, where)


def _add_state_format(line: Mapping[str, Any], where: str, records: Records) -> None:
    """A run that was read with its state in some format: its recall, and the bytes of that state."""
    require(dict(line), OF_STATE, f"{where} is no record of a format of states")
    recall = line["recall"]
    if not recall or not all(isinstance(each, NUMBER) for each in recall):
        raise RunnerError(f"{where} is no record of a format of states, recall is {recall!r}")
    command = f"seqarch small-states {line['run']} --length {line['length']} --format '{line['format']}'"
    row = {"run": line["run"], "study": "small_states", "task": line["task"], "model": line["mixer"],
           "status": "finished", "pattern": line["mixer"], "family": family(line["mixer"]),
           "state_format": line["format"], "metric": "accuracy", "test": sum(recall) / len(recall),
           "state_bytes": line["bytes"], "length": line["length"], "seed": line["seed"],
           "commit": line.get("commit"), "source": where, "command": command,
           "setting": f"{line['mixer']}, {line['task']}, trained at {line['trained']}"}  # fmt: skip
    records.rows.append(cleaned(row))
    records.metrics.setdefault("accuracy", {"name": "accuracy", "label": "Recall accuracy", "higher_is_better": True})


def _add_decoding(line: Mapping[str, Any], where: str, records: Records) -> None:
    """A round of decoding: every model at every context, once."""
    if line.get("format") != DECODING_FORMAT:
        found = line.get("format")
        raise RunnerError(f"{where} is of format {found!r}, and this version reads {DECODING_FORMAT}")
    if line["kind"] in NOT_RUNS:
        return
    require(dict(line), {"condition": str, "number": int, "seconds": dict}, f"{where} is no round of decoding")
    for model, by_context in line["seconds"].items():
        if not isinstance(by_context, dict) or not all(is_finite(each) and each > 0 for each in by_context.values()):
            raise RunnerError(f"{where} is no round of decoding, the seconds of {model} are {by_context!r}")
        others = line.get("others")
        row = {"run": f"{model}, round {line['number']}", "study": "decoding", "task": line["condition"],
               "seed": line["number"], "command": "seqarch study decoding",
               "reason": f"others took {others:.1%} of the machine" if is_finite(others) else None}  # fmt: skip
        for context, seconds in by_context.items():
            if context.isdigit():  # Not a state that was filled.
                records.rows.append(_speed_row(model, int(context), 1 / seconds, where, row))


def _add_speed(line: Mapping[str, Any], where: str, records: Records) -> None:
    require(dict(line), OF_SPEED, f"{where} is no row of `seqarch bench decode`")
    name, sequences = f"{line['model']}, {line['implementation']}", line.get("rows", 1)
    row = {"run": name, "study": "bench decode", "task": f"decoding {sequences} at a time",
           "arm": line["implementation"], "command": "seqarch bench decode"}  # fmt: skip
    records.rows.append(_speed_row(line["model"], line["context"], line["tokens_per_second"], where, row))


def _speed_row(model: str, context: int, speed: float, where: str, row: Row) -> Row:
    setting = ", ".join([row["study"], row["task"], model, row.get("arm", "")])
    return cleaned({"model": model, "family": _family(model), "status": "finished", "length": context,
                    "tokens_per_second": speed, "source": where, "setting": setting, **row})  # fmt: skip


def _family(model: str) -> str:
    """Of a model by its name: ``mamba 130M``, ``attention, 1 key head``; ``attention in 1 of 4`` layers is a hybrid."""
    return "hybrid" if " in 1 of " in model else family(re.split(r"[ ,]", model)[0])
