"""The runner removes only its own files: folders that any option points at survive, byte for byte."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest
import torch

from experiments import run
from experiments.runs.folder import RunFolder
from experiments.sweeps import workers
from experiments.sweeps.status import FILES, PURPOSE, SweepStatus
from experiments.train import attempt
from experiments.training.checkpoints import Checkpoints, TrainState
from experiments.util import owned
from experiments.util.errors import RunnerError, StorageError
from tests.support.paths import ROOT
from tests.support.runs import TINY, call, tiny_config

REMOVERS = ("rmtree", "removedirs")
WHOLE = ("remove_half_checkpoint", "remove_half_checkpoints")


def snapshot(root: Path, without: str = "runs") -> dict[str, bytes | str]:
    """Every file's bytes, every link's target and every folder, by path; but for the runs."""
    found: dict[str, bytes | str] = {}
    for place, folders, files in os.walk(root):
        if Path(place) == root and without in folders:
            folders.remove(without)
        for name in [*folders, *files]:
            path = Path(place) / name
            content = os.readlink(path) if path.is_symlink() else "folder" if path.is_dir() else path.read_bytes()
            found[path.relative_to(root).as_posix()] = content
    return found


@pytest.fixture
def precious(tmp_path) -> Path:
    """A working directory with a folder of somebody's files, also behind a link."""
    folder = tmp_path / "work" / "precious"
    (folder / "deep" / "deeper").mkdir(parents=True)
    (folder / "empty").mkdir()
    for name in ("notes.txt", "owner.json", "job-0.json", "stop", "going", "run.log", ".hidden", "deep/deeper/data"):
        (folder / name).write_text(f"my {name}")
    (folder / "link").symlink_to("deep")
    (folder.parent / "linked").symlink_to("precious")
    return folder.parent


def inner(*arguments: str, monkeypatch) -> int:
    """The command in this process, up to the first job."""
    monkeypatch.setattr("sys.argv", ["run", *arguments])
    for name in (workers.SWEEP, "SEQARCH_COMMAND", "HYDRA_FULL_ERROR"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(run, "execute", made)
    return run.main()


def made(composed, sweep, job, dry_run) -> None:
    """A job that makes nothing but its entry."""
    sweep.update(job, status="made", name="run")


PLACES = ("precious", "linked", ".", "precious/deep/..", "new/folder")


@pytest.mark.parametrize(
    "options",
    [
        *([f"hydra.run.dir={place}"] for place in PLACES),
        *(["-m", f"hydra.sweep.dir={place}"] for place in PLACES),
        ["-m", "hydra.sweep.dir=precious", "hydra.sweep.subdir=../precious/deep"],
        ["-m", "launcher=joblib", "hydra.launcher.temp_folder=precious", "hydra.launcher.n_jobs=1"],
    ],
    ids=" ".join,
)
def test_folders_that_options_name_survive(precious, monkeypatch, options):
    monkeypatch.chdir(precious)
    before = snapshot(precious)
    assert inner(*options, *TINY, "seed=0", monkeypatch=monkeypatch) == 0
    after = snapshot(precious)
    assert {path: after.get(path) for path in before} == before
    added = {path for path in after.keys() - before.keys() if Path(path).parts[0] != "new"}
    assert {Path(path).name for path in added} <= {"multirun.yaml"}, "what Hydra writes where it is asked to"
    assert not list(precious.glob("runs/.sweeps/*/*.json"))


@pytest.mark.parametrize(
    "options",
    [
        ["hydra.job.chdir=true"],
        ["hydra.output_subdir=../precious"],
        ["hydra.run.dir=.", "hydra.output_subdir=precious"],
        ["hydra/job_logging=default", "hydra.run.dir=precious"],
        ["+hydra.job_logging.handlers.file.filename=precious/notes.txt"],
        ["hydra.runtime.output_dir=precious"],
        ["~hydra.callbacks"],
        ["hydra.callbacks=null"],
        ["hydra.run.dir=~/x"],
        ["hydra.run.dir='~/x'"],
        ["hydra.run.dir=null"],
        ["hydra.run.dir="],
        ["-m", "hydra.sweep.dir=~"],
        ["-m", "launcher=joblib", "hydra.launcher.temp_folder=~/x"],
        ["-m", "launcher=joblib", "hydra.launcher.n_jobs=0"],
        ["-m", "hydra.sweeper.max_batch_size=0"],
        ["runs=null"],
        ["runs="],
        ["runs=' '"],
        ["runs=~/x"],
        ["runs='~'"],
        ["runs=precious/notes.txt"],
        ["-m", "seed=range(0)"],
        ["=3"],
        ["task=3"],
        ["model=true"],
        ["-sc", "install=bash"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(precious, monkeypatch, capfd, options):
    monkeypatch.chdir(precious)
    before = snapshot(precious, without="")
    assert inner(*options, *TINY, monkeypatch=monkeypatch) == 1
    shown = capfd.readouterr()
    assert shown.err.startswith("error: ")
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert snapshot(precious, without="") == before


def test_a_sweep_overwrites_no_file_but_that_of_a_sweep(precious, monkeypatch, capfd):
    """Hydra's ``multirun.yaml``: that of an earlier sweep is renewed, another file is not."""
    monkeypatch.chdir(precious)
    assert inner("-m", *TINY, "seed=0", "hydra.sweep.dir=mine", monkeypatch=monkeypatch) == 0
    assert inner("-m", *TINY, "seed=0", "hydra.sweep.dir=mine", monkeypatch=monkeypatch) == 0
    assert [path.name for path in (precious / "mine").iterdir()] == ["multirun.yaml"]
    (precious / "precious" / "multirun.yaml").write_text("seed: 3")
    before = snapshot(precious, without="")
    assert inner("-m", *TINY, "seed=0", "hydra.sweep.dir=precious", monkeypatch=monkeypatch) == 1
    assert "precious/multirun.yaml is not of a sweep" in capfd.readouterr().err
    assert snapshot(precious, without="") == before


@pytest.mark.slow
def test_finished_runs_survive_with_real_processes(precious):
    """The command of the report: a folder, and the working directory with the new run in it."""
    before = snapshot(precious)
    done = call("experiments.run", *TINY, "train.steps=1", "hydra.run.dir=.", cwd=precious)
    assert done.returncode == 0, done.stderr
    assert snapshot(precious) == before
    (record,) = precious.glob("runs/mqar/*/run.json")
    assert json.loads(record.read_text())["status"] == "finished"
    assert [path.name for path in (precious / "runs").iterdir()] == ["mqar"]


class TestOwned:
    def test_only_what_is_named_goes_and_links_are_not_followed(self, tmp_path):
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside" / "job-1.json").write_text("mine")
        sweep = SweepStatus(tmp_path / "deep" / "sweeps" / "now")
        sweep.create()
        sweep.update(0, status="made")
        (sweep.path / "job-1.json").symlink_to(tmp_path / "outside" / "job-1.json")
        (sweep.path / "job-2.json").symlink_to(tmp_path / "outside")
        (sweep.path / "notes").write_text("mine")
        (sweep.path / "logs").mkdir()
        sweep.remove()
        assert sorted(path.name for path in sweep.path.iterdir()) == ["logs", "notes"]
        assert (tmp_path / "outside" / "job-1.json").read_text() == "mine"

    def test_folders_made_on_the_way_go_and_others_stay(self, tmp_path):
        (tmp_path / "there").mkdir()
        sweep = SweepStatus(tmp_path / "there" / "new" / "sweeps" / "now")
        sweep.create()
        sweep.remove()
        assert [path.name for path in tmp_path.rglob("*")] == ["there"]

    @pytest.mark.parametrize("broken", ["marker", "status"])
    def test_on_a_full_disk_nothing_is_left(self, tmp_path, monkeypatch, broken):
        def full(*_):
            raise StorageError("cannot write: No space left on device")

        monkeypatch.setattr(*((owned, "write_json") if broken == "marker" else (Path, "touch")), full)
        with pytest.raises(StorageError, match="No space left"):
            SweepStatus(tmp_path / "runs" / "sweeps" / "now").create()
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_is_there_is_never_taken(self, tmp_path):
        (tmp_path / "now").mkdir()
        with pytest.raises(StorageError, match="File exists"):
            SweepStatus(tmp_path / "now").create()
        SweepStatus(tmp_path / "now").remove()
        assert (tmp_path / "now").is_dir()

    def test_a_link_is_no_folder_of_ones_own(self, tmp_path):
        sweep = SweepStatus(tmp_path / "now")
        sweep.create()
        (tmp_path / "other").symlink_to("now")
        assert owned.maker(tmp_path / "now", PURPOSE) is not None
        assert owned.maker(tmp_path / "other", PURPOSE) is None
        with pytest.raises(StorageError, match="it is a link"):
            owned.remove(tmp_path / "other", FILES)
        (tmp_path / "now").rename(tmp_path / "copied")
        assert owned.maker(tmp_path / "copied", PURPOSE) is None

    def test_a_status_that_somebody_exchanged_stays(self, tmp_path):
        sweep = SweepStatus(tmp_path / "now")
        sweep.create()
        (tmp_path / "now").rename(tmp_path / "before")
        (tmp_path / "now").mkdir()
        (tmp_path / "now" / "job-0.json").write_text("mine")
        sweep.remove()
        assert (tmp_path / "now" / "job-0.json").read_text() == "mine"


def test_what_somebody_keeps_in_a_checkpoint_stays_when_that_goes(tmp_path):
    checkpoints, content = Checkpoints(tmp_path, keep_last=1), {"model": {"w": torch.ones(2)}}
    (tmp_path / ".step-000007.tmp").mkdir()
    (tmp_path / ".step-000007.tmp" / "notes").write_text("mine")
    checkpoints.save(content, TrainState(step=1))
    (checkpoints.path(1) / "plots").mkdir()
    (checkpoints.path(1) / "plots" / "mine").write_text("mine")
    checkpoints.save(content, TrainState(step=2))
    there = {path.name: list(owned.contents(path)) for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert there == {".step-000001.gone": ["plots/mine", "plots/"], ".step-000007.tmp": ["notes"]}
    assert checkpoints.newest_first() == [checkpoints.path(2)]
    with pytest.raises(StorageError, match=r"step-000007.tmp: it holds notes, which the runner did not write"):
        checkpoints.save(content, TrainState(step=7))


@pytest.mark.parametrize("name", ["checkpoints", "bad", "metrics.jsonl", "train.log"])
def test_nothing_is_written_through_a_link_in_a_run(tmp_path, name):
    folder = RunFolder(tiny_config(tmp_path / "runs").folder())
    folder.create(config := tiny_config(tmp_path / "runs"))
    (tmp_path / "elsewhere").mkdir()
    if name == "checkpoints":
        folder.checkpoints.rmdir()
    (folder.path / name).symlink_to(tmp_path / "elsewhere")
    for action in (lambda: folder.check(config), lambda: attempt(folder, None)):
        with pytest.raises(RunnerError, match=f"{name} is a link, and nothing is written through one"):
            action()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert sorted(path.name for path in folder.path.iterdir()) == sorted({"config.json", "checkpoints", name})


def test_folders_are_removed_in_one_place():
    """Nowhere is a whole folder removed, whatever is in it; half checkpoints go by whoever trains the run alone."""
    users: dict[str, set[str]] = {name: set() for name in (*REMOVERS, *WHOLE)}
    for path in (path for top in ("experiments", "seqarch", "docs") for path in (ROOT / top).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if any(name in text for name in users) else ():
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            users.get(name, set()).add(path.relative_to(ROOT).as_posix())
    assert set().union(*(users[name] for name in REMOVERS)) == set()
    others = set().union(*(users[name] for name in WHOLE)) - {"experiments/util/owned.py"}
    assert others == {"experiments/training/checkpoints.py", "experiments/runs/folder.py"}
