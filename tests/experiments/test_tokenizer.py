"""The command that trains a tokenizer: what it writes, and what it refuses."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from experiments import tokenizer
from experiments.tasks.text import Text, TextConfig


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["tokenizer", *map(str, arguments)])
    return tokenizer.main()


@pytest.fixture
def notes(tmp_path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for i in range(50):
        words = random.Random(i).choices(["alpha ", "beta ", "gamma\n", "δέλτα "], k=100)
        (folder / f"{i}.md").write_text("".join(words), encoding="utf-8")
    return folder


def test_it_is_trained_on_training_documents_and_never_written_over(notes, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "tokenizer.json"
    assert run(monkeypatch, notes, "--vocab-size", 270, "--out", out, "--held-out", 0.2) == 0
    task = Text(TextConfig(path=str(notes), tokenizer=str(out), length=16, held_out=0.2))
    size = task.sources[0].streams["train"].bytes
    assert f"270 tokens from {size:,} bytes of training text" in capsys.readouterr().out
    assert task.vocab_size == 270
    assert task.tokenizer.tokens.separator == 0
    assert task.bytes_per_token > 1.5
    before = out.read_bytes()
    assert run(monkeypatch, notes, "--vocab-size", 265, "--out", out) == 1
    assert "is there already; --again writes over a file" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert run(monkeypatch, notes, "--vocab-size", 265, "--out", out, "--again", "--bytes", 3000) == 0
    assert out.read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--vocab-size", 256], "--vocab-size must be at least 257, got 256"),
        (["--vocab-size", 300, "--bytes", 0], "--bytes must be at least 1, got 0"),
        (["--vocab-size", 99999], "the text has pairs for [0-9]+ tokens only, and 99999 are asked for"),
        (["--vocab-size", 300, "--extensions", ".rst"], "no file of .* ends with .rst"),
    ],
)
def test_what_cannot_be_is_one_line(notes, tmp_path, monkeypatch, capsys, arguments, reason):
    assert run(monkeypatch, notes, "--out", tmp_path / "it.json", *arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(reason, error)
    assert not (tmp_path / "it.json").exists()
