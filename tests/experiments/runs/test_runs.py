"""Recorded runs looked at from their folders: list, show, diff, gc and export."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import polars
import pytest

from experiments.report import __main__ as report
from experiments.runs import __main__ as command
from experiments.runs.differences import differences
from experiments.runs.folder import RunFolder
from experiments.runs.recorded import find_runs, pick_run
from experiments.sweeps.status import SweepStatus
from experiments.util.errors import RunnerError
from experiments.util.process_identity import mark, process_identity
from tests.support.paths import ROOT
from tests.support.runs import command_line, tiny_config, train_here


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two finished runs that differ in the seed, and a failed one."""
    root = tmp_path_factory.mktemp("trained") / "runs"
    for changes in ({"seed": 0}, {"seed": 1}, {"seed": 2, "train__lr": 1e30, "train__grad_clip": 0.0}):
        train_here(tiny_config(root, train__steps=6, train__eval_every=3, **changes))
    return root


@pytest.fixture
def root(trained, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def call(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["runs", *map(str, arguments)])
    code = command.main()
    return code, *capsys.readouterr()


def test_list_tells_what_became_of_each_run(root, monkeypatch, capsys):
    killed = RunFolder(tiny_config(root, seed=3).folder())
    killed.create(tiny_config(root, seed=3))
    killed.update(status="running")
    RunFolder(tiny_config(root, seed=4).folder()).create(tiny_config(root, seed=4))
    damaged = pick_run(root, "seed1")
    damaged.folder.run_file.write_text("{")
    code, shown, _ = call(monkeypatch, capsys, "list", root)
    assert code == 1
    rows = {line.split()[1][: len("attention-seed0")]: line for line in shown.splitlines() if "attention-" in line}
    finished = pick_run(root, "seed0")
    for words in ("tiny", "finished", f"{finished.get('results.test'):.6g}", finished.get("started")[:10]):
        assert words in rows["attention-seed0"]
    for seed, status in ((1, "damaged"), (2, "failed"), (3, "killed"), (4, "not started")):
        assert status in rows[f"attention-seed{seed}"]
    assert "5 runs: 1 finished, 1 damaged, 1 failed, 1 killed, 1 not started" in shown
    assert f"damaged: cannot read {damaged.folder.run_file}" in shown
    _, shown, _ = call(monkeypatch, capsys, "list", root, "--status", "failed")
    assert "seed2" in shown
    assert "1 runs: 1 failed" in shown
    code, _, told = call(monkeypatch, capsys, "list", root, "--status", "faild")
    assert code == 1
    assert "--status faild: expected one of damaged, failed, finished, " in told
    assert "Did you mean 'failed'?" in told


def damage(root: Path, monkeypatch) -> dict[str, str]:
    """A folder that may not be read, one that goes away, and files that hold something else; what is told of each."""
    told = {}
    for name, content in (("cut", '{"a": '), ("list", "[1]"), ("bytes", "\xff")):
        folder = root / "tiny" / name
        folder.mkdir()
        (folder / "config.json").write_bytes(content.encode("latin-1"))
        told[name] = f"cannot read {folder / 'config.json'}"
    for name in ("config.json", "run.json"):
        folder = root / "tiny" / f"folder-{name}"
        (folder / name).mkdir(parents=True)
        (folder / "config.json").exists() or (folder / "config.json").write_text("{}")
        told[name] = f"cannot read {folder / name}: [Errno 21] Is a directory"
    scandir, refused = os.scandir, {"closed": PermissionError(13, "Permission denied"),
                                    "gone": FileNotFoundError(2, "No such file or directory")}  # fmt: skip

    def refusing(path):
        if Path(path).name in refused:
            raise refused[Path(path).name]
        return scandir(path)

    for name, error in refused.items():
        (root / name).mkdir()
        told[name] = f"cannot read {root / name}: {error.strerror}"
    monkeypatch.setattr(os, "scandir", refusing)
    return told


def test_what_cannot_be_read_is_told_and_the_others_are_shown(root, tmp_path, monkeypatch, capsys):
    told = damage(root, monkeypatch)
    file = tmp_path / "all.csv"
    for words, expected in (("list", "finished"), ("gc", "0 can go"), (f"export {file}", f"{file}: 10 runs")):
        code, shown, error = call(monkeypatch, capsys, *words.split(), root)
        assert (code, error) == (1, "")
        assert expected in shown
        for words in told.values():
            assert f"damaged: {words}" in shown
    rows = read_table(file)
    assert [row["status"] for row in rows].count("damaged") == 7
    assert sum(bool(row["config.train.lr"]) for row in rows) == 3
    code, shown, _ = call(monkeypatch, capsys, "show", "cut", "--root", root)
    assert code == 1
    assert f"problem: {told['cut']}" in shown
    code, _, error = call(monkeypatch, capsys, "show", "nowhere", "--root", root)
    assert code == 1
    assert told["closed"] in error


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


def test_show_tells_all_of_one(root, monkeypatch, capsys):
    code, shown, _ = call(monkeypatch, capsys, "show", "seed0", "--root", root)
    assert code == 0
    for words in ("config.train.lr: 0.001", "status: finished", "data.hash: ", "environment.python: ", "metrics.jsonl"):
        assert words in shown


@pytest.mark.parametrize(
    ("wanted", "told"),
    [("seed9", "is called 'seed9': expected one of attention-seed0"), ("attention", "3 runs below")],
)
def test_a_name_must_fit_one_run(root, monkeypatch, capsys, wanted, told):
    code, _, shown = call(monkeypatch, capsys, "show", wanted, "--root", root)
    assert code == 1
    assert shown.startswith("error: ")
    assert told in shown


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
    changed["results"]["test"] = 2.0
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
    assert found["cost"] == {"cost.flops": (a.get("cost.flops"), 7)}


def test_the_same_run_does_not_differ(trained, monkeypatch, capsys):
    code, shown, _ = call(
        monkeypatch, capsys, "diff", "seed0", pick_run(trained, "seed0").folder.path, "--root", trained
    )
    assert code == 0
    assert "they do not differ" in shown
    _, shown, _ = call(monkeypatch, capsys, "diff", "seed0", "seed1", "--root", trained)
    assert "config.seed" in shown


class TestGarbage:
    def litter(self, root: Path, dead_pid: int) -> list[Path]:
        """What a killed sweep and killed training processes leave."""
        folder = pick_run(root, "seed0").folder
        gone = {**process_identity(os.getpid()), "started": "1"}
        abandoned = SweepStatus(root / ".sweeps" / "killed")
        abandoned.create()
        marker = abandoned.path / "owner.json"
        marker.write_text(json.dumps({**json.loads(marker.read_text()), "started": "1"}))
        folder.claim.path.write_text(json.dumps(gone))
        folder.progress_file.write_text("{}")
        aside = folder.path / ".run.json.12.tmp"
        aside.write_text("{")
        os.utime(aside, (time.time() - 7200,) * 2)
        half = folder.checkpoints / ".step-000015.tmp"
        half.mkdir()
        (half / "__0_0.distcp").write_bytes(b"half")
        pages = [root / below / f".index.md.{dead_pid}-1-{mark().rpartition('-')[2]}.tmp"
                 for below in ("report", "results/small/length")]  # fmt: skip
        for page in pages:
            page.parent.mkdir(parents=True)
            page.write_text("half")
        return [abandoned.path, folder.claim.path, folder.progress_file, aside, half, *pages]

    def test_only_leftovers_go_and_only_on_request(self, root, monkeypatch, capsys, dead_pid):
        before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        litter = self.litter(root, dead_pid)
        fresh = pick_run(root, "seed1").folder.path / ".run.json.12.tmp"
        fresh.write_text("{")
        live = SweepStatus(root / ".sweeps" / "live")
        live.create()
        _, shown, _ = call(monkeypatch, capsys, "gc", root)
        assert "7 can go" in shown
        assert all(str(path) in shown and path.exists() for path in litter)
        _, shown, _ = call(monkeypatch, capsys, "gc", root, "--delete")
        assert "7 deleted" in shown
        assert not any(path.exists() for path in litter)
        assert fresh.exists()
        assert live.path.exists()
        assert {path: path.read_bytes() for path in before} == before

    def test_checkpoints_and_failed_runs_go_when_asked_for(self, root, monkeypatch, capsys):
        failed, finished = pick_run(root, "seed2").folder, pick_run(root, "seed0").folder
        call(monkeypatch, capsys, "gc", root, "--delete", "--checkpoints", "--failed")
        assert not failed.path.exists()
        assert not (finished.path / "checkpoints").exists()
        assert finished.status() == "finished"
        assert len(finished.metrics()) == 2

    def test_what_others_made_stays(self, root, monkeypatch, capsys):
        """Notes in a run, a folder of another program with the same names in it, what a link leads to."""
        failed, finished = pick_run(root, "seed2").folder, pick_run(root, "seed0").folder
        (failed.path / "notes.txt").write_text("mine")
        outside = root.parent / "outside"
        outside.mkdir()
        (outside / "step-000001").write_text("mine")
        (finished.checkpoints / "mine").symlink_to(outside)
        foreign = root / "another-program"
        foreign.mkdir()
        for name in ("config.json", "progress.json", "claim.json", ".run.json.tmp", ".config.json.1.tmp"):
            (foreign / name).write_text('{"status": "failed"}')
            os.utime(foreign / name, (0, 0))
        (foreign / "run.json").write_text('{"status": "failed"}')
        sweep = SweepStatus(root / ".sweeps" / "now")
        sweep.create()
        (sweep.path / "owner.json").write_text(json.dumps({"pid": 1, "host": "x", "started": "1", "name": "other"}))
        (root / ".sweeps" / "linked").symlink_to(outside)
        shutil.rmtree(pick_run(root, "seed1").folder.path)
        before = {path: path.is_dir() or path.read_bytes() for path in root.parent.rglob("*")}
        _, shown, _ = call(monkeypatch, capsys, "gc", root, "--delete", "--checkpoints", "--failed")
        assert "stayed: it holds notes.txt, which the runner did not write; nothing was removed" in shown
        assert "stayed: it holds mine, which the runner did not write; nothing was removed" in shown
        assert {path: path.is_dir() or path.read_bytes() for path in root.parent.rglob("*")} == before

    def test_a_run_with_everything_that_the_runner_writes_can_go(self, tmp_path, monkeypatch, capsys):
        """The names by which ``gc`` proves that a folder is a run's are those that are written."""
        config = tiny_config(
            tmp_path, tracker={"name": "tensorboard"}, train__steps=3, train__lr=1e30, train__grad_clip=0.0
        )
        code, folder = train_here(config)
        assert (code, folder.status()) == (1, "failed")
        assert folder.bad.is_dir()
        folder.log_file.write_text("as the supervisor does")
        call(monkeypatch, capsys, "gc", tmp_path, "--delete", "--failed")
        assert not folder.path.exists()

    def test_a_run_in_training_is_left_alone(self, root, monkeypatch, capsys):
        folder = pick_run(root, "seed2").folder
        folder.progress_file.write_text("{}")
        folder.claim.take()
        call(monkeypatch, capsys, "gc", root, "--delete", "--failed", "--checkpoints")
        assert folder.progress_file.exists()
        assert folder.claim.is_own()

    @pytest.mark.parametrize("case", [("seed2", "finished", "--failed"), ("seed0", "running", "--checkpoints")])
    def test_a_run_that_ended_otherwise_meanwhile_stays(self, root, monkeypatch, capsys, case):
        """Between the look and the removal: what it says under the claim is what counts."""
        seed, status, option = case
        folder, take = pick_run(root, seed).folder, type(RunFolder(root).claim).take

        def meanwhile(claim, *arguments):
            folder.update(status=status, results={"test": 0.5})
            take(claim, *arguments)

        monkeypatch.setattr(type(folder.claim), "take", meanwhile)
        _, shown, _ = call(monkeypatch, capsys, "gc", root, "--delete", option)
        assert f"stayed: the run is {status} by now" in shown
        assert (folder.status(), folder.checkpoints.exists()) == (status, True)

    def test_a_run_that_is_taken_meanwhile_stays(self, root, monkeypatch, capsys):
        entry = pick_run(root, "seed2")
        other = RunFolder(entry.folder.path)
        monkeypatch.setattr(type(other.claim), "is_held", lambda self: False)
        other.claim.take()
        _, shown, _ = call(monkeypatch, capsys, "gc", root, "--delete", "--failed")
        assert f"stayed: {other.path} is being trained by process {os.getpid()}" in shown
        assert "0 deleted" in shown
        assert other.run_file.exists()


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
    code, shown, _ = call(monkeypatch, capsys, "export", file, root)
    assert code == 0
    assert f"{file}: 3 runs" in shown
    rows = read_table(file)
    assert [int(row["config.seed"]) for row in rows] == [0, 1, 2]
    assert [row["status"] for row in rows] == ["finished", "finished", "failed"]
    assert float(rows[0]["results.test"]) == other.record()["results"]["test"]
    assert rows[2]["results.test"] in (None, "")
    assert [row["config.model.mixers.attention.window"] for row in rows[:2]] == ["16", "all"]


def test_brackets_are_shown_and_not_obeyed(root, monkeypatch, capsys):
    """An error of a library may name itself so, and rich would take it for an instruction."""
    folder = pick_run(root, "seed2").folder
    record = {**folder.record(), "reason": "in [some/lib.so] and [/some/lib.so]", "started": "[red]then"}
    folder.run_file.write_text(json.dumps(record))
    _, shown, _ = call(monkeypatch, capsys, "show", "seed2", "--root", root)
    assert "in [some/lib.so] and [/some/lib.so]" in shown
    _, shown, _ = call(monkeypatch, capsys, "list", root)
    assert "[red]then" in shown
    _, shown, _ = call(monkeypatch, capsys, "diff", "seed1", "seed2", "--root", root)
    assert "[/some/lib.so]" in shown
    report.show([], ["[some/lib.so] is damaged"], root)
    assert "not read: [some/lib.so] is damaged" in capsys.readouterr().out


def test_export_refuses_other_formats_and_places(root, tmp_path, monkeypatch, capsys):
    code, _, told = call(monkeypatch, capsys, "export", tmp_path / "all.xlsx", root)
    assert (code, told.partition(": expected")[2]) == (1, " a name that ends with .csv or .parquet\n")
    for ending in ("csv", "parquet"):
        code, _, told = call(monkeypatch, capsys, "export", tmp_path / "none" / f"all.{ending}", root)
        assert code == 1
        assert "No such file" in told
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
