"""Language modelling of text of one's own: what is read, packed, split, kept on disk and refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from experiments.tasks.task import IGNORED, TaskError
from experiments.tasks.text import Text, TextConfig
from experiments.tasks.text_files import source_files
from experiments.tasks.text_order import STRETCH, deal, dealt, key_of, keys, permuted, window_starts
from experiments.tasks.text_tokens import FileTokens, train_tokenizer
from tests.support.paths import ROOT

SEPARATOR = 256


def words(seed: int, size: int) -> str:
    """Lines of letters and of characters of two and three bytes, of which no two seeds share a stretch."""
    return "".join(random.Random(seed).choices("abcdefgh ä€\n", k=size))


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "texts", {f"part{i % 3}/{i}.txt": words(i, 100 + 20 * i) for i in range(60)})


def made(path: object, **options: object) -> Text:
    small = {"length": 32, "validation_tokens": 512, "test_tokens": 512, "held_out": 0.2}
    return Text(TextConfig(**{"path": str(path), **small, **options}))


def documents(task: Text, split: str) -> list[bytes]:
    """The documents in a split's token files, put together again."""
    found = []
    for source in task.sources:
        stream = source.streams[split]
        if not stream.count:
            continue
        tokens = stream.windows(np.zeros(1, np.int64), stream.count)[0]
        places = np.flatnonzero(tokens == SEPARATOR)
        assert np.array_equal(places, stream.begins()[:-1])
        found += [bytes(part[1:].astype(np.uint8)) for part in np.split(tokens, places[1:])]
    return found


def everything(task: Text) -> list[bytes]:
    return [content for split in ("train", "validation", "test") for content in documents(task, split)]


def refused(path: object, **options: object) -> str:
    with pytest.raises(TaskError) as error:
        made(path, **options).manifest()
    return str(error.value)


class TestDocuments:
    def test_every_file_is_a_document_in_the_split_of_its_hash(self, folder):
        task = made(folder)
        assert sorted(everything(task)) == sorted(path.read_bytes() for path in folder.rglob("*.txt"))
        assert all(len(documents(task, split)) > 3 for split in ("train", "validation", "test"))

    def test_documents_stay_in_their_splits_when_others_are_added_and_copies_follow_them(self, folder):
        before = {split: set(documents(made(folder), split)) for split in ("train", "validation", "test")}
        copied = next(iter(before["test"]))
        write(folder, {f"new{i}.txt": words(1000 + i, 300) for i in range(30)} | {"copy.txt": copied})
        task = made(folder)
        assert all(set(documents(task, split)) >= contents for split, contents in before.items())
        assert documents(task, "test").count(copied) == 2
        assert copied not in documents(task, "train") + documents(task, "validation")

    def test_rows_of_every_format_are_the_documents_that_they_say(self, tmp_path):
        rows = [words(i, 50 + i) for i in range(150)]
        table = pyarrow.table({"n": list(range(150)), "text": rows})
        saved = tmp_path / "saved" / "train"
        write(saved, {"state.json": json.dumps({"_data_files": [{"filename": "data-0.arrow"}]})})
        for name in ("data-0.arrow", "cache-1.arrow"):
            with pyarrow.ipc.new_stream(saved / name, table.schema) as writer:
                writer.write_table(table, max_chunksize=40)
        with pyarrow.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=40)
        parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=64)
        write(tmp_path, {"rows.jsonl": "\n\n".join(json.dumps({"n": 1, "text": row}) for row in rows)})
        for name in ("rows.jsonl", "rows.parquet", "file.arrow", "saved"):
            task = made(tmp_path / name)
            assert sorted(everything(task)) == sorted(row.encode() for row in rows), name
        assert "has no column 'body' but n, text; task.field names" in refused(tmp_path / "rows.parquet", field="body")
        write(tmp_path, {"bad.parquet": b"PAR1 and no more"})
        assert "bad.parquet cannot be read as .parquet" in refused(tmp_path / "bad.parquet")

    def test_long_documents_are_cut_at_line_ends_and_large_files_are_read_in_pieces(self, tmp_path):
        lines = words(0, 700_000)  # More than two pieces of a file.
        write(tmp_path, {"book.txt": lines, "line.txt": "ä€" * 300_000})
        (whole,) = everything(made(tmp_path / "book.txt", held_out=0.01))
        assert whole == lines.encode()
        (line,) = everything(made(tmp_path / "line.txt", held_out=0.01))
        assert line.decode() == "ä€" * 300_000
        parts = everything(made(tmp_path / "book.txt", cut=4096))
        assert sum(map(len, parts)) == len(lines.encode())
        assert all(part.endswith(b"\n") and part in whole for part in parts[:-1] if len(part) >= 4096)
        assert max(map(len, parts)) < 4096 + 500

    def test_which_files_a_source_is(self, tmp_path):
        names = ["a.txt", "b.md", "c.py", "sub/d.txt", "sub/deep/e.py", ".git/f.txt", ".g.txt"]
        write(tmp_path, dict.fromkeys(names, "text"))
        (tmp_path / "link").symlink_to(tmp_path / "sub")

        def found(path: str, *extensions: str) -> list[str]:
            return sorted(file.name for file in source_files(path, extensions or (".txt", ".md")))

        assert found(f"{tmp_path}") == ["a.txt", "b.md", "sub/d.txt"]
        assert found(f"{tmp_path}", ".py") == ["c.py", "sub/deep/e.py"]
        assert found(f"{tmp_path}/*.py") == ["c.py"]
        assert found(f"{tmp_path}/**/*.py") == ["c.py", "sub/deep/e.py"]
        assert found(f"{tmp_path}/sub/d.txt") == ["d.txt"]
        for path, reason in (("*.rst", "no file matches"), ("gone", "there is no such file or folder")):
            with pytest.raises(TaskError, match=reason):
                found(f"{tmp_path}/{path}")
        with pytest.raises(TaskError, match=r"ends with .rst \(2 of .txt, 2 of .py, 1 of .md\); choose others with"):
            found(f"{tmp_path}", ".rst")

    @pytest.mark.parametrize(
        ("bad", "reason"),
        [
            ({"bad.txt": b""}, "bad.txt is empty"),
            ({"bad.txt": b"abc\0def"}, "bad.txt is no text: byte 3 is zero"),
            ({"bad.txt": b"abc\xff"}, "bad.txt is no text in UTF-8: byte 3 cannot be read"),
            ({"bad.txt": "ab€".encode()[:-1]}, "bad.txt is no text in UTF-8: byte 2 cannot be read"),
            ({"bad.jsonl": '{"text": "a"}\n{"text": "a'}, "bad.jsonl, line 2, is no JSON"),
            ({"bad.jsonl": '{"body": "a"}'}, "line 1, has no 'text' but body; task.field names"),
            ({"bad.jsonl": '{"text": 7}'}, "line 1, has 7 as its text, and a text is wanted"),
            ({"bad.jsonl": '{"text": ""}'}, "line 1, is empty"),
            ({"bad.jsonl": '{"text": "a\\u0000"}'}, "line 1, is no text: it holds a zero byte"),
            ({"bad.jsonl": '{"text": "a\\ud800"}'}, "line 1, is no text: half of a surrogate pair"),
        ],
    )
    def test_what_is_no_text_is_named_or_left_out(self, folder, bad, reason):
        write(folder, bad)
        assert reason in (error := refused(folder))
        assert error.endswith("take it out, or leave out all such by task.unusable=skip")
        task = made(folder, unusable="skip")
        assert task.manifest()["left out as no text"] == "1 files and rows"
        assert len(everything(task)) >= 60


class TestExamples:
    def test_a_pass_takes_every_window_once_in_an_order_of_the_seed(self, folder):
        task = made(folder)
        stream = task.sources[0].streams["train"]
        count = (stream.count - 32) // 32
        tokens = stream.windows(np.zeros(1, np.int64), stream.count)[0].tolist()
        orders = []
        for seed, first in ((0, 0), (0, count), (1, 0)):
            starts = window_starts(key_of(seed, "source 0"), np.arange(first, first + count), stream.count, 32)
            assert np.array_equal(np.sort(starts), starts.min() + 32 * np.arange(count))
            batch = task.train_batch(seed, first, count)
            orders.append(starts.tolist())
            for row, start in zip(batch.tokens.tolist(), starts, strict=True):
                assert row == tokens[start : start + 32]
            assert np.array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        assert len({tuple(order) for order in orders}) == 3
        assert all(order != sorted(order) for order in orders)

    @pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000, 4097])
    def test_permutations_are_permutations_and_every_place_is_as_likely(self, count):
        by = keys(3, np.zeros(count, np.int64), 1)
        assert sorted(permuted(np.arange(count), count, by)) == list(range(count))
        found = permuted(np.zeros(4000, np.int64), count, keys(3, np.arange(4000), 1))
        if count <= 7:  # The chi-squared of 6 degrees of freedom is below 22.5 in 999 of 1000 cases.
            hits = np.bincount(found, minlength=count)
            assert ((hits - 4000 / count) ** 2 / (4000 / count)).sum() < 22.5

    def test_sources_have_the_shares_of_their_weights_and_each_is_read_in_order(self, tmp_path):
        counts = dealt([1.0, 2.0, 5.0])
        assert counts.tolist() == [512, 1024, 2560]
        source, within = deal(3, np.arange(2 * STRETCH), counts)
        for number, count in enumerate(counts):
            assert sorted(within[source == number]) == list(range(2 * count))
        assert (source[:100] != source[STRETCH : STRETCH + 100]).any()
        parts = [
            deal(3, np.arange(start, start + 100), counts)[0] for start in range(STRETCH - 150, STRETCH + 150, 100)
        ]
        assert np.array_equal(np.concatenate(parts), source[STRETCH - 150 : STRETCH + 150])
        for name, letter in (("a", "a"), ("b", "b")):
            write(tmp_path, {f"{name}/{i}.txt": letter * (200 + i) for i in range(40)})
        paths = [str(tmp_path / "a"), str(tmp_path / "b")]
        task = made("", sources=[{"path": paths[0], "weight": 3}, {"path": paths[1], "weight": 1}])
        share = (task.train_batch(0, 0, STRETCH).tokens == ord("a")).any(axis=1).mean()
        assert share == pytest.approx(0.75, abs=1e-3)
        validated = np.concatenate([batch.tokens for batch in task.evaluation("validation")])
        assert (validated == ord("a")).any(axis=1).mean() == pytest.approx(0.75)
        assert sum(task.shares) == pytest.approx(1)
        even = made("", sources=[{"path": path} for path in paths])
        assert even.shares == pytest.approx([0.5, 0.5], abs=0.1)
        with pytest.raises(TaskError, match="a source has less than 1/4096 of the examples; join it to another"):
            made("", sources=[{"path": paths[0], "weight": 1e6}, {"path": paths[1], "weight": 1}]).train_batch(0, 0, 1)

    def test_tests_read_windows_of_every_length_or_the_beginnings_of_documents(self, folder):
        task = made(folder, test_lengths=[64, 200])
        joined = b"".join(bytes([0]) + content for content in documents(task, "test"))
        for split, length in task.tests.items():
            rows = np.concatenate([batch.tokens for batch in task.evaluation(split)])
            assert rows.shape == (min(round(512 / length), (len(joined) - 1) // length), length)
            assert all(np.where(row == SEPARATOR, 0, row).astype(np.uint8).tobytes() in joined for row in rows)
        beginnings = made(folder, test_from="documents", test_lengths=[64, 200])
        contents = {content[:200] for content in documents(beginnings, "test")}
        batch = next(beginnings.evaluation("test_200"))
        assert (batch.tokens[:, 0] == SEPARATOR).all()
        assert {bytes(row.astype(np.uint8)) for row in batch.targets} <= contents
        assert "no test document has 9999 tokens" in refused(folder, test_from="documents", test_lengths=[9999])

    def test_separators_are_learnt_and_not_scored(self, folder):
        task = made(folder, validation_tokens=8192, test_tokens=8192)
        assert (task.train_batch(0, 0, 200).targets == SEPARATOR).any()
        for split in ("validation", "test"):
            batches = list(task.evaluation(split))
            assert (np.concatenate([batch.targets for batch in batches]) != SEPARATOR).all()
            assert (np.concatenate([batch.targets for batch in batches]) == IGNORED).any()

    def test_chance_is_that_of_frequencies(self, tmp_path):
        write(tmp_path, {f"{i}.txt": "".join(random.Random(i).choices("abcd", k=400)) for i in range(60)})
        value, label = made(tmp_path).chance()
        assert value == pytest.approx(2, abs=0.15)
        assert label == "token frequencies alone"


class TestTokenizers:
    @pytest.fixture
    def tokenizer(self, tmp_path) -> Path:
        content = train_tokenizer((words(i % 40, 500) for i in range(200)), 300, "<|endoftext|>")
        return write(tmp_path, {"tokenizer.json": content}) / "tokenizer.json"

    def test_documents_are_what_their_tokens_say(self, folder, tokenizer):
        task = made(folder, tokenizer=str(tokenizer), test_lengths=[64])
        read = task.tokenizer.tokens
        assert (task.vocab_size, read.separator, len(task.config.tokenizer_sha256)) == (300, 0, 64)
        contents, restored = [], []
        for split in ("train", "validation", "test"):
            stream = task.sources[0].streams[split]
            tokens = stream.windows(np.zeros(1, np.int64), stream.count)[0]
            parts = np.split(tokens, stream.begins()[1:-1])
            assert all(part[0] == 0 for part in parts)
            restored += [read._tokenizer.decode(part[1:].tolist()) for part in parts]
        contents = [path.read_bytes().decode() for path in folder.rglob("*.txt")]
        assert sorted(restored) == sorted(contents)
        assert task.bytes_per_token > 1.3
        uniform = task.score(np.ones((3, 32), int), np.full((3, 32), np.log(300)), np.zeros((3, 32), bool))
        assert uniform["bits_per_byte"] == pytest.approx(np.log2(300) / task.bytes_per_token)
        assert task.kept_files()["tokenizer.json"] == tokenizer.read_bytes()
        assert task.chance()[0] < uniform["bits_per_byte"]

    def test_names_of_special_tokens_in_a_text_are_text(self, tokenizer):
        tokens = FileTokens(tokenizer.read_bytes(), "<|endoftext|>", "it")
        (encoded,) = tokens.encode([b"a <|endoftext|> b"])
        assert 0 not in encoded
        assert tokens._tokenizer.decode(encoded.tolist()) == "a <|endoftext|> b"

    def test_another_tokenizer_than_the_run_has_is_refused(self, folder, tokenizer):
        config = made(folder, tokenizer=str(tokenizer)).config
        other = train_tokenizer((words(i % 30, 400) for i in range(100)), 290, "<|endoftext|>")
        tokenizer.write_text(other)
        with pytest.raises(TaskError, match=r"changed: it has 290 tokens .* and this run's has 300 and .* has a copy"):
            Text(config).manifest()
        with pytest.raises(ValueError, match=r"vocab_size is 300, and that of .* is 290"):
            replace(config, tokenizer_sha256="")
        tokenizer.unlink()
        assert Text(config).vocab_size == 300  # A run that is finished can still be read.
        with pytest.raises(TaskError, match=r"expected 'bytes' or the path of a tokenizer\.json"):
            Text(config).manifest()

    @pytest.mark.parametrize(
        ("content", "options", "reason"),
        [
            ("{}", {}, "is no tokenizer.json"),
            (None, {"separator": "</s>"}, "has no token '</s>' .* names one of its own: <.endoftext.>"),
            (None, {"tokenizer_sha256": "0" * 64}, "tokenizer_sha256 is '0+', and that of"),
        ],
    )
    def test_what_is_no_tokenizer_is_refused(self, tokenizer, content, options, reason):
        if content is not None:
            tokenizer.write_text(content)
        with pytest.raises(ValueError, match=reason):
            TextConfig(tokenizer=str(tokenizer), **options)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"path": "a", "sources": [{"path": "b"}]}, "path and sources are both given"),
        ({"sources": [{"pth": "b"}]}, r"sources\[0\] has the key 'pth', expected path, weight, field"),
        ({"sources": [{"weight": 2}]}, r"sources\[0\] has no path"),
        ({"sources": [{"path": "b", "weight": 0}]}, r"sources\[0\].weight must be positive and finite, got 0"),
        ({"sources": [{"path": 3}]}, r"sources\[0\].path is 3, expected text"),
        ({"sources": [{"path": "a", "weight": 1}, {"path": "b"}]}, "a weight is given for some and not for others"),
        ({"length": 0}, "length and test_lengths must be at least 1"),
        ({"test_lengths": [512]}, "length and test_lengths must be at least 1 and differ"),
        ({"validation_tokens": 0}, "validation_tokens must be at least 1"),
        ({"held_out": 0.5}, "held_out must be above 0 and below 0.5"),
        ({"cut": 3}, "cut must be 0 for never, or from 64 to 262144 bytes"),
        ({"path": "~/notes"}, "'~/notes' begins with a ~ that the shell did not replace"),
        ({"extensions": ["txt"]}, "extensions begin with a dot"),
        ({"tokenizer": "nowhere.json"}, "tokenizer nowhere.json: No such file"),
    ],
)
def test_impossible_options_are_refused(wrong, reason):
    with pytest.raises(ValueError, match=reason):
        TextConfig(**wrong)


def test_too_little_text_is_one_clear_error(folder):
    assert "no text is given: task.path=PATH" in refused("")
    (only,) = source_files(str(folder / "part0" / "57.txt"), [])
    assert "falls into the" in (error := refused(only.path, held_out=0.01))
    assert "cut long ones into documents of about 1,024 bytes by task.cut=1024" in error
    assert "length = 99999, and the train split of" in refused(folder, length=99999)
    assert "test_lengths = 99999, and the test split of" in refused(folder, test_lengths=[99999])


class TestCache:
    def test_tokens_are_made_once_and_again_when_a_file_changes(self, folder, tmp_path, capfd):
        options = {"data_cache": str(tmp_path / "cache")}
        first = made(folder, **options).manifest()
        assert "tokenised into" in capfd.readouterr().err
        for path in folder.rglob("*.txt"):  # Long ago, so that what is known of them is trusted.
            os.utime(path, (1e9, 1e9))
        assert made(folder, **options).manifest() == first
        assert made(folder, **options, length=48, test_lengths=[64]).manifest()["hash"] == first["hash"]
        assert "tokenised" not in capfd.readouterr().err
        assert sorted(path.name for path in (tmp_path / "cache").glob(".*")) == []
        (folder / "part0" / "0.txt").write_text("other " * 50)
        assert made(folder, **options).manifest()["hash"] != first["hash"]
        assert "tokenised into" in capfd.readouterr().err

    def test_what_was_damaged_is_made_again_and_what_is_somebody_elses_stays(self, folder, tmp_path):
        options = {"data_cache": str(tmp_path / "cache")}
        before = documents(made(folder, **options), "train")
        files = made(folder, **options).sources[0].token_files.folder
        content = bytearray((files / "train.tokens").read_bytes())
        content[5] ^= 1
        (files / "train.tokens").write_bytes(content)
        assert documents(made(folder, **options), "train") == before
        os.utime(files / "train.tokens")  # Other times, the same content.
        assert made(folder, **options).sources[0].token_files.folder == files
        (files / "train.tokens").write_bytes(b"")
        (files / "notes.txt").write_text("mine")
        with pytest.raises(Exception, match="is in the way and not made of token files alone; move it away"):
            made(folder, **options).manifest()
        assert (files / "notes.txt").read_text() == "mine"

    def test_a_token_file_that_is_cut_in_use_is_one_clear_error_and_one_that_is_removed_none(self, folder, tmp_path):
        task = made(folder, data_cache=str(tmp_path / "cache"))
        batch = task.train_batch(0, 0, 8)
        path = task.sources[0].token_files.folder / "train.tokens"
        path.rename(path.with_name("elsewhere"))
        assert np.array_equal(task.train_batch(0, 0, 8).tokens, batch.tokens)
        with open(path.with_name("elsewhere"), "r+b") as file:
            file.truncate(10)
        with pytest.raises(TaskError, match=r"ends before the tokens that it had; start the same command again"):
            task.train_batch(0, 0, 8)

    def test_a_file_that_vanishes_or_changes_while_it_is_read_is_named(self, folder, tmp_path):
        for change, reason in (
            (Path.unlink, r"cannot read .*41\.txt: No such file or directory"),
            (lambda path: path.write_text("other words"), r"41\.txt was changed while it was read"),
        ):
            task = made(folder, data_cache=str(tmp_path / "cache"))
            assert task.sources[0].digests
            change(folder / "part2" / "41.txt")
            with pytest.raises(TaskError, match=reason):
                task.manifest()
            write(folder, {"part2/41.txt": words(41, 920)})
        assert len(everything(made(folder))) == 60

    def test_two_processes_make_them_once_and_a_killed_one_leaves_nothing_that_counts(self, folder, tmp_path):
        cache = tmp_path / "cache"
        program = (
            "import sys; from experiments.tasks.text import Text, TextConfig\n"
            f"print(Text(TextConfig(path={str(folder)!r}, length=32, data_cache={str(cache)!r})).manifest()['hash'])"
        )
        slow = (
            "import os, signal; from experiments.tasks import token_cache\n"
            "token_cache._Writer.add = lambda self, batch: os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        run = {"cwd": ROOT, "capture_output": True, "text": True, "check": False}
        assert subprocess.run([sys.executable, "-c", slow + program], **run).returncode == -9
        assert len(list(cache.glob(".*.tmp"))) == 1
        both = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=-1, stderr=-1) for _ in range(2)]
        found = [process.communicate() for process in both]
        assert found[0][0] == found[1][0] != b""
        assert sum(error.count(b"tokenised into") for _, error in found) == 1
        assert list(cache.glob(".*")) == []
