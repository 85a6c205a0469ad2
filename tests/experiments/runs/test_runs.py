"""Recorded runs, found and read from their folders: list, show, diff and export."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import polars
import pytest

from experiments.report import __main__ as report
from experiments.runs.differences import differences
from experiments.runs.folder import RunFolder
from experiments.runs.recorded import find_runs, pick_run
from experiments.util.errors import RunnerError
from experiments.util.items import encode_items
from tests.support.paths import ROOT
from tests.support.recorded import runs_command
from tests.support.runs import command_line, tiny_config


def test_list_shows_what_became_of_each_run(root, monkeypatch, capsys):
    killed = RunFolder(tiny_config(root, seed=3).folder())
    killed.create(tiny_config(root, seed=3))
    killed.update(status="running")
    RunFolder(tiny_config(root, seed=4).folder()).create(tiny_config(root, seed=4))
    damaged = pick_run(root, "seed1")
    damaged.folder.run_file.write_text("{")
    code, shown, _ = runs_command(monkeypatch, capsys, "list", root)
    assert code == 1
    rows = {line.split()[1][: len("attention-seed0")]: line for line in shown.splitlines() if "attention-" in line}
    finished = pick_run(root, "seed0")
    for words in ("tiny", "finished", f"{finished.get('results.test'):.6g}", finished.get("started")[:10]):
        assert words in rows["attention-seed0"]
    for seed, status in ((1, "damaged"), (2, "failed"), (3, "killed"), (4, "not started")):
        assert status in rows[f"attention-seed{seed}"]
    assert "5 runs: 1 finished, 1 damaged, 1 failed, 1 killed, 1 not started" in shown
    assert f"damaged: cannot read {damaged.folder.run_file}" in shown
    _, shown, _ = runs_command(monkeypatch, capsys, "list", root, "--status", "failed")
    assert "seed2" in shown
    assert "1 runs: 1 failed" in shown
    code, _, message = runs_command(monkeypatch, capsys, "list", root, "--status", "faild")
    assert code == 1
    assert "--status faild: expected one of damaged, failed, finished, " in message
    assert "Did you mean 'failed'?" in message


def damage(root: Path, monkeypatch) -> dict[str, str]:
    """A folder that may not be read, one that goes away, and files that hold something else; the problem of each."""
    problems = {}
    for name, content in (("cut", '{"a": '), ("list", "[1]"), ("bytes", "\xff")):
        folder = root / "tiny" / name
        folder.mkdir()
        (folder / "config.json").write_bytes(content.encode("latin-1"))
        problems[name] = f"cannot read {folder / 'config.json'}"
    for name in ("config.json", "run.json"):
        folder = root / "tiny" / f"folder-{name}"
        (folder / name).mkdir(parents=True)
        (folder / "config.json").exists() or (folder / "config.json").write_text("{}")
        problems[name] = f"cannot read {folder / name}: [Errno 21] Is a directory"
    scandir, refused = os.scandir, {"closed": PermissionError(13, "Permission denied"),
                                    "gone": FileNotFoundError(2, "No such file or directory")}  # fmt: skip

    def refusing(path):
        if Path(path).name in refused:
            raise refused[Path(path).name]
        return scandir(path)

    for name, error in refused.items():
        (root / name).mkdir()
        problems[name] = f"cannot read {root / name}: {error.strerror}"
    monkeypatch.setattr(os, "scandir", refusing)
    return problems


def test_what_cannot_be_read_is_reported_and_the_others_are_shown(root, tmp_path, monkeypatch, capsys):
    problems = damage(root, monkeypatch)
    file = tmp_path / "all.csv"
    for words, expected in (("list", "finished"), ("gc", "0 can go"), (f"export {file}", f"{file}: 10 runs")):
        code, shown, error = runs_command(monkeypatch, capsys, *words.split(), root)
        assert (code, error) == (1, "")
        assert expected in shown
        for words in problems.values():
            assert f"damaged: {words}" in shown
    rows = read_table(file)
    assert [row["status"] for row in rows].count("damaged") == 7
    assert sum(bool(row["config.train.lr"]) for row in rows) == 3
    code, shown, _ = runs_command(monkeypatch, capsys, "show", "cut", "--root", root)
    assert code == 1
    assert f"problem: {problems['cut']}" in shown
    code, _, error = runs_command(monkeypatch, capsys, "show", "nowhere", "--root", root)
    assert code == 1
    assert problems["closed"] in error


def test_a_full_output_is_one_line(root):
    """Of every command that ends as these do."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command_line("experiments.runs"), "list", str(root)],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: cannot write the standard output: No space left on device\n"


def test_a_reader_who_leaves_is_no_error(root):
    left, output = os.pipe()
    os.close(left)
    done = subprocess.run(
        [*command_line("experiments.runs"), "list", str(root)],
        cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    os.close(output)
    assert (done.returncode, done.stderr) == (0, "")


def test_show_prints_all_of_one(root, monkeypatch, capsys):
    code, shown, _ = runs_command(monkeypatch, capsys, "show", "seed0", "--root", root)
    assert code == 0
    for words in ("config.train.lr: 0.001", "status: finished", "data.hash: ", "environment.python: ", "metrics.jsonl"):
        assert words in shown
    assert pick_run(root, "seed0").items() is not None
    assert ".items" not in shown


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("seed9", "is called 'seed9': expected one of attention-seed0"), ("attention", "3 runs below")],
)
def test_a_name_must_fit_one_run(root, monkeypatch, capsys, wanted, message):
    code, _, shown = runs_command(monkeypatch, capsys, "show", wanted, "--root", root)
    assert code == 1
    assert shown.startswith("error: ")
    assert message in shown


def test_runs_that_differ_in_the_seed_differ_in_that_and_what_comes_of_it(trained):
    found = differences(pick_run(trained, "seed0"), pick_run(trained, "seed1"))
    assert found["config"] == {"config.seed": (0, 1)}
    assert not found.keys() & {"environment", "data", "backends", "code"}
    assert any(key.startswith("step 3, loss") for key in found["course"])
    assert any(key.startswith("results.") for key in found["result"]) or not found["result"]


def test_everything_that_a_record_holds_can_differ(root):
    a, b = pick_run(root, "seed0"), pick_run(root, "seed1")
    shutil.copyfile(a.folder.metrics_file, b.folder.metrics_file)
    changed = json.loads(json.dumps({**a.record, "cost": a.record["cost"] | {"flops": 7}}))
    changed["code"] |= {"commit": "0" * 40}
    changed["environment"]["packages"]["torch"] = "9.9"
    changed["hardware"]["cores"] = 1000
    changed["data"]["hash"] = "other"
    changed["backends"] = {"attention": ["other"]}
    changed["results"] |= {"test": 2.0, "items": encode_items(np.array([0.5, 0.75]))}
    b.folder.run_file.write_text(json.dumps(changed))
    b.folder.diff_file.write_text("+ a line")
    found = differences(a, pick_run(root, "seed1"))
    assert list(found) == ["config", "code", "environment", "data", "backends", "result", "cost"]
    assert found["code"]["code.commit"][1] == "0" * 40
    assert found["code"]["code.diff"][1].startswith(str(b.folder.diff_file))
    assert found["environment"]["environment.packages.torch"][1] == "9.9"
    assert found["environment"]["hardware.cores"][1] == 1000
    assert found["data"]["data.hash"] == (a.get("data.hash"), "other")
    assert "other" in found["backends"]["backends.attention"][1]
    assert found["result"]["results.test"] == (a.get("results.test"), 2.0)
    assert all(re.fullmatch(r"encoded in \d+ characters \(\w{10}\)", each) for each in found["result"]["results.items"])
    assert found["cost"] == {"cost.flops": (a.get("cost.flops"), 7)}


def test_the_same_run_does_not_differ(trained, monkeypatch, capsys):
    path = pick_run(trained, "seed0").path
    code, shown, _ = runs_command(monkeypatch, capsys, "diff", "seed0", path, "--root", trained)
    assert code == 0
    assert "they do not differ" in shown
    _, shown, _ = runs_command(monkeypatch, capsys, "diff", "seed0", "seed1", "--root", trained)
    assert "config.seed" in shown


def read_table(file: Path) -> list[dict]:
    if file.suffix == ".parquet":
        return polars.read_parquet(file).to_dicts()
    return list(csv.DictReader(file.read_text().splitlines()))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_export_is_one_line_a_run(root, tmp_path, monkeypatch, capsys, ending):
    wide = pick_run(root, "seed1").folder
    config = json.loads(wide.config_file.read_text())
    config["model"]["mixers"] = {"attention": {"window": "all"}}
    wide.config_file.write_text(json.dumps(config))
    other = pick_run(root, "seed0").folder
    config["model"]["mixers"]["attention"]["window"] = 16
    other.config_file.write_text(json.dumps({**config, "seed": 0}))
    file = tmp_path / f"all.{ending}"
    code, shown, _ = runs_command(monkeypatch, capsys, "export", file, root)
    assert code == 0
    assert f"{file}: 3 runs" in shown
    rows = read_table(file)
    assert [int(row["config.seed"]) for row in rows] == [0, 1, 2]
    assert [row["status"] for row in rows] == ["finished", "finished", "failed"]
    assert float(rows[0]["results.test"]) == other.record()["results"]["test"]
    assert rows[2]["results.test"] in (None, "")
    assert "results.test_loss" in rows[0]
    assert not any(name.endswith(".items") for name in rows[0])
    assert [row["config.model.mixers.attention.window"] for row in rows[:2]] == ["16", "all"]


def test_brackets_are_shown_and_not_obeyed(root, monkeypatch, capsys):
    """An error of a library may name itself so, and rich would take it for an instruction."""
    folder = pick_run(root, "seed2").folder
    record = {**folder.record(), "reason": "in [some/lib.so] and [/some/lib.so]", "started": "[red]then"}
    folder.run_file.write_text(json.dumps(record))
    _, shown, _ = runs_command(monkeypatch, capsys, "show", "seed2", "--root", root)
    assert "in [some/lib.so] and [/some/lib.so]" in shown
    _, shown, _ = runs_command(monkeypatch, capsys, "list", root)
    assert "[red]then" in shown
    _, shown, _ = runs_command(monkeypatch, capsys, "diff", "seed1", "seed2", "--root", root)
    assert "[/some/lib.so]" in shown
    report.print_tables([], ["[some/lib.so] is damaged"], root)
    assert "not read: [some/lib.so] is damaged" in capsys.readouterr().out


def test_export_refuses_other_formats_and_places(root, tmp_path, monkeypatch, capsys):
    code, _, message = runs_command(monkeypatch, capsys, "export", tmp_path / "all.xlsx", root)
    assert (code, message.partition(": expected")[2]) == (1, " a name that ends with .csv or .parquet\n")
    for ending in ("csv", "parquet"):
        code, _, message = runs_command(monkeypatch, capsys, "export", tmp_path / "none" / f"all.{ending}", root)
        assert code == 1
        assert "No such file" in message
    with pytest.raises(RunnerError, match="is no folder"):
        find_runs(tmp_path / "none")


def test_folders_within_runs_are_not_searched(root, monkeypatch):
    """Checkpoints and trackers may hold very many files, and some a config.json."""
    entry = pick_run(root, "seed0")
    for name in ("checkpoints/step-000010", "wandb/files"):
        inner = entry.folder.path / name
        inner.mkdir(parents=True, exist_ok=True)
        (inner / "config.json").write_text("{}")
    assert len(find_runs(root)) == 3
