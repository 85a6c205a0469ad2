"""Loading a folder of a gigabyte beside reading its bytes: ``experiments.bench loading``.

In turn, in a process of its own that keeps freed memory: each tensor's bytes read into memory of its size, the folder
loaded, and that of a narrow model of as many layers, whose time is that of making modules. The bytes are in the
system's cache of files.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.bench.devices import Cpu
from experiments.bench.record import prepare_folder, provenance, text_table
from experiments.util.files import write_atomic
from experiments.util.paths import ROOT
from seqarch import LanguageModel
from seqarch.checkpoints.building import build

ROUNDS = 3, 25
"""At least and at most."""

NARROW = {"d_model": 128, "vocab_size": 64}
WARM = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
"""Freed memory stays with the process: what new memory costs differs by ten times from call to call."""


@dataclass(frozen=True)
class Folder:
    """A model that is saved: its options, its dtype and the family in whose form, or seqarch's own."""

    options: Mapping[str, Any]
    dtype: torch.dtype
    family: str | None

    def save(self, path: Path, **others: Any) -> None:
        """A model of zeros, with other options than these where they are given."""
        options = {**self.options, **others}
        model = build(options, (), path).to(self.dtype).to_empty(device="cpu")
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.zero_()
        model.save_pretrained(path, family=self.family)


ATTENTION = {"pattern": "attention/swiglu", "depth": 24, "vocab_size": 32000, "d_model": 1280}
HYBRID = {"pattern": "mamba2 attention/swiglu", "depth": 16, "vocab_size": 32000, "d_model": 1024}
MAMBA2 = {"pattern": "mamba2", "channel": "none", "depth": 72, "vocab_size": 32000, "d_model": 1024}
MIXTRAL = {
    **{"pattern": "attention/moe", "depth": 8, "vocab_size": 16000, "d_model": 1024},
    "channels": {"moe": {"num_experts": 8, "hidden": 2304}},
}
FOLDERS = {
    "own": Folder(HYBRID, torch.float32, None),
    "llama": Folder(ATTENTION, torch.bfloat16, "llama"),
    "mamba2": Folder(MAMBA2, torch.bfloat16, "mamba2"),
    "mixtral": Folder(MIXTRAL, torch.bfloat16, "mixtral"),
}
"""By the names that ``--only`` asks for: parts as they are, parts put together, many small ones, experts transposed."""

HEADER = ("folder", "MB", "peak", "read ms", "load ms", "times", "narrow ms", "cpu times", "cpu times less narrow")


@dataclass(frozen=True)
class Loading:
    """One folder.

    Attributes:
        peak: of memory while it is loaded for the first time, over the bytes of its parameters.
        rounds: of each the seconds of reading, loading and loading the narrow one, by the clock and of the processor.
    """

    name: str
    megabytes: float
    peak: float
    rounds: list[list[list[float]]]

    def milliseconds(self, what: int) -> float:
        """The median by the clock."""
        return 1e3 * statistics.median(each[what][0] for each in self.rounds)

    @property
    def times(self) -> float:
        """Loading over reading by the clock, the median of the rounds."""
        return statistics.median(load[0] / read[0] for read, load, _ in self.rounds)

    def processor_times(self, narrow: bool = False) -> float:
        """The least processor time of loading over that of reading; ``narrow``: less that of the narrow model."""
        read, load, small = (min(each[what][1] for each in self.rounds) for what in range(3))
        return (load - small * narrow) / read

    @property
    def cells(self) -> tuple[str, ...]:
        numbers = (self.times, self.milliseconds(2), self.processor_times(), self.processor_times(narrow=True))
        read, load, times, narrow, *processor = (self.milliseconds(0), self.milliseconds(1), *numbers)
        shown = (f"{self.peak:.2f}", f"{read:.0f}", f"{load:.0f}", f"{times:.2f}", f"{narrow:.0f}")
        return self.name, f"{self.megabytes:.0f}", *shown, *(f"{each:.2f}" for each in processor)


def measure(name: str, folder: Folder, place: Path, budget: float) -> Loading:
    """Save a folder and its narrow model in a place, and load them in a process of its own, each in so many seconds."""
    folder.save(place / "wide")
    folder.save(place / "narrow", **NARROW)
    found = _in_own_process(place, budget)
    return Loading(name, found["bytes"] / 1e6, found["peak"] / found["bytes"], found["rounds"])


def _in_own_process(place: Path, budget: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.bench.loading", str(place), str(budget)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=os.environ | WARM)
    return json.loads(done.stdout)


def run(only: str, folder: Path, budget: float) -> None:
    """Measure the folders whose name has ``only`` in it, print a table, and write ``loading.json`` if that is all."""
    prepare_folder(folder, ["loading"])
    found: list[Loading] = []
    for loading in _measured(only, budget):
        found.append(loading)
        print("  ".join(f"{name} {cell}" for name, cell in zip(HEADER, loading.cells, strict=True)), flush=True)
        if not only:
            kept = {"loading": [asdict(each) for each in found]} | provenance(Cpu())
            write_atomic(folder / "loading.json", json.dumps(kept, indent=1) + "\n")
    print("\n".join(text_table(HEADER, [each.cells for each in found], left=("folder",))))


def _measured(only: str, budget: float) -> Iterator[Loading]:
    for name, folder in FOLDERS.items():
        if only in name:
            with tempfile.TemporaryDirectory(prefix="seqarch-loading-") as place:
                yield measure(name, folder, Path(place), budget)


def _here(place: Path, budget: float) -> dict[str, Any]:
    """What one process measures."""
    wide, narrow = place / "wide", place / "narrow"
    before = _memory("VmRSS")
    model = LanguageModel.from_pretrained(wide)
    peak = _memory("VmHWM") - before
    size = sum(parameter.nbytes for parameter in model.parameters())
    del model
    load = LanguageModel.from_pretrained
    works: list[tuple[Callable[[Path], object], Path]] = [(_read, wide), (load, wide), (load, narrow)]
    (least, most), end, rounds = ROUNDS, time.monotonic() + budget * len(works), []
    while len(rounds) < least or (len(rounds) < most and time.monotonic() < end):
        rounds.append([_seconds(*work) for work in works])
    return {"peak": peak, "bytes": size, "rounds": rounds}


def _seconds(work: Callable[[Path], object], path: Path) -> tuple[float, float]:
    """By the clock and of the processor, until what was made is freed."""
    clock, processor = time.perf_counter(), time.process_time()
    work(path)
    return time.perf_counter() - clock, time.process_time() - processor


def _read(folder: Path) -> None:
    """The bytes of each tensor, into memory of its size."""
    found = []
    for path in folder.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            spans = sorted(each["data_offsets"] for name, each in header.items() if name != "__metadata__")
            for begin, end in spans:
                found.append(torch.empty(end - begin, dtype=torch.uint8))
                if file.readinto(memoryview(found[-1].numpy())) != end - begin:
                    raise OSError(f"{path} ends early")


def _memory(line: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(each for each in status if each.startswith(line)).split()[1])


if __name__ == "__main__":
    print(json.dumps(_here(Path(sys.argv[1]), float(sys.argv[2]))))
