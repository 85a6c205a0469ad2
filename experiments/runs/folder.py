"""The folder of a run and the files in it.

``config.json``     the resolved configuration, and the format of the folder
``run.json``        the record: status, code, environment, hardware, data, backends, cost, results
``metrics.jsonl``   one JSON object per line, appended while training
``progress.json``   where training is now, for whoever watches
``checkpoints/``    the latest and the best, a folder each
``bad/``            the batches of steps whose loss or gradient was no number or a spike
``train.log``       what the training process printed
``code.diff``       how the code differed from the commit, if it did; of files that git does not track, none
``code-of-plugin-NAME.diff``  the same of the repository of a plug-in
``tokenizer.json``  the tokenizer of text that has one
``data_files.txt``  the files of text: SHA-256, bytes and path of each
``lm_eval.jsonl``   one JSON object for each call of ``seqarch lm-eval`` on the run's model
``claim.json``      the lock: who is at work here; gone when nobody is
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from experiments.config.schema import FORMAT, RunConfig, check_format, flat, run_config, to_dict
from experiments.runs.lock import RunLock
from experiments.util.errors import ConfigError, RunnerError, writing
from experiments.util.files import append_line, half_written, make_folder, read_json, write_atomic, write_json
from experiments.util.owned import remove_half_checkpoints

KINDS: dict[str, type] = {"status": str, "attempt": int, "reason": str}
KINDS |= dict.fromkeys(("results", "metric", "cost", "metrics_lost"), dict)
"""The types of the entries of ``run.json`` on which the runner relies, where they are there."""

DIFF = "code.diff"
PLUGIN_DIFF = re.compile(r"code-of-plugin-\w+\.diff")

ASIDE = re.compile(
    r"\.((config|run|progress|tokenizer)\.json|metrics\.jsonl|code(-of-plugin-\w+)?\.diff|data_files\.txt|claim|step-\d+\.npz)"
    r"\..+\.(tmp|dead)"
)
"""The names of files written aside there, and in ``bad``, before they are renamed."""


class RunFolder:
    """A run's folder by path; nothing is touched before :meth:`create`."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.run_file = self.path / "run.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.progress_file = self.path / "progress.json"
        self.log_file = self.path / "train.log"
        self.lm_eval_file = self.path / "lm_eval.jsonl"
        self.diff_file = self.path / DIFF
        self.checkpoints = self.path / "checkpoints"
        self.bad = self.path / "bad"
        self.lock = RunLock(self.path / "claim.json")

    def config(self) -> RunConfig:
        stored = read_json(self.config_file)
        if stored is None:
            raise RunnerError(f"{self.path} is no run folder: it has no {self.config_file.name}")
        return self._typed(stored)

    def _typed(self, stored: Mapping[str, Any]) -> RunConfig:
        check_format(stored, self.config_file)
        try:
            return run_config({name: value for name, value in stored.items() if name != "format"})
        except ConfigError as error:
            raise ConfigError(f"{self.config_file} is damaged or of another version: {error}") from error

    def diff_files(self) -> list[Path]:
        """Those of the code and, by the record, of plug-ins."""
        plugins = self.record().get("plugins") or {}
        names = [str(entry["diff"]) for entry in plugins.values() if isinstance(entry, Mapping) and entry.get("diff")]
        return [self.diff_file, *(self.path / name for name in names if PLUGIN_DIFF.fullmatch(name))]

    def plugin_diff_file(self, name: str) -> Path:
        """The file for the diff of a plug-in."""
        return self.path / f"code-of-plugin-{name}.diff"

    def check_links(self) -> None:
        """Raise if something that is written here, and not replaced as a whole, would be written elsewhere.

        Raises:
            RunnerError: naming the link.
        """
        for path in (self.checkpoints, self.bad, self.metrics_file, self.log_file, self.lm_eval_file):
            if path.is_symlink():
                raise RunnerError(f"{path} is a link, and nothing is written through one; runs=FOLDER places the runs")

    def check(self, wanted: RunConfig) -> None:
        """Raise unless the folder is new, or holds this very configuration.

        Raises:
            ConfigError: naming the first differing keys, with both values.
            RunnerError: as in :meth:`check_links`.
        """
        self.check_links()
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file, and a run's folder is wanted there")
        stored = read_json(self.config_file)
        if stored is None:
            if self.path.exists() and not all(_is_half_made(entry) for entry in self.path.iterdir()):
                raise ConfigError(f"{self.path} exists, is not empty and has no config.json: it was left untouched")
            return
        there, here = flat(self._typed(stored).identity()), flat(wanted.identity())
        differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        if differing:
            shown = ", ".join(f"{key} is {there.get(key)!r} there, {here.get(key)!r} wanted" for key in differing[:3])
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise ConfigError(f"{self.path} holds another configuration: {shown}{more}. It was left untouched")

    def create(self, config: RunConfig) -> None:
        make_folder(self.path)
        kept = {"format": FORMAT, **to_dict(config)}
        if read_json(self.config_file) != kept:  # New, or differing in what makes no other run of it.
            write_json(self.config_file, kept)
        make_folder(self.checkpoints)

    def half_written(self) -> list[Path]:
        """Files that killed processes left half written beside those of the run."""
        return [path for folder in (self.path, self.bad) for path in half_written(folder, ASIDE)]

    def tidy(self) -> None:
        """Remove it, and checkpoints that are half there. For the process that holds the lock: others write these."""
        with writing(self.path):
            for path in self.half_written():
                path.unlink(missing_ok=True)
            remove_half_checkpoints(self.checkpoints)

    def record(self) -> dict[str, Any]:
        """The content of ``run.json``.

        Raises:
            RunnerError: it cannot be read, or is not what a training process leaves.
        """
        record = read_json(self.run_file) or {}
        if record:
            check_format(record, self.run_file)
        if damage := _damage(record):
            raise RunnerError(
                f"cannot read {self.run_file}: {damage}; delete it, and the run's command resumes from the last"
                " checkpoint"
            )
        return record

    def status(self) -> str | None:
        return self.record().get("status")

    def update(self, **changes: Any) -> None:
        """Set top-level entries of ``run.json``."""
        write_json(self.run_file, {"format": FORMAT, **self.record(), **changes})

    def append_metrics(self, **values: Any) -> None:
        """Add a line, which is on the disk on return: a checkpoint that is written next counts on it."""
        append_line(self.metrics_file, json.dumps(values))

    def append_steps(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add lines of steps of training; they are on the disk once the next line of an evaluation is."""
        append_line(self.metrics_file, "\n".join(map(json.dumps, lines)), durable=False)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; a last line cut short by a crash is passed over.

        Raises:
            RunnerError: another line is damaged, or the file cannot be read.
        """
        return _read_lines(self.metrics_file, "step", int)

    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of evaluations on the validation split; the others are those of ``train.log_every``."""
        return [line for line in self.metrics() if is_evaluation(line)]

    def append_lm_eval(self, line: Mapping[str, Any]) -> None:
        """Add what a call of ``seqarch lm-eval`` found, on the disk on return; earlier lines stay.

        Raises:
            RunnerError: as in :meth:`check_links`.
        """
        self.check_links()
        cut = self.lm_eval_file.exists() and not self.lm_eval_file.read_bytes().endswith(b"\n")
        append_line(self.lm_eval_file, "\n" * cut + json.dumps(line))

    def lm_eval(self) -> list[dict[str, Any]]:
        """The lines of ``lm_eval.jsonl``, the oldest first; read, and errors, as of :meth:`metrics`."""
        return _read_lines(self.lm_eval_file, "tasks", dict)

    def keep_metrics(self, wanted: Callable[[dict[str, Any]], bool]) -> int:
        """Drop the other lines; how many of those that stay are of evaluations."""
        kept = [line for line in self.metrics() if wanted(line)]
        write_atomic(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))
        return sum(map(is_evaluation, kept))

    def leave(self) -> None:
        """The training process ends: nobody is at work here any more, unless another process took over."""
        if self.lock.is_own():
            self.progress_file.unlink(missing_ok=True)
            self.lock.release()


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """Whether a line of metrics is of an evaluation on the validation split."""
    return any(name.startswith("validation_") for name in line)


@contextmanager
def alone_in(parent: Path) -> Iterator[None]:
    """Hold the folder of runs against other processes of this machine that are making a run's folder in it.

    Where the file system has no such lock, or there can be no such folder, nobody is held.
    """
    with ExitStack() as stack:
        with suppress(OSError, RunnerError):
            make_folder(parent)
            held = os.open(parent, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, held)
            fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _damage(record: Mapping[str, Any]) -> str | None:
    """The damage to a record, ``None`` if nothing on which the runner relies is damaged."""
    for key, kind in KINDS.items():
        if key in record and type(record[key]) is not kind:
            return f"its {key} is {record[key]!r}"
    results = record.get("results", {})
    if record.get("status") == "finished" and not isinstance(results.get("test"), (int, float)):
        return "it says that the run is finished and holds no results"
    return None


def _read_lines(path: Path, key: str, kind: type) -> list[dict[str, Any]]:
    """The objects in a file of one a line, each of which has a value of that kind; none where there is no such file.

    A last line cut short by a crash is passed over.

    Raises:
        RunnerError: another line is damaged, or the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunnerError(f"cannot read {path}: {error.strerror or error}") from error
    parsed = [_line(line, key, kind) for line in lines]
    damaged = [number for number, values in enumerate(parsed, 1) if values is None and number < len(lines)]
    if damaged:
        raise RunnerError(f"line {damaged[0]} of {path} is damaged; delete that line")
    return [values for values in parsed if values is not None]


def _line(line: str, key: str, kind: type) -> dict[str, Any] | None:
    """The values of a line, ``None`` where it is damaged."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get(key), kind) else None


def _is_half_made(entry: Path) -> bool:
    """Whether a process that ended within :meth:`RunFolder.create` may have left this before ``config.json``."""
    if entry.name == "checkpoints":
        return entry.is_dir() and not any(entry.iterdir())
    return entry.match(".config.json.*.tmp")
