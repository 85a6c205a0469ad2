"""Language modelling of folders of one's own and of fetched corpora: what is read, split, left out and refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from experiments.tasks.byte_text import path_hash
from experiments.tasks.corpora import CORPORA, DOCUMENTS, INDEX, MANIFEST, documents_hash, index_of, read_corpus
from experiments.tasks.corpus_text import CorpusText, CorpusTextConfig, read_folder
from experiments.tasks.near_duplicates import copied_shares
from experiments.tasks.task import TaskError


def words(seed: int, size: int) -> bytes:
    """Text of which no two seeds share a stretch."""
    draw = random.Random(seed)
    return "".join(draw.choices("abcdefgh \n", k=size)).encode()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "texts", {f"part{i % 3}/{i}.txt": words(i, 300 + 40 * i) for i in range(60)})


def made(folder: Path, **options: object) -> CorpusText:
    return CorpusText(CorpusTextConfig(**{"folder": str(folder), "length": 64, "eval_length": 512, **options}))


def put_corpus(cache: Path, name: str, documents: dict[str, bytes]) -> Path:
    """A corpus as a fetch leaves it."""
    write(cache / name / DOCUMENTS, documents)
    (cache / name / INDEX).write_text(index_of(documents))
    about = {"package": name, "version": "1", "architecture": "all", "licence": "none", "files": len(documents)}
    (cache / name / MANIFEST).write_text(json.dumps({**about, "bytes": 1, "sha256": documents_hash(documents)}))
    return cache / name


def test_files_are_split_by_their_paths_and_more_of_the_long_ones_are_tests(folder):
    files = made(folder, held_out=0.2, held_out_long=0.5, eval_length=1000).files
    for split, contents in files.items():
        for path, content in contents.items():
            at = path_hash(path)
            share = 0.5 if len(content) >= 1000 else 0.2
            assert split == ("test" if at >= 1 - share else "validation" if at >= 0.8 - share else "train")
    assert sum(map(len, files.values())) == 60


def test_copies_of_training_files_are_not_tested_on(folder):
    before = made(folder)
    source = max(before.files["train"].values(), key=len)
    path, content = next(iter(before.files["test"].items()))
    (folder / path).write_bytes(source[: 3 * len(source) // 4] + content[: len(source) // 4])
    after = made(folder)
    assert path not in after.files["test"]
    assert after.files["train"] == before.files["train"]
    assert after.manifest()["left out as copies of training files"] == 1
    assert path in made(folder, most_copied=1.0).files["test"]


def test_shares_of_copies_are_measured():
    training = [words(0, 40_000), words(1, 40_000)]
    mixed = words(2, 10_000) + training[0][7_001:27_001] + words(3, 10_000)
    shares = copied_shares([training[1][5:20_005], mixed, words(4, 20_000), b"short"], training)
    assert shares == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=0.04)
    assert (shares[0], shares[2:]) == (1.0, [0.0, 0.0])


def test_the_files_of_a_folder_are_chosen_by_a_pattern(tmp_path):
    files = {"a.txt": b"1", "b.md": b"2", "sub/c.txt": b"3", "sub/deep/d.txt": b"4", ".git/e.txt": b"5", ".f.txt": b"6"}
    write(tmp_path, files)
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    assert set(read_folder(tmp_path, "*", "stop")[0]) == {"a.txt", "b.md", "sub/c.txt", "sub/deep/d.txt"}
    assert set(read_folder(tmp_path, "*.txt", "stop")[0]) == {"a.txt", "sub/c.txt", "sub/deep/d.txt"}
    assert set(read_folder(tmp_path, "sub/*.txt", "stop")[0]) == {"sub/c.txt"}
    assert set(read_folder(tmp_path, "sub/**/*.txt", "stop")[0]) == {"sub/c.txt", "sub/deep/d.txt"}
    assert read_folder(tmp_path, "*.md", "stop") == ({"b.md": b"2"}, 0)


@pytest.mark.parametrize(
    ("bad", "reason"), [(b"", "bad.txt is empty"), (b"a\0b", "bad.txt is no text: it holds a zero byte")]
)
def test_unusable_files_are_named_or_skipped(folder, bad, reason):
    write(folder, {"bad.txt": bad})
    with pytest.raises(TaskError, match=f"{reason}; leave it out by task.glob, or all such by task.unusable=skip"):
        made(folder).manifest()
    skipping = made(folder, unusable="skip")
    assert "bad.txt" not in skipping.files["train"]
    assert skipping.manifest()["skipped as empty or no text"] == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"glob": "*.rst"}, "no file of .* that can be read matches glob = '\\*.rst'"),
        ({"length": 100_000}, "length = 100000, and the longest training file has 2[0-9]+ bytes"),
        ({"eval_length": 100_000}, "no test file has eval_length = 100000 bytes; choose fewer"),
        ({"glob": "0.txt"}, "no (file is in the train split|validation file has any bytes|test file has)"),
        ({"sha256": "0" * 16}, "texts is another than the one asked for: it hashes to [0-9a-f]{16}"),
    ],
)
def test_a_folder_that_does_not_do_is_one_clear_error(folder, options, reason):
    with pytest.raises(TaskError, match=reason):
        made(folder, **options).manifest()


def test_a_folder_that_is_empty_or_not_there_is_named(tmp_path):
    with pytest.raises(TaskError, match="nowhere: there is no such folder"):
        made(tmp_path / "nowhere").manifest()
    with pytest.raises(TaskError, match=r"no file of .* that can be read"):
        made(tmp_path).manifest()


@pytest.mark.parametrize(
    "wrong",
    [
        *({"corpus": "linux"}, {"sha256": "xyz"}, {"held_out": 0.5}, {"held_out_long": 0.0}, {"most_copied": 1.1}),
        *({"glob": ""}, {"validation_files": 0}, {"length": 0}, {"from_start": 2.0}),
    ],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CorpusTextConfig(**wrong)


def test_a_corpus_is_read_as_it_was_fetched_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("SEQARCH_CORPORA", str(tmp_path))
    name = next(iter(CORPORA))
    task = CorpusText(CorpusTextConfig(corpus=name, length=64, eval_length=300))
    with pytest.raises(
        TaskError, match=rf"{name}' is not in .*; fetch it with `python -m experiments.corpora fetch {name}`"
    ):
        task.manifest()
    documents = {f"a/{i}.txt": words(i, 400) for i in range(40)}
    place = put_corpus(tmp_path, name, documents)
    manifest = task.manifest()
    assert (manifest["version"], manifest["sha256"]) == ("1", documents_hash(documents))
    assert CorpusText(CorpusTextConfig(corpus=name, length=64, sha256=manifest["sha256"][:12])).read()["train"]
    other = CorpusText(CorpusTextConfig(corpus=name, sha256="0" * 64))
    with pytest.raises(TaskError, match=f"corpus '{name}' is another than the one asked for"):
        other.read()
    (place / DOCUMENTS / "a/3.txt").write_bytes(b"changed")
    with pytest.raises(TaskError, match=f"corpus '{name}' in .* changed since it was fetched.*fetch --again {name}"):
        read_corpus(name, tmp_path)
    (place / DOCUMENTS / "a/3.txt").unlink()
    with pytest.raises(TaskError, match=r"cannot read .*a/3.txt .*fetch it anew"):
        read_corpus(name, tmp_path)
    (place / MANIFEST).write_text("{}")
    with pytest.raises(TaskError, match="is no manifest of a corpus"):
        read_corpus(name, tmp_path)
