"""Runs on text of one's own: what their folders keep of it, and what happens when it changes or goes."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.config.schema import run_config, to_dict
from experiments.runs.folder import RunFolder
from experiments.sweeps.cleaning import IN_RUN
from experiments.tasks.text_tokens import train_tokenizer
from experiments.util.errors import ConfigError
from experiments.util.file_lists import listed_changes
from tests.support.runs import last, tiny_config, train_here


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text("".join(random.Random(i).choices("abcdefg \n", k=300)))
    return folder


def text_config(tmp_path: Path, texts: Path, **task: object):
    options = {"name": "text", "path": str(texts), "length": 16, "held_out": 0.2, "validation_tokens": 64}
    return tiny_config(tmp_path / "runs", task={**options, "test_tokens": 64, **task}, train__steps=4)


def test_a_run_keeps_its_tokenizer_and_the_list_of_its_files(tmp_path, texts):
    content = train_tokenizer((path.read_text() for path in texts.iterdir()), 280, "<|endoftext|>")
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(content)
    config = text_config(tmp_path, texts, tokenizer=str(tokenizer))
    code, folder = train_here(config)
    assert code == 0
    assert (folder.path / "tokenizer.json").read_text() == content
    lines = (folder.path / "data_files.txt").read_text().splitlines()
    assert len(lines) == 41
    file = texts / "7.txt"
    assert f"{hashlib.sha256(file.read_bytes()).hexdigest()} 300 {file}" in lines
    assert all(IN_RUN.fullmatch(path.name) for path in folder.path.iterdir() if path.is_file())
    assert config.model.options.vocab_size == 280
    # Elsewhere under another name it is the same run; another tokenizer makes another one.
    moved = tokenizer.rename(tmp_path / "other.json")
    assert text_config(tmp_path, texts, tokenizer=str(moved), data_cache="elsewhere").folder() == folder.path
    moved.write_text(train_tokenizer((path.read_text() for path in texts.iterdir()), 270, "<|endoftext|>"))
    assert text_config(tmp_path, texts, tokenizer=str(moved)).folder() != folder.path
    assert run_config(to_dict(config)) == config  # Though its file is gone.
    with pytest.raises(ConfigError, match=r"task: tokenizer: tokenizer .*tokenizer\.json: No such file"):
        text_config(tmp_path, texts, tokenizer=str(tokenizer))


def test_a_run_is_not_resumed_on_files_that_changed_and_they_are_named(tmp_path, texts):
    config = text_config(tmp_path, texts)
    code, folder = train_here(config)
    results = folder.record()["results"]
    assert code == 0
    folder.update(status="preempted")
    content = (texts / "7.txt").read_text()
    (texts / "7.txt").write_text(content + "more")
    (texts / "8.txt").rename(texts / "hidden")
    (texts / "new.txt").write_text("something else")
    assert train_here(config)[0] == 1
    reason = folder.record()["reason"]
    named = f"{texts}/7.txt changed (300 bytes, now 304), {texts}/8.txt is gone, {texts}/new.txt is new; bring the"
    assert named in reason
    assert last(folder).name == "step-000004"
    (texts / "7.txt").write_text(content)
    (texts / "hidden").rename(texts / "8.txt")
    (texts / "new.txt").unlink()
    assert train_here(config)[0] == 0
    assert folder.record()["results"] == results


def test_a_run_on_no_text_is_one_line_and_goes_on_when_the_text_is_there(tmp_path, texts, capsys):
    config = text_config(tmp_path, tmp_path / "later")
    code, folder = train_here(config)
    assert (code, folder.record()["reason"]) == (1, f"task text: {tmp_path}/later: there is no such file or folder")
    assert "Traceback" not in "".join(capsys.readouterr())
    texts.rename(tmp_path / "later")
    assert train_here(config)[0] == 0
    assert RunFolder(replace(config).folder()).status() == "finished"


def test_changes_of_lists_of_files():
    before = "aa 1 a b.txt\nbb 2 c.txt\ncc 3 d.txt\n"
    assert listed_changes(before, before) == []
    after = "aa 1 a b.txt\ndd 4 c.txt\nee 5 e.txt\n"
    assert listed_changes(before, after) == ["c.txt changed (2 bytes, now 4)", "d.txt is gone", "e.txt is new"]
