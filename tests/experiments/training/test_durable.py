"""Files that outlive a power cut, and the limits of a hostile or damaged folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from experiments.config.schema import to_dict
from experiments.replay import replay
from experiments.runs.folder import RunFolder
from experiments.sweeps.execute import execute
from experiments.sweeps.status import SweepStatus
from experiments.training.checkpoints import Checkpoints, Damaged, TrainState, random_streams, verified
from experiments.util.errors import RunnerError
from experiments.util.process_identity import mark, start_of
from seqarch.checkpoints.errors import CheckpointError
from seqarch.checkpoints.tensor_reader import TensorReader
from tests.support.power_cut import PowerCut
from tests.support.runs import last, tiny_config, train_here


def intact(folder: RunFolder) -> list[int]:
    """The steps of the checkpoints that are intact, the newest first."""
    found = []
    for path in Checkpoints(folder.checkpoints, 1).newest_first():
        with suppress(Damaged):
            found.append(verified(path)["state"]["step"])
    return found


def test_at_every_moment_a_power_cut_leaves_what_the_checkpoints_count_on(tmp_path, monkeypatch):
    """The configuration, each evaluation's line up to the newest step; and a finished run stays finished."""
    root, left, moments = tmp_path / "disk", tmp_path / "left", []
    root.mkdir()
    config = tiny_config(root / "runs", train__steps=15, train__save_every=4)
    folder = RunFolder(left / config.folder().relative_to(root))

    def cut():
        shutil.rmtree(left, ignore_errors=True)
        disk.leave(left)
        newest = max(intact(folder), default=0)
        assert newest == 0 or folder.config().train == config.train
        assert [line["step"] for line in folder.metrics() if line["step"] <= newest] == list(range(5, newest + 1, 5))
        moments.append((newest, folder.status()))

    disk = PowerCut(root, after=cut)
    with disk.watching(monkeypatch):
        assert train_here(config)[0] == 0
    assert list(dict.fromkeys(step for step, _ in moments)) == [0, 4, 5, 8, 10, 12, 15]
    assert list(dict.fromkeys(status for _, status in moments)) == [None, "running", "finished"]


def test_lines_of_metrics_that_are_lost_are_reported_and_recorded(tmp_path, capsys):
    config = tiny_config(tmp_path, train__steps=15)
    folder = train_here(config)[1]
    lines = folder.metrics_file.read_text().splitlines(keepends=True)
    folder.run_file.unlink()
    folder.metrics_file.write_text(lines[1])
    for _ in range(2):  # Another attempt after this one knows it still.
        assert train_here(config)[0] == 0
        assert "2 of the 3 lines of metrics up to step 15 are lost" in capsys.readouterr().out
        assert folder.record()["metrics_lost"] == {"lines": 2, "of": 3, "up_to_step": 15}
        sweep = SweepStatus(tmp_path / ".sweeps" / f"now-{os.getpid()}")
        sweep.create()
        execute(to_dict(config), sweep, 0)
        assert sweep.entries()[0]["message"].endswith(" after 15 steps; 2 lines of its metrics are lost")
        sweep.remove()
        folder.update(status="failed")
    folder.metrics_file.write_text("".join(lines))
    assert train_here(config)[0] == 0
    assert "metrics_lost" not in folder.record()


def mark_of(pid: int) -> str:
    """As :func:`experiments.util.process_identity.mark`, of another process here."""
    return f"{pid}-{start_of(pid)}-{mark().rpartition('-')[2]}"


def test_what_killed_attempts_left_half_written_goes_and_nothing_else(tmp_path, dead_pid):
    """Files of living processes, files written elsewhere and links stay; the next attempt looks through its folder."""
    config = tiny_config(tmp_path / "runs")
    folder = train_here(config)[1]
    folder.run_file.unlink()
    folder.bad.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    (folder.checkpoints / ".step-000020.tmp").symlink_to(outside)
    (folder.checkpoints / ".step-000005.gone").mkdir()
    (folder.checkpoints / ".step-000005.gone" / "random-0.pt").touch()
    dead, elsewhere = mark_of(dead_pid), f"{dead_pid}-12-00000000"
    names = ("run.json", "config.json", "metrics.jsonl", "progress.json")
    left = [folder.path / f".{name}.{dead}.tmp" for name in names]
    left += [folder.bad / f".step-000003.npz.{dead}.tmp", folder.path / f".claim.0a1b.{dead}.dead"]
    kept = [folder.path / f".run.json.{owner}.tmp" for owner in (mark_of(os.getppid()), elsewhere, "12")]
    for path in (*left, *kept):
        path.write_text("{")
    old = folder.path / f".run.json.{elsewhere}-old.tmp"
    old.write_text("{")
    os.utime(old, (time.time() - 7200,) * 2)
    assert sorted(folder.half_written()) == sorted([*left, old])
    assert train_here(config)[0] == 0
    assert not [path for path in (*left, old) if path.exists()]
    assert all(path.exists() for path in kept)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-000005", "step-000010"]
    assert (outside / "mine").read_text() == "mine"


class Harm:
    """An object that a pickle may name: a function to be called with some arguments as it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def forge(path: Path, name: str, content: bytes) -> None:
    """Put something else into a checkpoint, under a manifest that is right."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


def pickled(value: object) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def forged_index(path: Path, how: str, harm: Harm) -> bytes:
    """An index that is read as torch reads one, and does harm then."""
    index = torch.distributed.checkpoint.FileSystemReader(path).read_metadata()
    (name, entry), *_ = index.state_dict_metadata.items()
    (part, place), *_ = index.storage_data.items()
    if how == "a call instead of it":
        return pickle.dumps(harm)
    if how == "a call in it":
        index.planner_data = harm
    if how == "an object among the tensors":  # torch loads it by torch.load(weights_only=False)
        index.state_dict_metadata[name] = BytesStorageMetadata()
    if how == "a file elsewhere":
        index.storage_data[part] = replace(place, relative_path="../../outside")
    if how == "another kind":
        index.state_dict_metadata[name] = replace(entry, size=torch.float32)
    return pickle.dumps(index)


def global_by_name(module: str, name: str) -> bytes:
    """A pickle of protocol 4 that calls what is found under a dotted name, as a class's method would be."""
    texts = (b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"\x80\x04" + b"".join(texts) + b"\x93)R."


CALLS = ["a call instead of it", "a call in it"]


@pytest.mark.parametrize("how", [*CALLS, "an object among the tensors", "a file elsewhere", "another kind"])
def test_nothing_that_a_forged_index_says_is_run(tmp_path, capsys, how):
    config, harm = tiny_config(tmp_path / "runs", train__bad_step="skip"), Harm(tmp_path / "harm")
    folder = train_here(config)[1]
    forge(last(folder), ".metadata", forged_index(last(folder), how, harm))
    verified(last(folder))
    folder.run_file.unlink()
    assert train_here(config)[0] == 1
    assert folder.record()["reason"].startswith(f"cannot read {last(folder) / '.metadata'}: it is no index of tensors")
    assert "Traceback" not in capsys.readouterr().err
    assert not harm.path.exists()


@pytest.mark.parametrize("name", ["random-0.pt", "__0_0.distcp"])
def test_nothing_that_a_forged_file_beside_it_says_is_run(tmp_path, capsys, name):
    config, harm = tiny_config(tmp_path / "runs"), Harm(tmp_path / "harm")
    folder = train_here(config)[1]
    forge(last(folder), name, pickled(harm))
    folder.run_file.unlink()
    assert train_here(config)[0] == 1
    assert folder.record()["reason"].startswith(f"cannot load checkpoint {last(folder)}: ")
    assert "Traceback" not in capsys.readouterr().err
    assert not harm.path.exists()


@pytest.mark.parametrize(("keys", "place"), [(624, 10**9), (624, -1), (3, 0)])
def test_random_numbers_are_not_read_from_elsewhere(tmp_path, keys, place):
    """NumPy takes any place in its state, and would end the process."""
    content, checkpoints = {"model": {}}, Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(content, TrainState(step=1))
    streams = {**random_streams(), "numpy": ["MT19937", [1] * keys, place, 0, 0.0]}
    forge(checkpoints.path(1), "random-0.pt", pickled(streams))
    with pytest.raises(RunnerError, match="it is no state of NumPy's generator"):
        checkpoints.restore(checkpoints.path(1), content)


def test_what_an_index_may_name_has_no_way_out(tmp_path):
    """No attribute of what is admitted is reached, and none of it is called, changed or kept."""
    attempts = [
        global_by_name("torch", "Size.__class__"),
        global_by_name("torch", "serialization.os.getcwd"),
        global_by_name("torch.serialization", "os.getcwd"),
        global_by_name("pathlib", "PosixPath.cwd"),
        global_by_name("builtins", "getattr"),
        # The class itself is given a state, as the second of two, by which pickle sets attributes.
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}Vspoilt\nI1\nstb.",
    ]
    for attempt in attempts:
        (tmp_path / ".metadata").write_bytes(attempt)
        with pytest.raises(CheckpointError, match="it is no index of tensors"):
            TensorReader(tmp_path)
    assert not hasattr(Metadata, "spoilt")


def test_a_damaged_index_is_one_line_however_it_is_damaged(tmp_path):
    checkpoints, chance = Checkpoints(tmp_path, keep_last=1), random.Random(0)
    content = {"model": {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}}
    checkpoints.save(content, TrainState(step=1))
    path = checkpoints.path(1)
    for name, times in ((".metadata", 80), ("__0_0.distcp", 30), ("random-0.pt", 10)):
        sound = (path / name).read_bytes()
        for _ in range(times):
            spoilt = bytearray(sound)
            for _ in range(chance.randint(1, 3)):
                spoilt[chance.randrange(len(sound))] = chance.randrange(256)
            forge(path, name, bytes(spoilt))
            with suppress(RunnerError):
                checkpoints.restore(path, content)
        forge(path, name, sound)
    checkpoints.restore(path, content)


@pytest.mark.parametrize("content", ["objects", "other numbers", "no such step"])
def test_a_forged_batch_is_one_line(tmp_path, content):
    folder = RunFolder(tmp_path)
    folder.create(tiny_config(tmp_path))
    folder.bad.mkdir()
    path = folder.bad / "step-000003.npz"
    reading = {"step": 3, "loss": 1.0, "grad_norm": 1.0, "bad": True}
    batch = np.zeros((2, 4), dtype=np.int64)
    if content == "objects":
        np.savez(path, tokens=np.array([Harm(tmp_path / "harm")]), targets=batch, **reading, allow_pickle=True)
    elif content == "other numbers":
        np.savez(path, tokens=np.zeros(3), targets=batch, **reading)
    else:
        np.savez(path, tokens=batch, targets=batch, **{**reading, "step": 10**9})
    with pytest.raises(RunnerError, match=r"step-000003\.npz is (not the batch of a bad step|of step 1000000000)"):
        replay(path)
    assert not (tmp_path / "harm").exists()
