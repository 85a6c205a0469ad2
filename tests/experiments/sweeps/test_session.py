"""Signals in the process that started a sweep."""

from __future__ import annotations

import os
import signal

import pytest

from experiments.sweeps.session import SweepSession
from experiments.sweeps.status import SweepStatus
from experiments.util.errors import StorageError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("full", [False, True])
def test_a_signal_stops_the_sweep_in_order(tmp_path, monkeypatch, capfd, number, full):
    """Also where the status cannot be written, and where it comes twice at once, from a terminal and passed on."""
    sweep = SweepStatus(tmp_path / "sweep")
    sweep.create()

    def fail(self):
        raise StorageError("cannot write: No space left on device")

    session = SweepSession()
    session.status = sweep
    if full:
        monkeypatch.setattr(SweepStatus, "stop", fail)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started the tests may ignore it, as nohup does
    session.watch_signals()
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    assert session.stopped.is_set()
    assert sweep.should_stop() is not full
    assert capfd.readouterr().err.startswith("stopping: what is in training writes a checkpoint first")


def test_nohup_is_respected(monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    SweepSession().watch_signals()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
