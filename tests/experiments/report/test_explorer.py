"""The explorer holds what the records hold, says in place what it could not read, and gives exact commands."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shlex
from pathlib import Path

import pytest

from experiments import run
from experiments.config.build import identified
from experiments.config.overrides import compose
from experiments.config.schema import run_config, without
from experiments.report import explorer, opening
from experiments.report.__main__ import main
from experiments.report.explorer_records import read_records
from experiments.report.explorer_series import thinned
from experiments.report.run_command import ON_A_MACHINE, hydra_text, run_command
from experiments.runs.recorded import find_runs
from experiments.sweeps.session import Outcome
from experiments.util.output import exit_code
from experiments.util.plot_style import pattern_mixers
from tests.experiments.report.test_maps import depth_test, record_tests
from tests.experiments.report.test_report import curve, record_run
from tests.support.paths import ROOT

INITIALISATION = ROOT / "docs" / "results" / "initialisation" / "records.jsonl"
SMALL_STATES = ROOT / "docs" / "results" / "small_states" / "records.jsonl"
BESIDE = ("retry", "other_code", "earlier", "shown")
"""Keys of a composed configuration that are none of its run's."""
LINES = INITIALISATION.read_text(encoding="utf-8").splitlines()


def data_in(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    held = text.partition('<script type="application/gzip" id="data">')[2].partition("</script>")[0]
    return json.loads(gzip.decompress(base64.b64decode(held)))


def identity_of(command: str) -> dict:
    """Of the run that a command line trains."""
    words = shlex.split(command)
    assert words[:2] == ["seqarch", "run"]
    return identified(run_config(without(compose(words[2:]), BESIDE))).identity()


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_commands_train_the_very_run_of_the_records(every):
    """One run of each arm of the study, or of some."""
    arms = {line["record"]["study"]["arm"]: line["config"] for line in map(json.loads, LINES)}
    for config in list(arms.values())[::every]:
        found, wanted = identity_of(command := run_command(config)), run_config(config).identity()
        for name in ON_A_MACHINE:  # Not on record, so not in the command.
            assert f"train.{name}" not in command
            del found["train"][name], wanted["train"][name]
        assert found == wanted
        assert set(re.findall(r"model\.mixers\.(\w+)", command)) <= pattern_mixers(config["model"]["pattern"])


def test_commands_of_options_that_need_quotes():
    """And of a run that this version does not know, as it stands."""
    given = ["experiment=needle", "name=mine/one", "model.name=odd-one", "task.test_on=[{length: 64}]", "seed=3",
             "model.pattern='attention(window=8) mamba2/moe'", "model.mixers.mamba2.d_state=8"]  # fmt: skip
    identity = identified(run_config(without(compose(given), BESIDE))).identity()
    command = run_command(identity)
    assert identity_of(command) == identity
    assert "name=mine/one" in command
    later = {"experiment": "mqar", "seed": 1, "model": {"name": "new", "pattern": "new"}, "task": {"name": "mqar"},
             "train": {"lr": 0.5, "start_from": "runs/a b"}, "plugins": ["gone"]}  # fmt: skip
    words = shlex.split(run_command(later))
    assert {"experiment=mqar", "task=mqar", "model.pattern=new", "seed=1", "train.lr=0.5"} <= set(words)
    assert words[-2:] == ["plugins=[gone]", "train.start_from='runs/a b'"]


def test_values_are_written_in_hydras_grammar():
    values = [
        None,
        True,
        3,
        1e-05,
        "plain/text.x-1",
        "null",
        "a b",
        "it's",
        "back\\",
        "1e3",
        [64, "a, b"],
        {"k": [1.5]},
    ]
    assert compose([f"plugins={hydra_text(values)}"])["plugins"] == values


def test_the_page_holds_the_committed_records(tmp_path, monkeypatch):
    """Both studies' runs, in columns; the licence of what draws; nothing that is fetched, and no place of a machine."""
    monkeypatch.chdir(ROOT)
    target = tmp_path / "all.html"
    records = tmp_path / "records.jsonl"
    records.write_text("\n".join(LINES[::16]))
    read = explorer.write([records, SMALL_STATES], target)
    data, text = data_in(target), target.read_text(encoding="utf-8")
    assert data["count"] == len(read.rows) == len(LINES[::16]) + len(SMALL_STATES.read_text().splitlines())
    assert read.problems == []
    tests = [json.loads(line)["record"].get("results", {}).get("test") for line in LINES[::16]]
    assert data["columns"]["test"]["values"][: len(tests)] == tests
    places = data["columns"]["family"]
    assert {places["values"][place] for place in places["places"]} >= {"attention", "delta rule", "state space"}
    assert data["series"]["training/metric"]["lines"][0][1][:3] == [25, 50, 75]
    assert "Redistribution and use in source and binary forms" in text
    assert not re.search(r"(?:src|href)=\"(?!data:,)", re.sub(r"(?s)<script.*?</script>", "", text))
    assert "docs/results/small_states/records.jsonl" in text
    assert str(ROOT) not in text + json.dumps(data)
    assert len(text) < 1_000_000
    before = target.read_bytes()
    explorer.write([records, SMALL_STATES], target)
    assert target.read_bytes() == before


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(tmp_path, capsys, monkeypatch):
    """A line that is cut off, one of a later version, one of another kind, one without a learning rate, no UTF-8."""
    later, lacking = json.loads(LINES[1]), json.loads(LINES[2])
    later["format"] = 99
    del lacking["config"]["train"]["lr"]
    file, other, target = tmp_path / "records.jsonl", tmp_path / "bytes.jsonl", tmp_path / "out.html"
    file.write_text("\n".join([LINES[0], LINES[0][:500], json.dumps(later), '{"a": 1}', json.dumps(lacking), "[]"]))
    other.write_bytes(b"\xff\xfe")
    gone = tmp_path / "gone.jsonl"
    monkeypatch.setattr("sys.argv", ["report", "--explorer", str(target), *map(str, (file, other, gone, SMALL_STATES))])
    assert main() == 1
    data, shown = data_in(target), capsys.readouterr().out
    assert data["count"] == 1 + len(SMALL_STATES.read_text().splitlines())
    expected = [
        rf"line 2 of {file} is damaged: expected one object of JSON, and .*",
        rf"line 3 of {file} is of format 99, and this version of the runner reads 2: .*",
        rf"line 4 of {file} is no record of a run: expected the keys format, run, config and record, .* it has a",
        rf"line 5 of {file} is no record of a run, it lacks config.train.lr",
        rf"line 6 of {file} is damaged: expected one object of JSON, got \[\]",
        rf"{other} cannot be read: it is no UTF-8 .*",
        rf"{gone} cannot be read: No such file or directory",
    ]
    for pattern, problem in zip(expected, data["problems"], strict=True):
        assert re.fullmatch(pattern, problem)
        assert f"not read: {problem}" in shown


def test_an_empty_sweep_says_so(tmp_path, capsys, monkeypatch):
    (tmp_path / "runs").mkdir()
    target = tmp_path / "out.html"
    monkeypatch.setattr("sys.argv", ["report", "--explorer", str(target), str(tmp_path / "runs")])
    assert main() == 0
    assert "0 runs" in (shown := capsys.readouterr().out)
    assert "nothing is recorded there" in shown
    assert data_in(target)["count"] == 0


def test_curves_and_maps_of_folders(tmp_path):
    """Of runs that are finished; a run that failed has its row and its reason."""
    record_run(tmp_path, "mamba2", 0, 3.4, experiment="text", curve=curve(3.4))
    record_run(tmp_path, "gla", 0, 0.1, status="failed")
    tests = {f"test_{n}": depth_test(n, [1, None, 0.5, 0], [3, 0, 2, 1]) for n in (64, 128)}
    record_tests(tmp_path, "attention", 0, tests)
    read = read_records([tmp_path])
    assert read.problems == []
    rows = {row["model"]: (number, row) for number, row in enumerate(read.rows)}
    assert rows["gla"][1]["reason"] == "the loss is nan"
    assert "test" not in rows["gla"][1]
    along = read.series["along/position in the file"]
    assert along.lines == [[rows["mamba2"][0], curve(3.4)["x"], curve(3.4)["y"]]]
    assert along.x_label == "Position in the file (bytes)"
    (cells,) = read.maps
    assert (cells["row"], cells["lengths"]) == (rows["attention"][0], [64, 128])
    assert cells["values"] == [[1, None, 0.5, 0]] * 2
    assert read.metrics["bits_per_byte"]["unit"] == "bits/byte"


def test_rounds_of_decoding_and_the_decode_bench_are_read(tmp_path):
    line = {"format": 1, "kind": "round", "plan": "p", "condition": "small", "number": 2, "others": 0.1,
            "seconds": {"mamba2": {"256": 0.5, "filled": 1.0}}}  # fmt: skip
    file = tmp_path / "records.jsonl"
    file.write_text(
        json.dumps(line) + "\n" + json.dumps({**line, "kind": "models"}) + "\n" + json.dumps({**line, "format": 2})
    )
    read = read_records([file, ROOT / "docs" / "results" / "cpu" / "decode.json"])
    first, *bench = read.rows
    assert (first["length"], first["tokens_per_second"], first["family"], first["seed"]) == (256, 2.0, "state space", 2)
    assert len(bench) == 4
    assert {row["arm"] for row in bench} == {"seqarch", "transformers"}
    (problem,) = read.problems
    assert problem == f"line 3 of {file} is of format 2, and this version reads 1"


def test_of_many_evaluations_the_first_and_the_last_are_kept():
    x = list(range(1001))
    kept, values = thinned(x, x, most=100)
    assert kept == values
    assert (kept[0], kept[-1]) == (0, 1000)
    assert 90 <= len(kept) <= 101
    assert thinned([], []) == ([], [])


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Of WCAG 2.2, from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", explorer.FAMILIES)
def test_colours_stand_out_from_the_page(theme):
    css = (explorer.PAGE / "page.css").read_text()
    surface = re.findall(r"--surface: (#\w{6})", css)[theme == "dark"]
    for colour in (*explorer.FAMILIES[theme].values(), *explorer.OTHERS[theme]):
        assert contrast(colour, surface) >= 3, colour


def test_a_page_is_opened_or_the_lack_of_a_browser_is_said(tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(opening.webbrowser, "open", lambda address: bool(opened.append(address)))
    record_run(tmp_path, "mamba2", 0, 0.4)
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path), "--open"])
    assert main() == 0
    page = tmp_path / "report" / "explorer.html"
    assert opened == [page.as_uri()]
    assert f"there is no browser here to open {page} in" in capsys.readouterr().out
    monkeypatch.setattr(opening.webbrowser, "open", lambda _: True)
    entries = [{"job": 0, "folder": str(each.path)} for each in find_runs(tmp_path)]
    assert exit_code(lambda: run._report_and_open(Outcome(2, [*entries, {"job": 1}], shown=True))) == 0
    assert capsys.readouterr().out == f"opened {tmp_path / 'recall' / 'report' / 'explorer.html'}\n"
    assert exit_code(lambda: run._report_and_open(Outcome(1, [{"job": 0}], shown=True))) == 1
    assert "no run was trained, so there is no report to open" in capsys.readouterr().err
