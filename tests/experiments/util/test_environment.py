from __future__ import annotations

import hashlib
import subprocess

import pytest

from experiments.util import environment
from experiments.util.environment import code_version


@pytest.fixture
def repository(tmp_path, monkeypatch):
    root = tmp_path / "repository"
    root.mkdir()
    monkeypatch.setattr(environment, "ROOT", root)
    git(root, "init", "-q")
    (root / "kept.py").write_text("a = 1\n")
    (root / ".gitignore").write_text("ignored.py\n")
    git(root, "add", ".")
    git(root, "-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "first")
    return root


def git(root, *arguments):
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True).stdout


def test_the_diff_makes_the_tracked_code_again_and_untracked_files_are_known_by_their_hashes(repository):
    (repository / "kept.py").write_text("a = 2\n")
    files = {"secrets.yaml": b"password: hunter2\n", "deep/new.py": b"x = 1\n", "bytes": b"\xff\xfe"}
    for name, content in files.items():
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(content)
    (repository / "ignored.py").write_text("ignored")
    (repository / "link").symlink_to("/etc/passwd")
    before = git(repository, "status", "--porcelain")
    code, diff, _ = code_version()
    assert git(repository, "status", "--porcelain") == before
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert {name: entry.get("sha256") for name, entry in code["untracked"].items()} == {**hashes, "link": None}
    assert "hunter2" not in diff
    git(repository, "clean", "-fdxq")
    git(repository, "checkout", "-q", ".")
    subprocess.run(["git", "-C", str(repository), "apply"], input=diff.encode(), check=True)
    assert (repository / "kept.py").read_text() == "a = 2\n"


def test_large_untracked_files_are_known_by_their_size(repository, monkeypatch):
    monkeypatch.setattr(environment, "HASHED_BYTES", 100)
    for name in ("a.bin", "b.bin"):
        (repository / name).write_bytes(bytes(60))
    a, b = code_version()[0]["untracked"].values()
    assert (a["bytes"], b) == (60, {"bytes": 60})
    assert len(a["sha256"]) == 64


def test_a_diff_is_no_more_open_than_the_files_it_shows_and_holds_no_keys(repository):
    (repository / "kept.py").write_text("key = 'sk-abcdefghijklmnopqrstuvwx'\n")
    (repository / "kept.py").chmod(0o640)
    code, diff, mode = code_version()
    assert mode == 0o640
    assert "+key = '***'" in diff
    assert code["masked"]


def test_unchanged_code_has_no_diff(repository):
    code, diff, mode = code_version()
    assert (code["dirty"], diff, "untracked" in code, mode) == (False, "", False, 0o666)
