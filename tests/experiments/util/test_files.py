from __future__ import annotations

import errno
import os

import pytest

from experiments.util import files
from experiments.util.errors import RunnerError, StorageError
from experiments.util.files import read_json, write_atomic


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_atomic(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*run\.json: No space left on device"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"none/run\.json: No such file"):
        write_atomic(tmp_path / "none" / "run.json", "new")


def test_only_objects_are_read(tmp_path):
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(RunnerError, match="expected a JSON object, got list"):
        read_json(tmp_path / "list.json")
    assert read_json(tmp_path / "none.json") is None
