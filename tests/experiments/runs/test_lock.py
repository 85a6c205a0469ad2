"""The lock of a run: one process holds it, and nobody waits for the dead."""

from __future__ import annotations

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
from experiments.runs.lock import STALE_SECONDS, LockLost, RunLock, process_identity
from experiments.sweeps.status import SweepStatus
from experiments.util.errors import RunnerError
from experiments.util.files import read_json


@contextmanager
def renewed(path) -> Iterator[None]:
    """A lock that its holder renews, wherever that is."""
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


def test_only_one_of_many_gets_it(tmp_path):
    def attempt(_):
        try:
            RunLock(tmp_path / "claim.json").acquire()
        except RunnerError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(32))) == 1


def test_a_live_holder_is_named(tmp_path):
    lock = RunLock(tmp_path / "claim.json")
    lock.acquire()
    with pytest.raises(RunnerError, match=f"process {os.getpid()} on {socket.gethostname()}"):
        lock.acquire()
    lock.release()
    lock.acquire()
    assert list(tmp_path.iterdir()) == [lock.path]


def test_a_dead_process_holds_nothing(tmp_path, dead_pid):
    lock = RunLock(tmp_path / "claim.json")
    lock.path.write_text(json.dumps({**process_identity(os.getpid()), "pid": dead_pid}))
    assert not lock.is_held()
    lock.acquire()
    assert read_json(lock.path)["pid"] == os.getpid()


def test_a_later_process_with_the_same_number_holds_nothing(tmp_path):
    lock = RunLock(tmp_path / "claim.json")
    lock.path.write_text(json.dumps({**process_identity(os.getpid()), "started": "1"}))
    lock.acquire()


def test_another_machine_holds_it_while_it_renews(tmp_path):
    lock = RunLock(tmp_path / "claim.json")
    lock.path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": "1"}))
    assert lock.is_held()
    with renewed(lock.path), pytest.raises(RunnerError, match="on elsewhere"):
        lock.acquire()
    old = time.time() - STALE_SECONDS - 1
    os.utime(lock.path, (old, old))
    assert not lock.is_held()
    os.utime(lock.path)
    assert lock.is_held()
    os.utime(lock.path, (old, old))
    lock.acquire()


@pytest.mark.parametrize("ahead", [0, 1e6])
def test_a_machine_that_went_down_a_moment_ago_is_waited_out(tmp_path, monkeypatch, capsys, ahead):
    """As when a scheduler starts its job again elsewhere at once: no sign of life comes, and the lock is stale.
    So it is with a clock that was ahead, and the wait is reported.
    """
    monkeypatch.setattr("experiments.runs.lock.STALE_SECONDS", 0.6)
    lock = RunLock(tmp_path / "claim.json")
    lock.path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": "1"}))
    os.utime(lock.path, (time.time() + ahead,) * 2)
    assert lock.is_held() == (ahead == 0)
    assert lock.stays_held(lambda: True)
    assert capsys.readouterr().err == ""
    with renewed(lock.path), pytest.raises(RunnerError, match="on elsewhere"):
        lock.acquire()
    os.utime(lock.path, (time.time() + ahead,) * 2)
    capsys.readouterr()
    lock.acquire()
    assert lock.is_own()
    message = f"waiting up to 0.6 s for a sign of life of process 1 on elsewhere, which holds the lock of {tmp_path}\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("number", ["dead", "own"])
def test_a_process_number_of_another_container_says_nothing(tmp_path, monkeypatch, dead_pid, number):
    """Under one host name: there a live process may have a number that is nobody's here, or somebody else's."""
    monkeypatch.setattr("experiments.runs.lock.STALE_SECONDS", 0.6)
    holder = process_identity({"dead": dead_pid, "own": os.getpid()}[number])
    lock = RunLock(tmp_path / "claim.json")
    lock.path.write_text(json.dumps({**holder, "namespace": "pid:[1]"}))
    sweep = tmp_path / "sweep"
    SweepStatus(sweep).create()
    owner = {**(read_json(sweep / "owner.json") or {}), **holder, "namespace": "pid:[1]"}
    (sweep / "owner.json").write_text(json.dumps(owner))
    assert lock.is_held()
    assert not SweepStatus(sweep).is_abandoned()
    with renewed(lock.path), pytest.raises(RunnerError, match=f"by process {holder['pid']} on {holder['host']}"):
        lock.acquire()
    lock.acquire()
    assert lock.is_own()


def test_a_machine_that_gets_another_name_keeps_its_locks(tmp_path, monkeypatch):
    lock = RunLock(tmp_path / "claim.json")
    lock.acquire()
    monkeypatch.setattr("socket.gethostname", lambda: "renamed")
    lock.renew()
    assert lock.is_own()


def test_a_lock_that_was_taken_over_is_neither_renewed_nor_released(tmp_path):
    folder = RunFolder(tmp_path)
    folder.lock.acquire()
    folder.lock.renew()
    other = json.dumps({"pid": 1, "host": "elsewhere", "started": "1"})
    folder.lock.path.write_text(other)
    folder.progress_file.write_text("{}")
    with pytest.raises(LockLost, match="taken over by process 1 on elsewhere"):
        folder.lock.renew()
    folder.lock.release()
    folder.leave()
    assert folder.lock.path.read_text() == other
    assert folder.progress_file.exists()


def test_a_third_process_amid_a_takeover_keeps_its_lock(tmp_path, monkeypatch, dead_pid):
    """While this one looks at a dead lock, a second process replaces it, and a third takes the gap."""
    lock, rename = RunLock(tmp_path / "claim.json"), os.rename
    lock.path.write_text(json.dumps({**process_identity(os.getpid()), "pid": dead_pid}))
    third = json.dumps({"pid": 3, "host": "elsewhere", "started": "3"})

    def amid(source, target):
        lock.path.write_text(json.dumps({"pid": 2, "host": "elsewhere", "started": "2"}))
        rename(source, target)
        lock.path.write_text(third)

    monkeypatch.setattr("experiments.runs.lock.os.rename", amid)
    with renewed(lock.path), pytest.raises(RunnerError, match="trained by process 3 on elsewhere"):
        lock.acquire()
    assert lock.path.read_text() == third
    assert list(tmp_path.iterdir()) == [lock.path]


@pytest.mark.parametrize("pid", ['"12', '"many"', '"12"', "null", "[1]", "0", "-1", "1.5", "1e400", "9" * 30])
def test_a_damaged_lock_holds_nothing(tmp_path, pid):
    lock = RunLock(tmp_path / "claim.json")
    whole = json.dumps(process_identity(os.getpid()))
    lock.path.write_text(whole.replace(f'"pid": {os.getpid()}', f'"pid": {pid}'))
    assert not lock.is_held()
    lock.acquire()
    assert lock.is_own()
