"""Checkpoints that are damaged, half written, kept and removed; and runs that resume from them exactly."""

from __future__ import annotations

import json
import random
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from experiments.runs.folder import RunFolder
from experiments.training.checkpoints import Checkpoints, Damaged, TrainState, verified
from experiments.training.loop import Run
from experiments.util.errors import RunnerError
from tests.support.paths import ROOT
from tests.support.runs import last, same, tensors, tiny_config, train_here
from tests.support.stacks import STACKS


def steps_of(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.iterdir())


class Watched:
    """The inputs and draws of a run: the digest of each batch and numbers of each random stream, step by step."""

    def __init__(self, monkeypatch):
        self.seen, step = [], Run.step

        def watched(run):
            batch = run.task.train_batch(run.config.seed, run.state.step * 8, 8)
            drawn = torch.rand(()).item(), np.random.rand(), random.random()
            self.seen.append((run.state.step, batch.tokens.tobytes(), *drawn))
            return step(run)

        monkeypatch.setattr(Run, "step", watched)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stack", STACKS)
def test_ten_steps_or_five_and_five_are_the_same_to_the_bit(tmp_path, monkeypatch, stack, optimizer):
    """Stopped between two evaluations, as a scheduler does it; and with other random streams meanwhile."""
    changes = {**STACKS[stack], "train__optimizer": optimizer, "train__eval_every": 4, "train__spike": 100.0}
    watched, torn_config = Watched(monkeypatch), tiny_config(tmp_path / "torn", **changes)
    random.seed(0), np.random.seed(0)
    whole = train_here(tiny_config(tmp_path / "whole", **changes))[1]
    straight, watched.seen = watched.seen, []

    random.seed(0), np.random.seed(0)
    step = Run.step

    def preempted_in_step_5(run):
        run.interrupts.requested = run.state.step == 4
        return step(run)

    monkeypatch.setattr(Run, "step", preempted_in_step_5)
    code, torn = train_here(torn_config)
    assert (code, torn.status(), steps_of(torn)) == (75, "preempted", ["step-000004", "step-000005"])
    torch.rand(3), np.random.rand(3), random.random()
    monkeypatch.setattr(Run, "step", step)
    assert train_here(torn_config)[0] == 0

    assert watched.seen == straight
    assert same(tensors(last(whole)), tensors(last(torn)))
    assert (last(whole) / "random-0.pt").read_bytes() == (last(torn) / "random-0.pt").read_bytes()
    for ours, theirs in zip(whole.metrics(), torn.metrics(), strict=True):
        assert ours | {"tokens_per_second": 0} == theirs | {"tokens_per_second": 0}
    assert whole.record()["results"] == torn.record()["results"]


def damaged(path, how):
    """Spoil a checkpoint in one way; returns a part of the message."""
    data, manifest = path / "__0_0.distcp", path / "manifest.json"
    if how == "a bit":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
        return f"__0_0.distcp is not what was written ({len(content)} bytes of {len(content)})"
    if how == "cut short":
        data.write_bytes(data.read_bytes()[:1000])
        return "__0_0.distcp is not what was written (1000 bytes of"
    if how == "a counter":
        manifest.write_text(manifest.read_text().replace('"bad_steps": 0', '"bad_steps": 1'))
        return "manifest.json is missing or not what was written"
    missing = {"no data": data, "no metadata": path / ".metadata", "no manifest": manifest}[how]
    missing.unlink()
    return f"{missing.name} is missing"


@pytest.mark.parametrize("how", ["a bit", "cut short", "a counter", "no data", "no metadata", "no manifest"])
def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, capsys, how):
    config = tiny_config(tmp_path)
    folder = train_here(config)[1]
    results, content = folder.record()["results"], tensors(last(folder))
    spoilt = last(folder)
    message = damaged(spoilt, how)
    with pytest.raises(Damaged):
        verified(spoilt)
    folder.run_file.unlink()
    capsys.readouterr()
    code, folder = train_here(config)
    assert code == 0
    shown = capsys.readouterr().err
    assert f"checkpoint {spoilt} is damaged: " in shown
    assert message in shown
    assert "trying the one before it" in shown
    assert folder.record()["results"] == results
    assert [line["step"] for line in folder.metrics()] == [5, 10]
    assert same(tensors(spoilt), content)


def test_where_all_checkpoints_are_damaged_nothing_is_begun_in_silence(tmp_path):
    config = tiny_config(tmp_path)
    folder = train_here(config)[1]
    for path in folder.checkpoints.iterdir():
        damaged(path, "a bit")
    folder.run_file.unlink()
    assert train_here(config)[0] == 1
    assert f"every checkpoint in {folder.checkpoints} is damaged; delete that folder" in folder.record()["reason"]


def test_a_checkpoint_half_written_is_passed_over_and_removed(tmp_path):
    config = tiny_config(tmp_path)
    folder = train_here(config)[1]
    (folder.checkpoints / ".step-000010.tmp").mkdir()
    (folder.checkpoints / ".step-000010.tmp" / "__0_0.distcp").write_bytes(b"half")
    damaged(last(folder), "a bit")
    folder.run_file.unlink()
    assert train_here(config)[0] == 0
    assert steps_of(folder) == ["step-000005", "step-000010"]


def test_the_latest_and_the_best_that_each_knows_are_kept(tmp_path, monkeypatch):
    scores = iter([0.1, 0.5, 0.3, 0.2, 0.9, 0.4])
    monkeypatch.setattr(
        "experiments.training.loop.evaluate_split", lambda *_: {"accuracy": next(scores, 0.0), "loss": 1.0}
    )
    _, folder = train_here(tiny_config(tmp_path, train__steps=25, train__keep_last=2))
    # Of the latest two, 20 knows the one of step 10 as the best so far.
    assert steps_of(folder) == ["step-000010", "step-000020", "step-000025"]
    assert folder.record()["results"]["checkpoint"] == "step-000025"


def test_checkpoints_between_evaluations(tmp_path):
    _, folder = train_here(
        tiny_config(tmp_path, train__save_every=2, train__keep_last=3, train__eval_checkpoint="last")
    )
    assert {"step-000006", "step-000008", "step-000010"} <= set(steps_of(folder))
    assert [line["step"] for line in folder.metrics()] == [5, 10]


def test_how_many_are_kept_does_not_make_another_run(tmp_path):
    one, two = (tiny_config(tmp_path, train__keep_last=keep, train__save_every=keep) for keep in (1, 2))
    assert one.folder() == two.folder()
    assert one.folder() != tiny_config(tmp_path, train__micro_batch=4).folder()


@pytest.mark.parametrize("how", ["damaged", "gone", "all but the last"])
def test_where_the_best_checkpoint_is_lost_the_next_best_that_is_intact_is_tested(tmp_path, monkeypatch, capsys, how):
    """Not one between two evaluations, which has no score; and the record says that it is not the best."""
    scores = iter([0.5, 0.9, 0.6, 0.1])
    monkeypatch.setattr("experiments.training.loop.evaluate_split", lambda *_: {"accuracy": next(scores), "loss": 1.0})
    evaluate = Run.evaluate

    def losing(run):
        evaluate(run)
        if run.state.step == 20:
            best = run.checkpoints.path(10)
            shutil.rmtree(best) if how == "gone" else damaged(best, "a bit")
            for step in (5, 15) if how == "all but the last" else ():
                damaged(run.checkpoints.path(step), "a bit")

    monkeypatch.setattr(Run, "evaluate", losing)
    code, folder = train_here(tiny_config(tmp_path, train__steps=20, train__keep_last=9, train__save_every=4))
    results, (step, validation) = folder.record()["results"], {"all but the last": (20, 0.1)}.get(how, (15, 0.6))
    assert (code, results["checkpoint_step"], results["validation"]) == (0, step, validation)
    assert f"{folder.checkpoints / 'step-000010'} is damaged: " in results["instead_of"]
    assert f"delete {folder.path} to train the run again" in capsys.readouterr().out


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    folder = train_here(tiny_config(tmp_path))[1]
    wider = Run(tiny_config(tmp_path, model__d_model=64), folder)
    with pytest.raises(RunnerError, match=r"cannot load checkpoint .*step-000010"):
        Checkpoints(folder.checkpoints, 1).resume({"model": wider.model.state_dict()})


def test_a_full_disk_while_the_tensors_are_written(tmp_path):
    """The limit on a file's size ends the writing of the tensors in the middle, as a full disk does."""
    code = f"""
import resource, sys, torch
from pathlib import Path
from experiments.training.checkpoints import Checkpoints, TrainState
from experiments.util.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, {resource.RLIM_INFINITY}))
checkpoints = Checkpoints(Path(sys.argv[1]), 2)
checkpoints.save({{"model": {{"w": torch.zeros(10)}}}}, TrainState(step=1))
try:
    checkpoints.save({{"model": {{"w": torch.zeros(10**5)}}}}, TrainState(step=2))
except StorageError as error:
    print(error)
print([path.name for path in checkpoints.newest_first()])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert f"cannot write {tmp_path / 'step-000002'}: File too large" in done.stdout, done.stderr
    assert "['step-000001']" in done.stdout
    assert verified(tmp_path / "step-000001")["state"]["step"] == 1


def test_a_manifest_says_what_is_there(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save({"model": {"w": torch.arange(3.0)}}, TrainState(step=7, best=0.5, best_step=7))
    manifest = json.loads((checkpoints.path(7) / "manifest.json").read_text())
    assert manifest["files"].keys() == {".metadata", "__0_0.distcp", "random-0.pt"}
    assert (manifest["state"]["step"], manifest["processes"], manifest["torch"]) == (7, 1, torch.__version__)
    content = {"model": {"w": torch.zeros(3)}}
    assert checkpoints.resume(content) == TrainState(step=7, best=0.5, best_step=7)
    assert content["model"]["w"].tolist() == [0, 1, 2]


def test_a_checkpoint_of_a_later_version_is_refused_and_other_folders_are_none(tmp_path):
    @dataclass
    class Later(TrainState):
        temperature: float = 0.0

    checkpoints, content = Checkpoints(tmp_path, keep_last=1), {"model": {"w": torch.ones(3)}}
    (tmp_path / "step-of-mine").mkdir()
    checkpoints.save(content, Later(step=7))
    with pytest.raises(RunnerError, match=r"cannot load checkpoint .*step-000007: another version of the runner"):
        checkpoints.resume(content)
    assert checkpoints.newest_first() == [checkpoints.path(7)]
    assert checkpoints.newest_first(6) == []
    assert (tmp_path / "step-of-mine").exists()
