"""SIGTERM at any moment of a training process: it is preempted, always, and leaves nothing half done."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import train
from experiments.runs.folder import RunFolder
from experiments.training import run_record
from experiments.util.interrupts import Interrupts
from tests.support.paths import ROOT
from tests.support.runs import tiny_config

AT_TORCH = """
import os, runpy, signal, sys

def hook(event, arguments):
    if event == "import" and arguments[0] == "torch" and not sent:
        sent.append(event)
        os.kill(os.getpid(), signal.SIGTERM)

sent = []
sys.addaudithook(hook)
sys.argv = ["train", *sys.argv[1:]]
runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
"""


class Moments:
    """Counts what this process does with files, and sends it SIGTERM at one of these moments."""

    def __init__(self):
        self.count, self.at, self.active = 0, None, False
        sys.addaudithook(self._hook)  # Nothing takes a hook away again.

    def _hook(self, event: str, _: object) -> None:
        if self.active and (event == "open" or event.startswith("os.")):
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGTERM)

    def train(self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, at: int | None = None) -> int:
        """As the command does it, with SIGTERM at a moment; the exit code."""
        interrupts = Interrupts()
        for module in (run_record, train):
            monkeypatch.setattr(module, "INTERRUPTS", interrupts)
        monkeypatch.setattr("sys.argv", ["train", str(folder.path)])
        interrupts.obey()
        self.count, self.at, self.active = 0, at, True
        try:
            return train.main()
        finally:
            self.active = False


@pytest.fixture(scope="module")
def moments() -> Moments:
    return Moments()


def preempted_at(moments: Moments, monkeypatch: pytest.MonkeyPatch, root: Path, every: int) -> None:
    config = tiny_config(root, train__steps=4, train__eval_every=2)
    folder = RunFolder(config.folder())
    folder.create(config)
    assert moments.train(folder, monkeypatch) == 0
    total, codes = moments.count, []
    for at in (*range(1, total, every), total):
        shutil.rmtree(folder.path)
        folder.create(config)
        code = moments.train(folder, monkeypatch, at)
        assert (code, folder.status()) in [(75, "preempted"), (0, "finished")], at
        assert not [path for path in folder.path.rglob(".*") if path.name != ".metadata"], at
        assert not folder.lock.path.exists(), at
        assert moments.train(folder, monkeypatch) == 0, at
        assert [line["step"] for line in folder.metrics()] == [2, 4], at
        codes.append(code)
    assert (codes[0], codes[-1]) == (75, 0)


def test_at_some_moments(tmp_path, monkeypatch, moments):
    preempted_at(moments, monkeypatch, tmp_path, every=61)


@pytest.mark.slow
def test_at_every_moment(tmp_path, monkeypatch, moments):
    preempted_at(moments, monkeypatch, tmp_path, every=1)


def test_while_it_imports_what_it_needs(tmp_path):
    """Which takes seconds, in which a scheduler may well change its mind."""
    config = tiny_config(tmp_path)
    folder = RunFolder(config.folder())
    folder.create(config)
    done = subprocess.run([sys.executable, "-c", AT_TORCH, str(folder.path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert (folder.status(), folder.record()["reason"]) == ("preempted", "stopped by SIGTERM")
    assert "Traceback" not in done.stderr
    assert not folder.lock.path.exists()


@pytest.mark.parametrize("name", ["run.json", "config.json", "metrics.jsonl"])
def test_a_damaged_file_of_a_run_is_one_line(tmp_path, monkeypatch, capsys, moments, name):
    config = tiny_config(tmp_path)
    folder = RunFolder(config.folder())
    folder.create(config)
    path = folder.path / name
    path.mkdir() if name == "metrics.jsonl" else path.write_text('{"status": "fini')
    assert moments.train(folder, monkeypatch) == 1
    shown = capsys.readouterr().err
    assert f": cannot read {path}: " in shown
    assert shown.count("\n") == 1
    assert not folder.lock.path.exists()
