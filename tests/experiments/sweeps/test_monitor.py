from __future__ import annotations

import io
import time

from rich.console import Console

from experiments.runs.folder import RunFolder
from experiments.sweeps import monitor
from experiments.sweeps.monitor import Monitor
from experiments.sweeps.status import SweepStatus
from experiments.util.files import write_json


def four_jobs(tmp_path) -> SweepStatus:
    """The status of one run in training, one that failed, two refused."""
    sweep = SweepStatus(tmp_path / "sweep")
    sweep.create()
    folder = RunFolder(tmp_path / "attention-seed0-abc")
    folder.path.mkdir()
    progress = {"step": 30, "steps": 120, "loss": 1.25, "tokens_per_second": 43210.0, "seconds_left": 75.0}
    write_json(folder.progress_file, progress)
    sweep.update(0, status="running", name="attention-seed0-abc", folder=str(folder.path))
    sweep.update(1, status="failed", name="mamba2-seed0-abc", message="training diverged")
    sweep.update(2, status="refused", name="mamba-seed0", message="train.lrr: unknown key")
    sweep.update(3, status="refused", name="mamba-seed1", message="train.lrr: unknown key")
    return sweep


def watch(sweep: SweepStatus, **console) -> str:
    output = io.StringIO()
    close_soon(Monitor(sweep, 4, Console(file=output, highlight=False, **{"width": 120, **console})))
    return output.getvalue()


def close_soon(watching: Monitor) -> None:
    time.sleep(3 * monitor.POLL_SECONDS)
    watching.close()


def test_plain_lines_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(monitor, "LINE_SECONDS", 0.1)
    shown = watch(four_jobs(tmp_path))
    line = "run 1 of 4, attention-seed0-abc: step 30 of 120, loss 1.250, 43.2k tokens/s, 1:15 left at most"
    assert line in shown
    assert shown.count("mamba2-seed0-abc: failed, training diverged") == 1
    assert "\x1b" not in shown
    assert "4 runs: 1 running, 1 failed, 2 refused" in shown
    assert capsys.readouterr().err == "error: train.lrr: unknown key (2 runs)\n"


def test_a_file_gets_plain_lines_whatever_the_environment_forces(tmp_path, monkeypatch, capsys):
    for name, value in (("TERM", "xterm"), ("FORCE_COLOR", "1"), ("TTY_COMPATIBLE", "1"), ("TTY_INTERACTIVE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(monitor, "LINE_SECONDS", 0.1)
    close_soon(Monitor(four_jobs(tmp_path), 4))
    shown = capsys.readouterr().out
    assert "step 30 of 120" in shown
    assert "\x1b" not in shown


def test_bars_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown = watch(four_jobs(tmp_path), force_terminal=True)
    for words in ("attention-seed0-abc", "30/120", "loss 1.250, 43.2k tokens/s, 1:15 left", "3/4", "3 failed"):
        assert words in shown


def test_numbers_are_whole_at_80_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    sweep = four_jobs(tmp_path)
    folder = RunFolder(tmp_path / "gated_delta_net-seed0-0123456789")
    folder.path.mkdir()
    progress = {"step": 12345, "steps": 20000, "loss": 1.25, "tokens_per_second": 123456.0, "seconds_left": 4500.0}
    write_json(folder.progress_file, progress)
    sweep.update(4, status="running", name=folder.path.name, folder=str(folder.path))
    shown = watch(sweep, force_terminal=True, width=80, color_system=None)
    row = next(line for line in shown.splitlines() if line.startswith("gated_delta_net") and "loss" in line)
    assert "12345/20000 loss 1.250, 123.5k tokens/s, 1:15:00 left" in row
    assert len(row.rstrip()) <= 80


def test_an_interrupted_run_is_not_counted_as_done_or_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    sweep = SweepStatus(tmp_path / "sweep")
    sweep.create()
    sweep.update(0, status="interrupted", name="attention-seed0-abc", message="stopped from outside")
    shown = watch(sweep, force_terminal=True, color_system=None)
    assert "0/4 1 interrupted" in shown
    assert "1/4" not in shown
    assert "failed" not in shown


def test_nothing_looks_unknown_before_the_first_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    sweep = SweepStatus(tmp_path / "sweep")
    sweep.create()
    sweep.update(0, status="running", name="attention-seed0-abc", folder=str(tmp_path))
    shown = watch(sweep, force_terminal=True, color_system=None)
    assert "0/4" in shown
    assert "starting" in shown
    assert "?" not in shown.replace("\x1b[?25", "")


def test_lines_on_a_terminal_that_cannot_redraw(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(monitor, "LINE_SECONDS", 0.1)
    assert "step 30 of 120" in watch(four_jobs(tmp_path), force_terminal=True)
