from __future__ import annotations

import shlex
import signal
import subprocess
import sys

import pytest

from experiments import demo
from experiments.config.overrides import compose
from experiments.sweeps.execute import resolve_composed
from tests.support.runs import until


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
    until((tmp_path / "ready").exists)
    process.send_signal(signal.SIGINT)
    assert process.wait(50) == 130  # before it would end by itself
    assert (tmp_path / "ended").exists()


def test_the_demo_continues_after_a_failure_and_ends_when_stopped(monkeypatch):
    codes = iter([1, 0, 0])
    called = []

    def run(command):
        called.append(command)
        return next(codes)

    monkeypatch.setattr(demo, "run_to_the_end", run)
    assert demo.main([]) == 1
    assert len(called) == len(demo.COMMANDS) == 3
    codes = iter([130])
    assert demo.main([]) == 130
    assert len(called) == 4


@pytest.mark.parametrize("command", [command for command in demo.COMMANDS if "--multirun" in command])
def test_what_the_demo_trains_is_trained_to_convergence_and_tested_far_beyond(command):
    """Also for each model by itself: the start that the experiment gives a mixer reaches the model that has it."""
    given = [argument for argument in shlex.split(command)[3:] if not argument.startswith("seed=")]
    for name in demo.MODELS.split(","):
        config = resolve_composed(compose([f"model={name}" if each.startswith("model=") else each for each in given]))
        assert config.model.name == name
        assert config.train.schedule == "until_converged"
        assert config.train.target == 0.99
        assert max(config.task.options.test_lengths) == 16384
        assert config.model.options.embedding_std == 1
        slow = {"A_max": 0.1, "dt_max": 1}
        for mixer, options in {"mamba2": slow, "gated_delta_net": {"dt_max": 1e-3}}.items():
            if mixer in config.model.options.pattern:
                assert config.model.options.mixers[mixer].items() >= options.items()


def test_the_report_of_the_demo_is_on_what_it_trains():
    experiments = {compose([part])["experiment"] for command in demo.COMMANDS
                   for part in command.split() if part.startswith("experiment=")}  # fmt: skip
    assert experiments == {"demo/recall", "demo/needle"}
    assert demo.COMMANDS[-1] == "-m experiments.report runs/demo"
