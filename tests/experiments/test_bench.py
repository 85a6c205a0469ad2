"""The timing command: whom it times, what it writes, what it refuses."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch

from experiments import bench
from seqarch.ops import OPS


@pytest.fixture
def small(monkeypatch) -> bench.Contest:
    def inputs() -> bench.Inputs:
        return bench._conv_inputs() | {"x": torch.randn(2, 9, 512)}

    contest = bench.Contest("small", inputs, bench.CONTESTS["causal_conv1d"].rivals)
    monkeypatch.setitem(bench.CONTESTS, "causal_conv1d", contest)
    return contest


@pytest.mark.parametrize("op", bench.CONTESTS)
def test_all_contestants_do_the_same_work(op, small):
    contest = bench.CONTESTS[op]
    inputs, calls = contest.inputs(), bench.contestants(op, contest)
    assert OPS[op].reference in calls
    expected = next(iter(calls.values()))(**inputs)
    for name, call in calls.items():
        torch.testing.assert_close(call(**inputs), expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_it_writes_what_it_shows(small, tmp_path, capsys):
    bench.main(["causal_conv1d", "--rounds", "3", "--folder", str(tmp_path)])
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "causal_conv1d.json").read_text())
    with (tmp_path / "causal_conv1d.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = [(name, way) for way in bench.DIRECTIONS for name in bench.contestants("causal_conv1d", small)]
    assert [(row["contestant"], row["direction"]) for row in rows] == expected
    assert [row["median_ms"] for row in rows] == [str(row["median_ms"]) for row in record["rows"]]
    assert all(row["quartile1_ms"] <= row["median_ms"] <= row["quartile3_ms"] for row in record["rows"])
    assert {row["times_faster"] for row in record["rows"] if row["contestant"] == "torch conv1d"} == {1.0}
    assert record["hardware"]["cpu"] in shown
    assert f"{record['rows'][0]['median_ms']:.2f}" in shown


def test_the_ratio_is_taken_round_by_round():
    row = bench.summary("fast", "forward", values=[1.0, 2.0, 10.0], baseline=[3.0, 8.0, 20.0])
    assert row == bench.Row("fast", "forward", 2.0, 1.5, 6.0, 3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["causal_conv"], "unknown operation to time 'causal_conv'.*Did you mean 'causal_conv1d'"),
        (["--rounds", "1"], "--rounds is 1, expected at least 2"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_that_cannot_be_written_is_one_line(small, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"cannot write .*file/bench"):
        bench.main(["--folder", str(tmp_path / "file" / "bench")])
