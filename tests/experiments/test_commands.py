"""Properties of all commands of ``experiments``: help without work, and no argument that is passed over."""

from __future__ import annotations

import importlib
import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from experiments import demo, run
from experiments.config.overrides import compose, hydra_arguments
from experiments.sweeps import workers
from experiments.sweeps.monitor import Monitor
from experiments.sweeps.search import Search
from experiments.sweeps.status import SweepStatus
from experiments.util.output import Outlet, console, flush_output
from tests.support.paths import ROOT
from tests.support.runs import TINY, command_line

COMMANDS = [
    "bench.__main__",
    "corpora",
    "replay",
    "report.__main__",
    "runs.__main__",
    "search",
    "small_states",
    "study",
    "tokenizer",
    "train",
]
EXPERIMENT = "# @package _global_\ndefaults:\n  - override /model: mine\nexperiment: mine\n"
MODEL = "name: mine\npattern: attention\nd_model: 64\ndepth: 1\n"


@pytest.mark.parametrize("name", ["demo", *COMMANDS])
@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--nonsense", 2)])
def test_help_is_printed_and_unknown_arguments_are_refused(name, argument, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, argument])
    monkeypatch.setattr("experiments.demo.run_to_the_end", lambda command: pytest.fail("the demo began"))
    with pytest.raises(SystemExit) as ending:
        demo.main([argument]) if name == "demo" else importlib.import_module(f"experiments.{name}").main()
    assert ending.value.code == code
    assert "usage: " in "".join(capsys.readouterr())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["study", "runs.__main__", "bench.__main__", "corpora"])
def test_no_option_is_guessed_from_its_beginning(name, monkeypatch, capsys):
    """``--del`` must not delete."""
    wanted = {"study": ["--al"], "runs.__main__": ["gc", "--del"], "bench.__main__": ["--qui"]}
    wanted["corpora"] = ["fetch", "--ag", "perl-doc"]
    monkeypatch.setattr("sys.argv", [name, *wanted[name]])
    with pytest.raises(SystemExit) as ending:
        importlib.import_module(f"experiments.{name}").main()
    assert ending.value.code == 2


def test_configurations_of_ones_own(tmp_path, monkeypatch):
    """``--config-dir`` as of Hydra, for the runner and for searches."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(MODEL)
    assert compose([f"--config-dir={tmp_path}", "model=mine"])["model"]["d_model"] == 64
    assert hydra_arguments(["--config-dir", str(tmp_path), "model=mine", "seed=1"])[2:] == ["model=mine", "++seed=1"]
    (tmp_path / "size").mkdir()
    (tmp_path / "size" / "wide.yaml").write_text("# @package _global_\nmodel:\n  d_model: 96\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path.parent)
    given = [f"--config-dir={tmp_path.name}", "experiment=mine"]
    assert compose(given)["model"]["name"] == "mine"
    assert compose([*given, "+size=wide"])["model"]["d_model"] == 96
    search = Search([f"--config-dir={tmp_path}", "model=mine", "train.lr=1e-3,1e-2"])
    assert search.config.model.name == "mine"


@pytest.mark.parametrize("name", ["run", "search"])
def test_a_folder_of_configurations_that_is_not_there_is_named(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, "train.lr=1e-3,1e-2", "--config-dir", "nowhere"])
    monkeypatch.setenv("SEQARCH_COMMAND", "")
    assert importlib.import_module(f"experiments.{name}").main() == 1
    assert capsys.readouterr().err == "error: --config-dir nowhere: there is no such folder\n"
    assert list(tmp_path.iterdir()) == []


def test_a_seed_that_is_searched_twice_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["search", "train.lr=1e-3,1e-2", "seed=0,1,0"])
    monkeypatch.setenv("SEQARCH_COMMAND", "")
    assert importlib.import_module("experiments.search").main() == 1
    assert capsys.readouterr().err.startswith("error: seed=0,1,0: a seed is given twice")


def test_a_seed_twice_in_a_sweep_is_run_once_and_reported(tmp_path, monkeypatch, capsys):
    ran = []

    def execute(composed, sweep, number, dry_run):
        ran.append(composed["seed"])
        sweep.update(number, status="finished" if number == 0 else "repeated", name="n", message="as run 1")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["run", "-m", *TINY, "seed=0,0"])
    monkeypatch.setattr(run, "execute", execute)
    for name in (workers.SWEEP, "SEQARCH_COMMAND", "HYDRA_FULL_ERROR"):
        monkeypatch.setenv(name, "")
    assert run.main() == 0
    assert "2 runs: 1 finished, 1 twice in the sweep" in capsys.readouterr().out


class Full(io.StringIO):
    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_sweep_continues_where_nobody_reads_its_output(tmp_path, monkeypatch, capsys):
    sweep = SweepStatus(tmp_path / "sweep")
    sweep.create()
    monkeypatch.setattr("sys.stdout", Full())
    watching = Monitor(sweep, 1)
    for status in ("running", "finished"):
        sweep.update(0, status=status, name="n", folder=str(tmp_path))
    assert [entry["status"] for entry in watching.close()] == ["finished"]
    assert "cannot write the standard output: No space left on device" in capsys.readouterr().err


def test_output_that_cannot_be_written_is_one_line_and_a_failure(tmp_path):
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        options = {"stdout": full, "stderr": subprocess.PIPE, "text": True, "timeout": 60, "env": environment}
        shown = subprocess.run(command_line("experiments.run", "--cfg", "job"), cwd=tmp_path, **options)
    assert (shown.returncode, shown.stderr) == (1, "error: cannot write the standard output: No space left on device\n")


def test_a_reader_that_has_left_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        outlet = Outlet(pipe)
        Console(file=outlet).print("nobody reads this")  # type: ignore
        outlet.flush()
        assert outlet.problem is None
        os.dup2(os.open(os.devnull, os.O_WRONLY), pipe.fileno())
    assert flush_output()


class Told(io.StringIO):
    """A stream that is a terminal or none."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_a_file_gets_wide_plain_text_whatever_the_environment_forces(terminal, monkeypatch):
    for name, value in (("TERM", "xterm"), ("COLUMNS", "70"), ("FORCE_COLOR", "1"), ("TTY_COMPATIBLE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", Told(terminal))
    screen = console(300)
    screen.print("heading", style="bold")
    assert (screen.width, "\x1b[1m" in sys.stdout.getvalue()) == ((70, True) if terminal else (300, False))
