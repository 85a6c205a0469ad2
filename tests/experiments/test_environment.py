from __future__ import annotations

import subprocess

import pytest

from experiments import environment
from experiments.environment import code_version


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


def test_the_diff_makes_the_code_again(repository):
    """From the commit, with files that were never added; the index stays as it is."""
    files = {"kept.py": "a = 2\n", "new.py": "x\n\n+y\n", "deep/er.cpp": "no end of line", "deep/empty.py": ""}
    files["old.sh"] = "one\r\ntwo\f\r\n"
    for name, text in files.items():
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(text.encode())
    (repository / "ignored.py").write_text("ignored")
    before = git(repository, "status", "--porcelain")
    code, diff = code_version()
    assert git(repository, "status", "--porcelain") == before
    assert code["untracked"] == ["deep/empty.py", "deep/er.cpp", "new.py", "old.sh"]
    assert "left_out" not in code
    git(repository, "clean", "-fdxq")
    git(repository, "checkout", "-q", ".")
    subprocess.run(["git", "-C", str(repository), "apply"], input=diff.encode(), check=True)
    assert {name: (repository / name).read_bytes().decode() for name in files} == files


def test_what_the_diff_does_not_hold_is_named(repository, monkeypatch):
    monkeypatch.setattr(environment, "DIFF_BYTES", 100)
    (repository / "a.py").write_text("a" * 60)
    (repository / "b.py").write_text("b" * 60)
    (repository / "c.py").write_bytes(b"\xff\xfe")
    (repository / "d.py").symlink_to("a.py")
    (repository / "secret.env").write_text("KEY=1")
    code, diff = code_version()
    assert code["left_out"] == ["b.py", "c.py", "d.py", "secret.env"]
    assert "a" * 60 in diff
    assert "KEY" not in diff


def test_unchanged_code_has_no_diff(repository):
    code, diff = code_version()
    assert (code["dirty"], diff, "untracked" in code) == (False, "", False)
