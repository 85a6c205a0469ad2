"""Sweeps through kills and power cuts: what comes out must be what an undisturbed sweep leaves, to the bit.

    python -m tests.support.endurance --rounds 100

Each round starts a small sweep, disturbs it once to three times, repeats its command until it is done, and compares
every metric and every tensor with an undisturbed sweep's. A power cut is one of a file system: the sweep runs on an
ext4 image of its own, which is shut down without a flush, as when the power fails, and mounted again. Beside the sweep
lies a folder full of files at which a command points Hydra's folders; every byte of it must survive. Mounting needs
root; ``--no-power-cuts`` does without. Exit code 0: every round held.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from tests.support.runs import TINY, last, tensors, until
from tests.support.sweeps import folders, processes, repeat, send, started

STEPS, EVERY = 60, 5
SWEEP = ["experiments.run", "--multirun", *TINY, f"train.steps={STEPS}", f"train.eval_every={EVERY}",
         "model=attention", "seed=0,1", "launcher=joblib"]  # fmt: skip
HOSTILE = (
    ["hydra.run.dir={there}"],
    ["--multirun", "hydra.sweep.dir={there}"],
    ["hydra.run.dir=."],
    ["--multirun", "hydra.sweep.dir={link}"],
    ["hydra.run.dir={there}/inner/.."],
    ["hydra.job.chdir=true", "hydra.run.dir={there}"],
)
TIMES = ("tokens_per_second", "seconds")
"""Of a line of metrics, what no repetition gives again."""

SHUTDOWN, WITHOUT_FLUSH = 0x8004587D, struct.pack("I", 2)
"""``EXT4_IOC_SHUTDOWN`` and ``EXT4_GOING_FLAGS_NOLOGFLUSH`` of Linux."""
MOST_SECONDS = 14.0
"""Until a disturbance: an undisturbed sweep takes about as long."""


class Image:
    """An ext4 file system in a file, mounted in a folder."""

    def __init__(self, place: Path):
        self.file, self.mounted = place / "image", place / "mounted"
        with open(self.file, "wb") as file:
            file.truncate(256 * 2**20)
        _command("mkfs.ext4", "-q", str(self.file))
        self.mounted.mkdir()
        self.mount()

    def mount(self) -> None:
        _command("mount", "-o", "loop", str(self.file), str(self.mounted))

    def unmount(self) -> None:
        """Once nothing is open there any more: a process that was killed may take a moment to end."""
        until(lambda: subprocess.run(["umount", str(self.mounted)], capture_output=True).returncode == 0)

    def cut(self) -> None:
        """From now on nothing reaches the disk, and what had not yet is lost."""
        descriptor = os.open(self.mounted, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, WITHOUT_FLUSH)
        finally:
            os.close(descriptor)


def _command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(words)}: {done.stderr.strip()}; --no-power-cuts needs no mounting")


@contextmanager
def image(place: Path) -> Iterator[Image]:
    made = Image(place)
    try:
        yield made
    finally:
        made.unmount()


def outcome(cwd: Path) -> dict[str, tuple[list[dict], dict[str, torch.Tensor], dict]]:
    """Of each run its metrics but for times, its last checkpoint's tensors and its results."""
    return {
        folder.path.name: (
            [{key: value for key, value in line.items() if key not in TIMES} for line in folder.metrics()],
            tensors(last(folder)),
            folder.record()["results"],
        )
        for folder in folders(cwd)
    }


def differences(found: dict, wanted: dict) -> list[str]:
    """The differences from the undisturbed sweep, in words."""
    if found.keys() != wanted.keys():
        return [f"runs {sorted(found)} instead of {sorted(wanted)}"]
    problems = []
    for name, (metrics, content, results) in found.items():
        other_metrics, other_content, other_results = wanted[name]
        if metrics != other_metrics:
            problems.append(f"{name}: {len(metrics)} lines of metrics that are not the {len(other_metrics)} expected")
        if content.keys() != other_content.keys() or not all(
            torch.equal(tensor, other_content[key]) for key, tensor in content.items()
        ):
            problems.append(f"{name}: other tensors in the last checkpoint")
        if results != other_results:
            problems.append(f"{name}: results {results} instead of {other_results}")
    return problems


def full_folder(place: Path) -> Path:
    """A folder of somebody's work, and a link to it beside it."""
    there = place / "somebodys work"
    (there / "inner").mkdir(parents=True)
    for name in ("thesis.tex", "inner/data.csv", "config.json", "stop", "job-0.json", ".hydra"):
        (there / name).write_text(f"years of work in {name}")
    (place / "link").symlink_to(there)
    return there


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def point_at(there: Path, chance: random.Random) -> list[str]:
    """Point one of Hydra's folders at a full one, perhaps with a kill; what of it is lost, in words."""
    before = digest(there)
    options = [each.format(there=there, link=there.parent / "link") for each in chance.choice(HOSTILE)]
    command = ["experiments.run", *options, *TINY, "train.steps=1", "model=attention", f"runs={there.parent / 'runs'}"]
    with started(there, *command) as sweep:
        try:
            sweep.wait(chance.choice([60.0, chance.uniform(0.5, 8)]))
        except subprocess.TimeoutExpired:
            sweep.kill()
    after = digest(there)
    return [f"{name} after {options}" for name, sha256 in before.items() if after.get(name) != sha256]


Disturbance = Callable[[Path, subprocess.Popen, random.Random, Image | None], None]


def kill(cwd: Path, sweep: subprocess.Popen, chance: random.Random, _: Image | None) -> None:
    """Kill the sweep's process, one or two of all, or all."""
    victims = processes(cwd)
    chosen = chance.choice([[sweep.pid], chance.sample(victims, min(2, len(victims))), victims])
    for pid in chosen:
        send(pid, signal.SIGKILL)


def terminate(cwd: Path, sweep: subprocess.Popen, chance: random.Random, _: Image | None) -> None:
    """Ask the sweep, or any one process of it, to end."""
    send(chance.choice([sweep.pid, *processes(cwd)]), signal.SIGTERM)


def cut_power(cwd: Path, sweep: subprocess.Popen, chance: random.Random, disk: Image | None) -> None:
    """Shut the sweep's file system down; its processes are killed when it is left."""
    assert disk is not None
    disk.cut()


KINDS: dict[str, Disturbance] = {"kill": kill, "term": terminate, "power cut": cut_power}


def disturb(cwd: Path, chance: random.Random, how: Disturbance, disk: Image | None) -> None:
    """Start the sweep and disturb it at a random moment; afterwards none of its processes is left."""
    with started(cwd, *SWEEP) as sweep:
        try:
            sweep.wait(chance.uniform(0.2, MOST_SECONDS))
        except subprocess.TimeoutExpired:
            how(cwd, sweep, chance, disk)
            if disk is None:
                sweep.wait(120)
                until(lambda: not processes(cwd), 60)
    if disk is not None:
        until(lambda: not processes(cwd), 60)
        disk.unmount()
        disk.mount()


def one_round(place: Path, number: int, wanted: dict, kinds: list[str]) -> tuple[str, list[str]]:
    """The kind of a round's disturbances and what did not hold."""
    chance = random.Random(number)
    kind = chance.choice(kinds)
    with image(place) if kind == "power cut" else nullcontext() as disk:
        cwd = disk.mounted / "work" if disk else place / "work"
        there = full_folder(place)
        for _ in range(chance.randint(1, 3)):
            cwd.mkdir(exist_ok=True)  # made a moment before a power cut, it may be gone
            disturb(cwd, chance, KINDS[kind], disk)
        cwd.mkdir(exist_ok=True)
        (cwd / "log").touch()
        try:
            repeat(cwd, *SWEEP)
            wrong = differences(outcome(cwd), wanted)
        except AssertionError as error:
            wrong = [f"the repeat failed: {error}"]
        wrong += [f"left behind: {path}" for path in cwd.rglob(".*.tmp")]
    return kind, wrong + point_at(there, chance)


def main() -> int:
    parser = argparse.ArgumentParser(description="Sweeps through kills and power cuts.")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="the first round's number, which is its seed")
    parser.add_argument("--no-power-cuts", action="store_true")
    arguments = parser.parse_args()
    kinds = [kind for kind in KINDS if not (arguments.no_power_cuts and kind == "power cut")]
    began, tried, bad = time.monotonic(), Counter(), 0
    root = Path(tempfile.mkdtemp(prefix="endurance-"))
    undisturbed = root / "undisturbed"
    undisturbed.mkdir()
    (undisturbed / "log").touch()
    repeat(undisturbed, *SWEEP)
    wanted = outcome(undisturbed)
    for number in range(arguments.first, arguments.first + arguments.rounds):
        place = root / f"round-{number}"
        place.mkdir()
        kind, wrong = one_round(place, number, wanted, kinds)
        tried[kind] += 1
        bad += bool(wrong)
        print(f"round {number}, {kind}: {'; '.join(wrong) or 'held'}", flush=True)
        if not wrong:
            shutil.rmtree(place)
    kinds = ", ".join(f"{count} by {kind}" for kind, count in tried.items())
    print(f"{tried.total()} rounds ({kinds}) in {time.monotonic() - began:.0f} s: {bad} did not hold, kept in {root}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
