"""Trained runs with their states in fewer bits: measured once, compared with float32, and drawn."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from experiments import small_states
from experiments.runs.recorded import find_runs
from experiments.studies.small_states import FORMATS, RECORDS, Line, read_records
from experiments.studies.small_states_page import complete, less, small_states_table
from seqarch import load, quantize_state


def test_runs_are_measured_token_by_token_once_and_compared(trained, tmp_path, capsys):
    runs = [run for run in find_runs(trained) if run.finished]
    given = [*(str(run.path) for run in runs), "--length", "16", "--sequences", "9", "--folder", str(tmp_path)]
    assert small_states.main([*given, "--format", "int8, stochastic"]) == 0
    assert (tmp_path / "recall.png").stat().st_size > 10_000
    lines = read_records(tmp_path)
    assert [line.format for line in lines] == ["float32", "int8, stochastic"] * len(runs)
    assert all(len(line.recall) == len(line.loss) == 9 for line in lines)
    assert {line.bytes for line in lines[::2]} == {load(runs[0].path).state_bytes(16)}
    assert {line.bytes for line in lines[1::2]} == {quantize_state(load(runs[0].path), "int8").state_bytes(16)}
    # float32 read token by token is what the runner tests with all tokens in one call
    items = runs[0].items()
    assert items is not None
    assert np.allclose(lines[0].recall, items[:9], atol=1e-6)
    before = (tmp_path / RECORDS).read_bytes()
    capsys.readouterr()
    assert small_states.main([*given, "--format", "int8, stochastic"]) == 0
    assert (tmp_path / RECORDS).read_bytes() == before
    assert "recall 0" not in capsys.readouterr().out
    assert small_states_table(tmp_path).count("\n") == 1 + 2


def test_differences_are_of_the_same_runs_and_sequences():
    base = Line("a-0", "a", 0, "mqar", 64, 64, "float32", 100, [1.0, 0.5], [0.1, 0.2], "c")
    lines = [
        base,
        replace(base, run="a-1", seed=1, recall=[0.5, 0.5]),
        replace(base, format="int8, nearest", bytes=30, recall=[0.75, 0.25]),
        replace(base, run="a-1", seed=1, format="int8, nearest", bytes=30, recall=[0.25, 0.25]),
        replace(base, format="int4, nearest", bytes=20),  # without the other run
        replace(base, run="b-0", mixer="b"),  # a run alone
    ]
    kept = complete(lines)
    assert {(line.mixer, line.format) for line in kept} == {("a", "float32"), ("a", "int8, nearest")}
    found = less(kept, "a", 64, "int8, nearest")
    assert (found.estimate, found.low, found.high) == (-0.25, -0.25, -0.25)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--length", "0"], "--length must be at least 1, got 0"),
        (["--length", "3"], "sequences of 3 tokens of the task mqar"),
        (["--format", "int8"], "--format: 'int8' is none"),
    ],
)
def test_wrong_options_are_refused(changes, said, trained, tmp_path, capsys):
    runs = [str(run.path) for run in find_runs(trained) if run.finished]
    assert small_states.main([*runs, "--folder", str(tmp_path / "out"), *changes]) == 1
    assert said in capsys.readouterr().err


def test_runs_that_are_not_finished_and_damaged_records_are_refused(root, tmp_path, capsys):
    failed = next(run for run in find_runs(root) if not run.finished)
    assert small_states.main([str(failed.path), "--folder", str(tmp_path / "out")]) == 1
    assert "expected one that is finished" in capsys.readouterr().err
    run = next(run for run in find_runs(root) if run.finished)
    shutil.rmtree(run.path / "checkpoints")
    assert small_states.main([str(run.path), "--folder", str(tmp_path / "out"), "--length", "16"]) == 1
    assert run.name in capsys.readouterr().err
    (tmp_path / "out" / RECORDS).write_text(json.dumps({"run": 1}) + "\n")
    assert small_states.main([str(run.path), "--folder", str(tmp_path / "out")]) == 1
    assert "line 1 is no record of a small state" in capsys.readouterr().err
    assert len(FORMATS) == 10
