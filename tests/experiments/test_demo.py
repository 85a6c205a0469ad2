from __future__ import annotations

import signal
import subprocess
import sys
import time

from experiments import demo


def test_the_demo_passes_signals_on_and_waits(tmp_path):
    child = f"""
import signal, sys, time
def stop(*_):
    time.sleep(0.3)
    open({str(tmp_path / "ended")!r}, "w").close()
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
open({str(tmp_path / "ready")!r}, "w").close()
time.sleep(60)
"""
    parent = f"""
import sys
from experiments.demo import run_to_the_end
sys.exit(run_to_the_end([sys.executable, "-c", {child!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", parent])
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert (tmp_path / "ended").exists()


def test_the_demo_continues_after_a_failure_and_ends_when_stopped(monkeypatch):
    codes = iter([1, 0, 0])
    called = []

    def run(command):
        called.append(command)
        return next(codes)

    monkeypatch.setattr(demo, "run_to_the_end", run)
    assert demo.main() == 1
    assert len(called) == len(demo.COMMANDS) == 3
    codes = iter([130])
    assert demo.main() == 130
    assert len(called) == 4
