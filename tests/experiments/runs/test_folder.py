from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

from experiments.runs.folder import RunFolder
from experiments.runs.lock import STALE_SECONDS, Claim, ClaimLost, process_identity
from experiments.sweeps.status import SweepStatus
from experiments.util import files
from experiments.util.errors import ConfigError, RunnerError, StorageError
from experiments.util.files import read_json, write_atomic
from tests.support.runs import tiny_config


class TestFolder:
    def test_a_folder_with_the_same_configuration_is_welcome(self, tmp_path):
        config = tiny_config(tmp_path)
        folder = RunFolder(config.folder())
        folder.check(config)
        folder.create(config)
        folder.check(tiny_config(tmp_path, tracker__name="wandb"))
        assert folder.config() == config

    def test_a_folder_with_another_configuration_is_left_untouched(self, tmp_path):
        config = tiny_config(tmp_path)
        folder = RunFolder(config.folder())
        folder.create(config)
        before = folder.config_file.read_bytes()
        with pytest.raises(ConfigError, match=r"another configuration: train\.lr is 0\.001 there, 0\.5 wanted"):
            folder.check(tiny_config(tmp_path, train__lr=0.5))
        assert folder.config_file.read_bytes() == before

    def test_somebody_elses_folder_is_left_untouched(self, tmp_path):
        config = tiny_config(tmp_path)
        config.folder().mkdir(parents=True)
        (config.folder() / "notes.txt").write_text("mine")
        with pytest.raises(ConfigError, match=r"not empty and has no config\.json"):
            RunFolder(config.folder()).check(config)

    @pytest.mark.parametrize("left", [["checkpoints"], [".config.json.12.tmp"], ["checkpoints", ".config.json.12.tmp"]])
    def test_a_folder_half_made_is_made_whole(self, tmp_path, left):
        config = tiny_config(tmp_path)
        folder = RunFolder(config.folder())
        folder.path.mkdir(parents=True)
        for name in left:
            (folder.path / name).write_text("{") if name.endswith(".tmp") else (folder.path / name).mkdir()
        folder.check(config)
        folder.create(config)
        assert folder.config() == config
        assert folder.checkpoints.is_dir()

    def test_what_makes_no_other_run_of_it_is_as_last_asked_for(self, tmp_path):
        before, after = (tiny_config(tmp_path, train__keep_last=keep, machine__price_per_hour=keep) for keep in (2, 5))
        folder = RunFolder(before.folder())
        folder.create(before)
        folder.check(after)
        folder.create(after)
        assert folder.config() == after

    def test_checkpoints_without_a_configuration_are_left_untouched(self, tmp_path):
        config = tiny_config(tmp_path)
        folder = RunFolder(config.folder())
        folder.checkpoints.mkdir(parents=True)
        (folder.checkpoints / "mine").write_bytes(b"mine")
        with pytest.raises(ConfigError, match=r"not empty and has no config\.json"):
            folder.check(config)

    def test_a_wrong_key_in_a_stored_config_is_told_with_its_file(self, tmp_path):
        config = tiny_config(tmp_path)
        folder = RunFolder(config.folder())
        folder.create(config)
        folder.config_file.write_text(folder.config_file.read_text().replace('"lr"', '"lrr"'))
        for read in (folder.config, lambda: folder.check(config)):
            with pytest.raises(
                ConfigError, match=r"config\.json is damaged or of another version: train\.lrr: unknown"
            ):
                read()

    def test_a_file_where_the_folder_should_be(self, tmp_path):
        config = tiny_config(tmp_path)
        config.folder().parent.mkdir(parents=True)
        config.folder().write_text("")
        with pytest.raises(ConfigError, match="is a file"):
            RunFolder(config.folder()).check(config)
        with pytest.raises(StorageError, match=config.folder().name):
            RunFolder(config.folder()).create(config)

    def test_a_damaged_config_is_named(self, tmp_path):
        config = tiny_config(tmp_path)
        folder = RunFolder(config.folder())
        folder.create(config)
        folder.config_file.write_text("{")
        with pytest.raises(RunnerError, match=r"cannot read .*config\.json"):
            folder.check(config)

    def test_metrics_survive_a_line_cut_short(self, tmp_path):
        folder = RunFolder(tmp_path)
        folder.append_metrics(step=1, loss=2.0)
        folder.append_metrics(step=2, loss=1.0)
        with open(folder.metrics_file, "a") as file:
            file.write('{"step": 3, "lo')
        assert [line["step"] for line in folder.metrics()] == [1, 2]
        folder.keep_metrics(lambda line: line["step"] < 2)
        assert folder.metrics_file.read_text() == '{"step": 1, "loss": 2.0}\n'


class TestWriting:
    def test_a_full_disk_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "run.json"
        write_atomic(path, "old")

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(files.os, "fsync", full)
        with pytest.raises(StorageError, match=r"cannot write .*run\.json: No space left on device"):
            write_atomic(path, "new")
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_missing_folder_is_named(self, tmp_path):
        with pytest.raises(StorageError, match=r"none/run\.json: No such file"):
            write_atomic(tmp_path / "none" / "run.json", "new")

    def test_only_objects_are_read(self, tmp_path):
        (tmp_path / "list.json").write_text("[]")
        with pytest.raises(RunnerError, match="expected a JSON object, got list"):
            read_json(tmp_path / "list.json")
        assert read_json(tmp_path / "none.json") is None


@contextmanager
def renewed(path) -> Iterator[None]:
    """A claim that its holder renews, wherever that is."""
    over = threading.Event()

    def renew():
        while not over.wait(0.05):
            with suppress(FileNotFoundError):
                os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class TestClaim:
    def test_only_one_of_many_gets_it(self, tmp_path):
        def attempt(_):
            try:
                Claim(tmp_path / "claim.json").take()
            except RunnerError:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(attempt, range(32))) == 1

    def test_a_live_holder_is_named(self, tmp_path):
        claim = Claim(tmp_path / "claim.json")
        claim.take()
        with pytest.raises(RunnerError, match=f"process {os.getpid()} on {socket.gethostname()}"):
            claim.take()
        claim.release()
        claim.take()
        assert list(tmp_path.iterdir()) == [claim.path]

    def test_a_dead_process_holds_nothing(self, tmp_path, dead_pid):
        claim = Claim(tmp_path / "claim.json")
        claim.path.write_text(json.dumps({**process_identity(os.getpid()), "pid": dead_pid}))
        assert not claim.is_held()
        claim.take()
        assert read_json(claim.path)["pid"] == os.getpid()

    def test_a_later_process_with_the_same_number_holds_nothing(self, tmp_path):
        claim = Claim(tmp_path / "claim.json")
        claim.path.write_text(json.dumps({**process_identity(os.getpid()), "started": "1"}))
        claim.take()

    def test_another_machine_holds_it_while_it_renews(self, tmp_path):
        claim = Claim(tmp_path / "claim.json")
        claim.path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": "1"}))
        assert claim.is_held()
        with renewed(claim.path), pytest.raises(RunnerError, match="on elsewhere"):
            claim.take()
        old = time.time() - STALE_SECONDS - 1
        os.utime(claim.path, (old, old))
        assert not claim.is_held()
        os.utime(claim.path)
        assert claim.is_held()
        os.utime(claim.path, (old, old))
        claim.take()

    @pytest.mark.parametrize("ahead", [0, 1e6])
    def test_a_machine_that_went_down_a_moment_ago_is_waited_out(self, tmp_path, monkeypatch, capsys, ahead):
        """As when a scheduler starts its job again elsewhere at once: no sign of life comes, and the claim is stale.
        So it is with a clock that was ahead, and what is waited for is told.
        """
        monkeypatch.setattr("experiments.runs.lock.STALE_SECONDS", 0.6)
        claim = Claim(tmp_path / "claim.json")
        claim.path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": "1"}))
        os.utime(claim.path, (time.time() + ahead,) * 2)
        assert claim.is_held() == (ahead == 0)
        assert claim.stays_held(lambda: True)
        assert capsys.readouterr().err == ""
        with renewed(claim.path), pytest.raises(RunnerError, match="on elsewhere"):
            claim.take()
        os.utime(claim.path, (time.time() + ahead,) * 2)
        capsys.readouterr()
        claim.take()
        assert claim.is_own()
        told = f"waiting up to 0.6 s for a sign of life of process 1 on elsewhere, which claims {tmp_path}\n"
        assert capsys.readouterr().err == told

    @pytest.mark.parametrize("number", ["dead", "own"])
    def test_a_process_number_of_another_container_says_nothing(self, tmp_path, monkeypatch, dead_pid, number):
        """Under one host name: there a live process may have a number that is nobody's here, or somebody else's."""
        monkeypatch.setattr("experiments.runs.lock.STALE_SECONDS", 0.6)
        holder = process_identity({"dead": dead_pid, "own": os.getpid()}[number])
        claim = Claim(tmp_path / "claim.json")
        claim.path.write_text(json.dumps({**holder, "namespace": "pid:[1]"}))
        sweep = tmp_path / "sweep"
        SweepStatus(sweep).create()
        owner = {**(read_json(sweep / "owner.json") or {}), **holder, "namespace": "pid:[1]"}
        (sweep / "owner.json").write_text(json.dumps(owner))
        assert claim.is_held()
        assert not SweepStatus(sweep).is_abandoned()
        with renewed(claim.path), pytest.raises(RunnerError, match=f"by process {holder['pid']} on {holder['host']}"):
            claim.take()
        claim.take()
        assert claim.is_own()

    def test_a_machine_that_gets_another_name_keeps_its_claims(self, tmp_path, monkeypatch):
        claim = Claim(tmp_path / "claim.json")
        claim.take()
        monkeypatch.setattr("socket.gethostname", lambda: "renamed")
        claim.renew()
        assert claim.is_own()

    def test_a_claim_that_was_taken_over_is_neither_renewed_nor_released(self, tmp_path):
        folder = RunFolder(tmp_path)
        folder.claim.take()
        folder.claim.renew()
        other = json.dumps({"pid": 1, "host": "elsewhere", "started": "1"})
        folder.claim.path.write_text(other)
        folder.progress_file.write_text("{}")
        with pytest.raises(ClaimLost, match="taken over by process 1 on elsewhere"):
            folder.claim.renew()
        folder.claim.release()
        folder.leave()
        assert folder.claim.path.read_text() == other
        assert folder.progress_file.exists()

    def test_a_third_process_amid_a_takeover_keeps_its_claim(self, tmp_path, monkeypatch, dead_pid):
        """While this one looks at a dead claim, a second process replaces it, and a third claims the gap."""
        claim, rename = Claim(tmp_path / "claim.json"), os.rename
        claim.path.write_text(json.dumps({**process_identity(os.getpid()), "pid": dead_pid}))
        third = json.dumps({"pid": 3, "host": "elsewhere", "started": "3"})

        def amid(source, target):
            claim.path.write_text(json.dumps({"pid": 2, "host": "elsewhere", "started": "2"}))
            rename(source, target)
            claim.path.write_text(third)

        monkeypatch.setattr("experiments.runs.lock.os.rename", amid)
        with renewed(claim.path), pytest.raises(RunnerError, match="trained by process 3 on elsewhere"):
            claim.take()
        assert claim.path.read_text() == third
        assert list(tmp_path.iterdir()) == [claim.path]

    @pytest.mark.parametrize("pid", ['"12', '"many"', '"12"', "null", "[1]", "0", "-1", "1.5", "1e400", "9" * 30])
    def test_a_damaged_claim_holds_nothing(self, tmp_path, pid):
        claim = Claim(tmp_path / "claim.json")
        whole = json.dumps(process_identity(os.getpid()))
        claim.path.write_text(whole.replace(f'"pid": {os.getpid()}', f'"pid": {pid}'))
        assert not claim.is_held()
        claim.take()
        assert claim.is_own()


class TestStatus:
    def test_entries_come_in_the_order_of_jobs(self, tmp_path):
        sweep = SweepStatus(tmp_path / ".sweeps" / "now")
        sweep.create()
        for job in (10, 2):
            sweep.update(job, status="running", name="n")
        sweep.update(10, status="finished", name="n")
        (sweep.path / "job-3.json").write_text("{")
        assert [(entry["job"], entry["status"]) for entry in sweep.entries()] == [(2, "running"), (10, "finished")]
        sweep.remove()
        assert list(tmp_path.iterdir()) == []

    def test_jobs_stop_when_asked_or_when_the_sweep_is_gone(self, tmp_path, dead_pid):
        sweep = SweepStatus(tmp_path / "sweep")
        sweep.create()
        assert not SweepStatus(sweep.path).should_stop()
        SweepStatus(sweep.path).stop()
        assert SweepStatus(sweep.path).should_stop()
        orphaned = SweepStatus(tmp_path / "orphaned")
        orphaned.create()
        marker = orphaned.path / "owner.json"
        marker.write_text(json.dumps({**json.loads(marker.read_text()), "pid": dead_pid}))
        assert orphaned.should_stop()
        sweep.remove()
        assert SweepStatus(sweep.path).should_stop(), "a job that begins after the sweep is over"

    def test_a_launchers_logs_are_kept(self, tmp_path):
        sweep = SweepStatus(tmp_path / "now")
        sweep.create()
        (sweep.path / ".submitit").mkdir()
        sweep.remove()
        assert [path.name for path in sweep.path.iterdir()] == [".submitit"]
