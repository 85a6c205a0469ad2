"""What compressors and n-grams reach on the test files of a study of text, kept beside its records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from experiments.config.data import build_data
from experiments.studies.protocol import Wanted
from experiments.studies.records import rounded
from experiments.studies.sweep import Composer
from experiments.studies.trained import Results, Version
from experiments.sweeps.execute import resolve_composed
from experiments.tasks import TaskError
from experiments.tasks.byte_text import ByteText, position_bins
from experiments.tasks.text_baselines import text_baselines
from experiments.util.errors import RunnerError
from experiments.util.files import read_json, write_atomic

FILE = "programs.json"


@dataclass(frozen=True)
class Program:
    """A compressor, or n-grams.

    Attributes:
        name, label: its key, and its name for people.
        length: bytes of each file.
        bits: of each file, the bits per byte in each bin of ``position_bins(length)``.
    """

    name: str
    label: str
    length: int
    bits: tuple[tuple[float, ...], ...]

    @property
    def per_file(self) -> np.ndarray:
        """``[files]`` bits per byte."""
        return np.average(np.array(self.bits), axis=1, weights=np.diff(position_bins(self.length)))

    @property
    def along(self) -> list[float]:
        """The mean over the files in each bin."""
        return np.mean(self.bits, axis=0).tolist()


@dataclass(frozen=True)
class TextResults(Results):
    """Recorded runs and the programs that read the same files; none where they were not measured yet."""

    programs: tuple[Program, ...] = ()


def between(along: Sequence[float], length: int, left: int, right: int) -> float:
    """The mean between two bytes of a file, both edges of its bins, of what each bin has on average."""
    bins = [*zip(pairwise(position_bins(length)), along, strict=True)]
    inside = [(high - low, value) for (low, high), value in bins if left <= low < right]
    return sum(width * value for width, value in inside) / sum(width for width, _ in inside)


def measure(version: Version, folder: Path) -> None:
    """Run every program on the test files of a version, its n-grams counted in as many bytes as a run reads, and keep
    what it takes in ``folder``; nothing where that is there.

    Raises:
        RunnerError: the corpus is not there, or a program could not be run.
    """
    if (folder / FILE).exists():
        return
    composed = Composer(version, folder)(Wanted(version.arms[0].name, "reporting", 1e-3, 0))
    config = resolve_composed(composed)
    try:
        task = build_data(config).task
        if not isinstance(task, ByteText):
            raise RunnerError(f"compressors read bytes, and the task {task.name} gives none")
        read = config.train.steps * config.train.batch_size * task.length
        found, length = text_baselines(task, train_bytes=read), task.longest
        content = {"data": task.manifest()["hash"], "programs": []}
    except TaskError as error:
        raise RunnerError(str(error)) from error
    edges = position_bins(length)
    for each in found:
        bits = [[float(row[low:high].mean()) for low, high in pairwise(edges)] for row in each.bits]
        content["programs"].append(asdict(Program(each.name, each.label, length, tuple(map(tuple, bits)))))
    write_atomic(folder / FILE, json.dumps(rounded(content), separators=(",", ":")) + "\n")


def read_results(version: Version, folder: Path, runs: Results) -> TextResults:
    """The runs of a version with the programs that its folder has.

    Raises:
        RunnerError: the programs read other files than the runs.
    """
    kept = read_json(folder / FILE)
    if kept is None:
        return TextResults(version, runs.runs)
    here = {run.record["data"]["hash"] for run in runs.runs if "data" in run.record}
    if others := here - {kept["data"]}:
        raise RunnerError(
            f"{folder / FILE} is of the data {kept['data'][:16]}, and there are runs of {min(others)[:16]}: the corpus"
            " was another one. Remove the file and run the study again with the corpus of the runs"
        )
    programs = tuple(Program(**{**each, "bits": tuple(map(tuple, each["bits"]))}) for each in kept["programs"])
    return TextResults(version, runs.runs, programs=programs)
