"""Prints a sweep while it runs: one bar per active run on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from experiments.sweeps.remaining import FAILED, Remaining, format_duration, read_progress, remaining
from experiments.sweeps.status import SweepStatus
from experiments.util.output import Outlet, PlainConsole, drop_output, print_error

POLL_SECONDS = 0.5
LINE_SECONDS = 10.0
BAR_FROM_WIDTH = 96
"""Below this many columns a bar would leave no room for the numbers."""
WORDS = {
    "kept": "finished before",
    "other_code": "finished with other code",
    "begun_with_other_code": "begun with other code",
    "waiting": "not started",
    "busy": "being trained elsewhere",
    "repeated": "twice in the sweep",
}


class Monitor:
    """Watches a sweep's status from a thread until it is closed.

    Args:
        total: how many jobs there will be.

    Attributes:
        models: the name of every job's model, as far as it is known.
    """

    def __init__(self, sweep: SweepStatus, total: int, console: Console | None = None):
        self._sweep, self.total = sweep, total
        self.models: Sequence[str | None] = ()
        self._outlet = Outlet(sys.stdout)
        stream = cast(IO[str], self._outlet)
        self._console = console or PlainConsole(file=stream, soft_wrap=True)
        self._printed: dict[int, str] = {}
        self._over = threading.Event()
        can_redraw = self._console.is_terminal and not self._console.is_dumb_terminal
        self._display = Bars(self._console, total) if can_redraw else Lines(self._console)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            self._refresh()

    def _refresh(self) -> None:
        entries = self._sweep.entries()
        for entry in entries:
            if self._printed.get(entry["job"]) != entry["status"]:
                self._printed[entry["job"]] = entry["status"]
                if entry["status"] not in ("running", "waiting", "refused"):
                    self._console.print(format_entry(entry), markup=False)
        active = [(entry, read_progress(entry)) for entry in entries if entry["status"] == "running"]
        counts = Counter(entry["status"] for entry in entries)
        self._display.update(active, counts, remaining(entries, self.total, self.models))

    def close(self) -> list[dict[str, Any]]:
        """Stop watching, print how many runs ended in each status, and return the last entries."""
        self._over.set()
        self._thread.join()
        self._refresh()
        self._display.close()
        entries = self._sweep.entries()
        counts = Counter(entry["status"] for entry in entries)
        if len(entries) > 1:
            summary = ", ".join(f"{number} {WORDS.get(status, status)}" for status, number in counts.items())
            self._console.print(f"{len(entries)} runs: {summary}", markup=False)
        # A whole sweep is often refused for one and the same mistake, which is to be read once.
        for message, number in Counter(e["message"] for e in entries if e["status"] == "refused").items():
            print_error(message + (f" ({number} runs)" if number > 1 else ""))
        if self.problem:
            print_error(f"cannot write the standard output: {self.problem}; the record of the runs is whole")
            drop_output()
        return entries

    @property
    def problem(self) -> str | None:
        """Why not all could be printed; ``None`` where it could."""
        return self._outlet.problem


class Bars:
    """One bar per active run and one for the sweep; on a narrow terminal the numbers without bars, and names cut."""

    def __init__(self, console: Console, total: int):
        bar = BarColumn(bar_width=24, complete_style="cyan", finished_style="green")
        columns = (
            # Names alone may be cut, since the others are not to wrap.
            TextColumn("{task.description}", markup=False, table_column=Column(overflow="ellipsis")),
            *([bar] if console.width >= BAR_FROM_WIDTH else []),
            TextColumn("{task.fields[count]}", markup=False, justify="right"),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self._progress = Progress(*columns, console=console, transient=True)
        self._rows: dict[int, Any] = {}
        self._sweep = self._progress.add_task("runs", total=total, count=f"0/{total}", note="")
        self._progress.start()

    def update(self, active: list[tuple[dict, dict]], counts: Counter[str], sweep: Remaining) -> None:
        ended, total = sweep.ended, sweep.total
        shown = {
            "failed": sum(counts[status] for status in FAILED),
            "interrupted": counts["interrupted"] + counts["preempted"],
        }
        shown[WORDS["busy"]] = counts["busy"]
        left = [] if sweep.seconds is None else [f"about {format_duration(sweep.seconds)} left"]
        note = ", ".join([*left, *(f"{number} {word}" for word, number in shown.items() if number)])
        self._progress.update(self._sweep, completed=ended, total=total, count=f"{ended}/{total}", note=note)
        jobs = {entry["job"] for entry, _ in active}
        for job in [job for job in self._rows if job not in jobs]:
            self._progress.remove_task(self._rows.pop(job))
        for entry, progress in active:
            if entry["job"] not in self._rows:
                row = self._progress.add_task(entry["name"], total=1, count="", note="starting")
                self._rows[entry["job"]] = row
            if progress:
                step, steps, row = progress["step"], progress["steps"], self._rows[entry["job"]]
                note = format_progress(progress)
                self._progress.update(row, completed=step, total=steps, count=f"{step}/{steps}", note=note)

    def close(self) -> None:
        self._progress.stop()


class Lines:
    """One line per active run every ten seconds, and one on the sweep."""

    def __init__(self, console: Console):
        self._console = console
        self._last = time.monotonic()

    def update(self, active: list[tuple[dict, dict]], counts: Counter[str], sweep: Remaining) -> None:
        if time.monotonic() - self._last < LINE_SECONDS:
            return
        self._last = time.monotonic()
        for entry, progress in active:
            if progress:
                where = f"step {progress['step']} of {progress['steps']}, {format_progress(progress)} at most"
                self._console.print(f"run {entry['job'] + 1} of {sweep.total}, {entry['name']}: {where}", markup=False)
        if sweep.total > 1 and active:
            self._console.print(str(sweep), markup=False)

    def close(self) -> None: ...


def format_progress(progress: dict[str, Any]) -> str:
    speed = f"{progress['tokens_per_second'] / 1000:.1f}k tokens/s"
    return f"loss {progress['loss']:.3f}, {speed}, {format_duration(progress['seconds_left'])} left"


def format_entry(entry: dict[str, Any]) -> str:
    status = WORDS.get(entry["status"], entry["status"])
    message = entry.get("message", "")
    return f"{entry['name']}: {status}" + (f", {message}" if message else "")
