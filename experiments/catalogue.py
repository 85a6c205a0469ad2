"""The runs below a folder, found and read anew each time.

There is no index to go stale: 1000 runs are found and read in less than a second (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.errors import RunnerError, choices_hint
from experiments.files import read_json
from experiments.records import RunFolder, flat

NEVER_INSIDE = ("checkpoints", "wandb", "tensorboard", "report", ".sweeps")
"""Folders that hold no runs, and may hold very many files."""


@dataclass(frozen=True)
class Entry:
    """A run as its folder tells it.

    Attributes:
        config, record: what ``config.json`` and ``run.json`` hold, as far as they can be read.
        problem: why one of them cannot; ``None`` where both can.
    """

    folder: RunFolder
    config: dict[str, Any]
    record: dict[str, Any]
    problem: str | None = None

    @property
    def name(self) -> str:
        return self.folder.path.name

    @property
    def status(self) -> str:
        """That of the record; ``killed`` where it says running and nobody is at work."""
        if self.problem is not None:
            return "damaged"
        status = self.record.get("status", "not started")
        return "killed" if status == "running" and not self.folder.claim.is_held() else status

    def get(self, path: str, otherwise: Any = None) -> Any:
        """The value at a dotted path such as ``config.train.lr`` or ``results.test``."""
        value: Any = {"config": self.config, **self.record}
        for key in path.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return otherwise
            value = value[key]
        return value

    def flat(self) -> dict[str, Any]:
        """All that is known, by dotted path."""
        found = {"experiment": self.config.get("experiment"), "run": self.name, "status": self.status}
        inner = {key: value for key, value in self.record.items() if key not in ("experiment", "name", "status")}
        return {**found, "problem": self.problem, **flat(self.config, "config"), **flat(inner)}


def find(root: Path) -> list[Entry]:
    """Every run at any depth below a folder, by path.

    Raises:
        RunnerError: there is no such folder.
    """
    if not root.is_dir():
        raise RunnerError(f"{root} is no folder; give one that holds runs, such as runs or runs/mqar")
    return [_read(path) for path in sorted(_run_folders(root))]


def pick(root: Path, wanted: str) -> Entry:
    """The run of that path, name, or part of its name that no other run has.

    Raises:
        RunnerError: none or several fit.
    """
    if (Path(wanted) / "config.json").exists():
        return _read(Path(wanted))
    paths = sorted(_run_folders(root)) if root.is_dir() else []
    exact = [path for path in paths if path.name == wanted]
    fitting = exact or [path for path in paths if wanted in path.name]
    if not fitting:
        hint = choices_hint(wanted, [path.name for path in paths]) if paths else "there are none"
        raise RunnerError(f"no run below {root} is called {wanted!r}: {hint}")
    if len(fitting) > 1:
        shown = "".join(f"\n    {path}" for path in fitting[:10])
        raise RunnerError(f"{len(fitting)} runs below {root} are called {wanted!r}; give more of the name:{shown}")
    return _read(fitting[0])


def _run_folders(folder: Path) -> Iterator[Path]:
    if (folder / "config.json").is_file():
        yield folder
        return
    for inner in folder.iterdir():
        if inner.name not in NEVER_INSIDE and inner.is_dir() and not inner.is_symlink():
            yield from _run_folders(inner)


def _read(path: Path) -> Entry:
    folder, config, record = RunFolder(path), {}, {}
    try:
        config = read_json(folder.config_file) or {}
        record = read_json(folder.run_file) or {}
        folder.record()
    except RunnerError as error:
        return Entry(folder, config, record, str(error))
    return Entry(folder, config, record)
