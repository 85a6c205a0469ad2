"""Documents streamed: each row goes through documents from end to end, in an order that seed and number give."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from experiments.tasks import text_stream
from experiments.tasks.task import TaskError
from experiments.tasks.text import Text, TextConfig

SEPARATOR, LENGTH, ROWS = 256, 32, 4


def write(folder: Path, count: int, size: int, mark: str = "") -> Path:
    """Documents of which no two share a stretch."""
    folder.mkdir(parents=True)
    for number in range(count):
        words = random.Random(f"{mark}{number}").choices("abcdefgh\n", k=size + 11 * number)
        (folder / f"{number}.txt").write_text(mark + "".join(words))
    return folder


def made(tmp_path: Path, **options: object) -> Text:
    small = {"length": LENGTH, "validation_tokens": 64, "test_tokens": 64, "held_out": 0.1}
    return Text(TextConfig(**{**small, "documents": "streamed", "data_cache": str(tmp_path / "cache"), **options}))


def turn(task: Text, seed: int = 0, number: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What each row reads in a pass, ``[rows, tokens]``, and where a text begins in it."""
    whole = sum(source.streams["train"].count for source in task.sources)
    count = whole // (ROWS * LENGTH)
    batches = [task.continued_batch(seed, count * number + i, ROWS, 0, ROWS) for i in range(count)]
    tokens, targets, begins = (np.concatenate([b[i] for b in batches], axis=1) for i in (0, 1, 4))
    assert np.array_equal(tokens[:, 1:], targets[:, :-1])
    return tokens, begins


def documents(task: Text) -> list[bytes]:
    return [b"\0" + each for each in task.training_texts()]


def read(tokens: np.ndarray, begins: np.ndarray) -> list[bytes]:
    """The texts of a row, each as it begins; a separator is a zero byte."""
    parts = np.split(tokens, np.flatnonzero(begins)[1:])
    return [np.where(part == SEPARATOR, 0, part).astype(np.uint8).tobytes() for part in parts]


@pytest.mark.parametrize("most", [1 << 16, 8])
def test_rows_read_every_document_once_in_a_pass_from_end_to_end(tmp_path, monkeypatch, most):
    """In whole stretches of documents too, where these are many."""
    monkeypatch.setattr(text_stream, "MOST", most)
    task = made(tmp_path, path=str(write(tmp_path / "texts", 60, 40)))
    shuffled = text_stream.stretches(task.sources[0].streams["train"].begins())
    assert len(shuffled.sizes) == min(most, len(documents(task)))
    orders = []
    for number in range(2):
        tokens, begins = turn(task, number=number)
        assert begins[:, 0].all()
        texts = [read(*row) for row in zip(tokens, begins, strict=True)]
        inner = [text for row in texts for text in row[1:-1]]
        assert set(inner) <= set(documents(task))
        assert len(set(inner)) == len(inner) >= len(documents(task)) - 2 * ROWS
        # What a row begins or ends within is a part of a document too, and all but a rest of a window is read.
        ends = [text for row in texts for text in (row[0], row[-1])]
        assert all(any(part in each for each in documents(task)) for part in ends)
        assert tokens.size > sum(map(len, documents(task))) - ROWS * LENGTH
        orders.append(inner)
    assert orders[0] != orders[1]


def test_a_row_is_a_function_of_seed_row_and_number(tmp_path):
    folder = str(write(tmp_path / "texts", 40, 40))
    task, again = made(tmp_path, path=folder), made(tmp_path, path=folder)
    for number in (70, 3):
        whole = task.continued_batch(5, number, ROWS, 0, ROWS)
        for part in (again.continued_batch(5, number, ROWS, 1, 2), whole.rows(slice(1, 3))):
            for name in ("tokens", "targets", "begins"):
                assert np.array_equal(getattr(whole, name)[1:3], getattr(part, name))
        assert not np.array_equal(whole.tokens, task.continued_batch(6, number, ROWS, 0, ROWS).tokens)


def test_one_document_serves_all_rows(tmp_path):
    """Each from a place of its own on, in every pass from others; what wraps around the end is in two pieces."""
    walk = text_stream.Walk(0, [text_stream.stretches(np.array([0, 9000]))], [1.0], ROWS, LENGTH)
    count = 9000 // (ROWS * LENGTH)
    for turn in range(2):
        at = {row: [walk.window(row, turn * count + number) for number in range(count)] for row in range(ROWS)}
        assert [jumped for _, jumped in at[0]] == [True, *[False] * (count - 1)]
        read = [place for row in at.values() for pieces, _ in row for piece in pieces
                for place in range(piece.start, piece.end)]  # fmt: skip
        assert len(read) == ROWS * count * (LENGTH + 1)
        assert len(set(read)) >= ROWS * count * LENGTH
    first = {walk.window(0, turn * count)[0][0].start for turn in range(5)}
    assert len(first) == 5


def test_sources_have_their_shares_in_whole_documents(tmp_path):
    folders = [write(tmp_path / mark, count, 60, mark) for mark, count in (("x", 90), ("y", 30))]
    sources = [{"path": str(folder), "weight": weight} for folder, weight in zip(folders, (1, 3), strict=True)]
    with pytest.raises(TaskError, match=r"source 0 has a share of 3.3e-10 of the .* none of them; join it to another"):
        made(tmp_path, sources=[{**sources[0], "weight": 1e-9}, sources[1]]).continued_batch(0, 0, 1, 0, 1)
    task = made(tmp_path, sources=sources)
    texts = [text for number in range(6) for row in zip(*turn(task, number=number), strict=True)
             for text in read(*row)[1:-1]]  # fmt: skip
    assert set(texts) <= set(documents(task))
    sizes = {mark: sum(len(text) for text in texts if text.startswith(b"\0" + mark)) for mark in (b"x", b"y")}
    assert sizes[b"y"] / sum(sizes.values()) == pytest.approx(0.75, abs=0.03)
    counts = [texts.count(text) for text in documents(task) if text.startswith(b"\0y")]
    assert max(counts) - min(counts) <= 5


def test_text_that_is_too_short_for_every_row_is_one_clear_error(tmp_path):
    task = made(tmp_path, path=str(write(tmp_path / "texts", 20, 20)))
    with pytest.raises(TaskError, match=r"400 rows of 32 tokens, and the training split .* choose a smaller train"):
        task.continued_batch(0, 0, 400, 0, 400)
