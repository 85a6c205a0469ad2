"""Corpora are fetched whole or not at all, by a stand-in for ``apt-get`` that has one package made here."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from experiments import corpora
from experiments.tasks.corpora import CORPORA, DOCUMENTS, cache_folder, read_corpus
from experiments.util import owned
from experiments.util.errors import RunnerError, StorageError
from tests.support.paths import ROOT
from tests.support.runs import command_line

NAME = "perl-doc"
TEXTS = {f"5.36/pod/page{i}.pod": f"=head1 Page {i}\n\n".encode() + bytes([97 + i]) * 300 * (i + 1) for i in range(12)}
APT_GET = """#!/bin/sh
echo "$@" >> "{log}"
case "$*" in *update*) exit {update};; esac
[ -e "{folder}/hang" ] && sleep 60
[ -e "{folder}/fail" ] && {{ echo "E: Unable to locate package {name}" >&2; exit 100; }}
sleep 0.2
cp "{folder}"/*.deb .
"""

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="makes a package by dpkg-deb")


def make_package(folder: Path, version: str, texts: dict[str, bytes]) -> Path:
    tree = folder / f"tree-{version}"
    for path, content in {**texts, "5.36/pod/none.pod": b"", "5.36/pod/binary.pod": b"\0", "5.36/x.pm": b"1;"}.items():
        (tree / CORPORA[NAME].root / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / CORPORA[NAME].root / path).write_bytes(content)
    (tree / CORPORA[NAME].root / "link.pod").symlink_to("/etc/passwd")
    (tree / "DEBIAN").mkdir()
    lines = {"Package": NAME, "Version": version, "Architecture": "all", "Maintainer": "n <n@n>", "Description": "d"}
    (tree / "DEBIAN" / "control").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    package = folder / f"{NAME}_{version}_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, package], check=True, capture_output=True)
    return package


@pytest.fixture
def mirror(tmp_path, monkeypatch) -> Path:
    """The folder from which the stand-in takes packages; files ``hang`` and ``fail`` in it say how it behaves."""
    folder, programs = tmp_path / "mirror", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    make_package(folder, "8.25", TEXTS)
    script = programs / "apt-get"
    script.write_text(APT_GET.format(log=tmp_path / "log", folder=folder, name=NAME, update=0))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def start(cache: Path, *words: str) -> subprocess.Popen[str]:
    command = command_line("experiments.corpora", "fetch", *words, NAME, "--cache", str(cache))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def test_a_package_becomes_documents_and_nothing_else_stays(mirror, tmp_path):
    cache = tmp_path / "cache"
    manifest = corpora.fetch(NAME, cache)
    documents, read = read_corpus(NAME, cache)
    assert documents == TEXTS
    assert manifest == read
    about = {"package": NAME, "version": "8.25", "architecture": "all", "files": 12, "left_out": 2}
    assert about.items() <= manifest.items()
    assert manifest["bytes"] == sum(map(len, TEXTS.values()))
    assert names(cache) == {NAME}
    assert names(cache / NAME) == {"owner.json", "manifest.json", "index.txt", DOCUMENTS}
    assert corpora.fetch(NAME, cache) == manifest
    assert (tmp_path / "log").read_text().count("download") == 1


def test_a_newer_version_takes_the_place_of_the_old_one_on_request(mirror, tmp_path):
    cache = tmp_path / "cache"
    before = corpora.fetch(NAME, cache)
    (mirror / f"{NAME}_8.25_all.deb").unlink()
    make_package(mirror, "2.0", {"5.38/pod/new.pod": b"new text"})
    assert corpora.fetch(NAME, cache) == before
    after = corpora.fetch(NAME, cache, again=True)
    assert (after["version"], read_corpus(NAME, cache)[0]) == ("2.0", {"5.38/pod/new.pod": b"new text"})
    assert names(cache) == {NAME}


@pytest.mark.parametrize("strange", ["notes.txt", f"{DOCUMENTS}/5.36/pod/mine.pod"])
def test_what_a_fetch_did_not_write_is_never_removed(mirror, tmp_path, strange):
    cache = tmp_path / "cache"
    corpora.fetch(NAME, cache)
    (cache / NAME / strange).write_text("of somebody else")
    with pytest.raises(StorageError, match=f"holds {strange}, which `fetch` did not write; nothing is removed"):
        corpora.fetch(NAME, cache, again=True)
    assert (cache / NAME / strange).read_text() == "of somebody else"
    assert names(cache) == {NAME}


def test_a_folder_of_somebody_else_stays(mirror, tmp_path):
    cache = tmp_path / "cache"
    (cache / NAME).mkdir(parents=True)
    (cache / NAME / "thesis.txt").write_text("mine")
    with pytest.raises(StorageError, match="is not a folder that `fetch` made; nothing is removed"):
        corpora.fetch(NAME, cache, again=True)
    (cache / f".{NAME}.1-2-abcdef01.tmp").mkdir()
    (cache / f".{NAME}.1-2-abcdef01.tmp" / "notes").write_text("mine")
    corpora.remove_leftovers(cache)
    assert {path.name for path in cache.rglob("*") if path.is_file()} == {"thesis.txt", "notes"}


def test_a_fetch_that_was_killed_is_repeated_cleanly(mirror, tmp_path):
    cache = tmp_path / "cache"
    (mirror / "hang").touch()
    process = start(cache)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (left,) = cache.iterdir()
    assert owned.maker(left, corpora.WORKSHOP) is not None
    (mirror / "hang").unlink()
    assert corpora.fetch(NAME, cache)["files"] == 12
    assert names(cache) == {NAME}


def test_two_at_once_do_not_collide(mirror, tmp_path):
    cache = tmp_path / "cache"
    for words in ([], ["--again"]):
        both = [start(cache, *words) for _ in range(2)]
        ended = [process.communicate(timeout=100) for process in both]
        assert [process.returncode for process in both] == [0, 0], ended
        assert read_corpus(NAME, cache)[0] == TEXTS
        assert names(cache) == {NAME}


def test_a_package_that_cannot_be_had_is_one_line_that_says_what_was_tried(mirror, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    (mirror / "fail").touch()
    monkeypatch.setattr("sys.argv", ["corpora", "fetch", NAME, "--cache", str(cache)])
    assert corpora.main() == 1
    failed = f"`apt-get download {NAME}`: exit code 100, E: Unable to locate package {NAME}"
    own = "any folder of files of your own does: task=corpus_text task.folder=PATH"
    why = f"cannot download the Debian package {NAME}. Tried {failed}; then {failed}. Without it, {own}"
    assert capsys.readouterr().err == f"error: corpus {NAME}: {why}\n"
    assert names(cache) == set()
    assert "update" in (tmp_path / "log").read_text()


def test_without_apt_get(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        RunnerError, match=r"Tried `apt-get download perl-doc`: No such file .* of Debian and its relatives"
    ):
        corpora.fetch(NAME, tmp_path / "cache")
    assert names(tmp_path / "cache") == set()


def test_a_damaged_package_is_one_clear_error(mirror, tmp_path):
    package = mirror / f"{NAME}_8.25_all.deb"
    package.write_bytes(package.read_bytes()[:-100])
    with pytest.raises(RunnerError, match=r"cannot unpack perl-doc_8\.25_all\.deb"):
        corpora.fetch(NAME, tmp_path / "cache")
    assert names(tmp_path / "cache") == set()


def test_the_commands_show_what_there_is(mirror, tmp_path, monkeypatch, capsys):
    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["corpora", *words])
        return corpora.main(), *capsys.readouterr()

    monkeypatch.setenv("SEQARCH_CORPORA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "seqarch" / "corpora"
    assert cache_folder() == cache
    assert call("path") == (0, f"{cache}\n", "")
    code, _, error = call("show", NAME)
    assert (code, error.startswith(f"error: corpus '{NAME}' is not in {cache}; fetch it with `python -m")) == (1, True)
    assert call("fetch", "perl")[::2] == (1, f"error: unknown corpus 'perl', {corpora.choices_hint('perl', CORPORA)}\n")
    assert call("fetch", NAME)[0] == 0
    code, shown, _ = call("list")
    assert code == 0
    assert all(name in shown for name in CORPORA)
    assert shown.count("8.25") == 1
    code, shown, _ = call("show", NAME)
    assert (code, "version: 8.25" in shown, "files of at least 4,096 bytes: 0" in shown) == (0, True, True)
    code, shown, error = call("baselines", NAME, "--length", "400", "--order", "3", "--train-bytes", "2000")
    assert (code, error) == (0, "")
    assert all(name in shown for name in ("gzip -9", "xz -9e", "xz -9e after 2,000 bytes", "3-grams of 2,000 bytes"))
    assert call("baselines", NAME, "--length", "99999")[::2] == (
        1,
        "error: task corpus_text: no test file has eval_length = 99999 bytes; choose fewer\n",
    )
