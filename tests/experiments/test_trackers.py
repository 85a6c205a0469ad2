from __future__ import annotations

from dataclasses import dataclass

import pytest

from experiments import trackers
from experiments.trackers import Tracker

from .conftest import tiny_config, train_here


@dataclass(frozen=True)
class BreakingOptions:
    at: str


class Breaking(Tracker):
    Config = BreakingOptions

    def __init__(self, options, folder, config):
        self.at, self.calls = options.at, 0
        if self.at == "start":
            raise ConnectionError("no network")

    def log(self, step, values):
        self.calls += 1
        if self.at == "log":
            raise ConnectionError("no network")

    def finish(self, status, results):
        if self.at == "finish":
            raise ConnectionError("no network")


@pytest.mark.parametrize("at", ["start", "log", "finish"])
def test_a_failing_tracker_is_told_once_and_stops_nothing(tmp_path, monkeypatch, capsys, at):
    monkeypatch.setitem(trackers.TRACKERS, "breaking", Breaking)
    config = tiny_config(tmp_path, tracker={"name": "breaking", "options": {"at": at}})
    code, folder = train_here(config)
    assert code == 0
    assert folder.status() == "finished"
    assert folder.record()["tracker_error"] == "ConnectionError: no network"
    assert capsys.readouterr().err.count("tracker breaking failed") == 1


def test_wandb_offline_hears_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    config = tiny_config(tmp_path, tracker={"name": "wandb", "options": {"tags": ["labelled"]}})
    code, folder = train_here(config)
    assert code == 0
    assert "tracker_error" not in folder.record()
    (recorded,) = folder.path.glob("wandb/offline-run-*/run-*.wandb")
    content = recorded.read_bytes()
    for expected in (b"validation_accuracy", b"labelled", b"attention", folder.path.name.encode()):
        assert expected in content
