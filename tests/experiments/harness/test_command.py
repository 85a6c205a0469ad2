"""``seqarch lm-eval`` from a run that is trained here to its report, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from experiments import lm_eval
from experiments.harness.tokenizer_folder import write_tokenizer
from experiments.report.write import report
from experiments.runs.folder import RunFolder
from experiments.util.errors import RunnerError
from seqarch import LanguageModel
from seqarch.checkpoints.tokenizers import ByteTokenizer
from tests.experiments.harness.conftest import KINDS, SENTENCES
from tests.support.runs import tiny_config, train_here


def command(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["seqarch lm-eval", *map(str, arguments)])
    return lm_eval.main()


@pytest.fixture(scope="module")
def trained(tokenizer_file, tmp_path_factory) -> Path:
    """The folder of a run on the sentences, with a tokenizer of its own."""
    place = tmp_path_factory.mktemp("lm_eval_run")
    (place / "texts").mkdir()
    for i in range(40):
        (place / "texts" / f"{i}.md").write_text(" ".join([f"text {i}.", *SENTENCES[i % 6 :], *SENTENCES]))
    task = {"name": "text", "path": str(place / "texts"), "tokenizer": str(tokenizer_file), "length": 32}
    task |= {"held_out": 0.4, "validation_tokens": 64, "test_tokens": 64}
    model = {"name": "mamba2", "pattern": "mamba2", "d_model": 64, "depth": 1, "channel": "none"}
    code, folder = train_here(tiny_config(place / "runs", task=task, model=model, train__steps=40, train__lr=1e-2))
    assert code == 0
    return folder.path


@pytest.fixture
def run(trained, tmp_path) -> RunFolder:
    """A copy that a test may change."""
    place = tmp_path / "runs" / trained.parent.name
    return RunFolder(shutil.copytree(trained, place / trained.name))


def test_a_runs_scores_are_kept_with_it_and_shown_by_its_report(run, tasks, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "scores.json"
    given = ("--model", run.path, "--include-path", tasks)
    assert command(monkeypatch, *given, "--tasks", *KINDS, "--out", out) == 0
    shown = capsys.readouterr().out
    (line,) = run.lm_eval()
    assert json.loads(out.read_text()) == line
    assert line["checkpoint"] == run.record()["results"]["checkpoint"]
    assert {name: task["texts"] for name, task in line["tasks"].items()} == dict.fromkeys(KINDS, 6)

    model = LanguageModel.from_pretrained(run.path)
    nats = texts_bytes = 0
    for text in SENTENCES:
        tokens = torch.tensor([[0, *model.tokenizer.encode(text)]])
        nats += float(model.loss(tokens[:, :-1], tokens[:, 1:], reduction="sum").detach())
        texts_bytes += len(text)
    found = line["tasks"]["whole_text"]["metrics"]["bits_per_byte"]
    assert found["value"] == pytest.approx(nats / texts_bytes / 0.6931471805599453, rel=1e-4)
    assert (found["higher_is_better"], found["stderr"]) == (False, None)
    assert f"| whole_text | 6 | 0 | bits_per_byte | {found['value']:.4f} |" in shown

    before = run.lm_eval_file.read_text()
    assert command(monkeypatch, *given, "--tasks", "next_word", "--limit", 4, "--num-fewshot", 1) == 0
    assert run.lm_eval_file.read_text().startswith(before)
    second = run.lm_eval()[1]["tasks"]["next_word"]
    assert (second["texts"], second["shots"]) == (4, 1)
    target, *_ = report(run.path.parent)
    page = (target / "index.md").read_text()
    accuracy = line["tasks"]["next_word"]["metrics"]["acc"]["value"]
    assert f"| next_word | acc | 0 | 6 | {accuracy:.3f} |" in page
    assert f"| next_word | acc | 1 | 4 | {second['metrics']['acc']['value']:.3f} |" in page


def test_lengths_of_made_texts_reach_their_task(run, tmp_path, monkeypatch, capsys):
    """As those of RULER do, with a folder from which they read the model's tokenizer."""
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "made_texts.py").write_text(
        "import datasets, transformers\n"
        "def make(max_seq_lengths, tokenizer, **_):\n"
        "    encode = transformers.AutoTokenizer.from_pretrained(tokenizer)\n"
        "    print(max_seq_lengths, encode('after beta')['input_ids'])\n"
        "    rows = [{'text': 'beta ' * length} for length in max_seq_lengths]\n"
        "    return {'test': datasets.Dataset.from_list(rows)}\n"
    )
    (folder / "made.yaml").write_text(
        "task: made\ncustom_dataset: !function made_texts.make\ntest_split: test\n" + KINDS["whole_text"]
    )
    given = ("--model", run.path, "--tasks", "made", "--include-path", folder)
    assert command(monkeypatch, *given, "--max-seq-lengths", 20, 60) == 0
    tokens = LanguageModel.from_pretrained(run.path).tokenizer.encode("after beta")
    assert f"[20, 60] {tokens}\n" in capsys.readouterr().out
    assert run.lm_eval()[0]["max_seq_lengths"] == [20, 60]


def test_a_tokenizer_of_bytes_counts_bytes(tmp_path):
    import transformers

    model = LanguageModel(vocab_size=256, d_model=16, pattern="attention", depth=1)
    model.tokenizer = ByteTokenizer()
    write_tokenizer(model, tmp_path)
    read = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    text = "naïve\n \x00 日本"
    assert len(read(text)["input_ids"]) == len(text.encode())
    assert read.decode(read(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"--tasks": "nextword"}, r"no task, group or tag 'nextword'; the nearest are next_word"),
        ({"--model": "nowhere"}, r"nowhere is no model's folder: there is no such folder"),
        ({"--limit": 0}, "--limit must be above 0, got 0"),
        ({"--batch-size": 0}, "--batch-size must be at least 1, got 0"),
        ({"--include-path": "nowhere"}, "nowhere is no folder; --include-path names one"),
        ({"--device": "gpu9"}, "to --device gpu9: "),
        ({"--max-length": 4}, r"a request of \d+ tokens is longer than the 4 that the model reads"),
        ({"--out": "there"}, "there is there already; give another name"),
        ({"--tasks": "gone"}, r"lm-eval cannot run gone: .*gone\.jsonl"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_kept(changes, reason, run, tasks, tmp_path, monkeypatch, capsys):
    own = shutil.copytree(tasks, tmp_path / "tasks")
    (own / "gone.yaml").write_text(
        (own / "next_word.yaml").read_text().replace("next_word", "gone").replace("texts.j", "gone.j")
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    from experiments.harness import evaluate

    monkeypatch.setattr(evaluate, "TaskManager", quick_manager(evaluate.TaskManager))
    options = {"--model": run.path, "--tasks": "next_word", "--include-path": own, **changes}
    assert command(monkeypatch, *(word for pair in options.items() for word in pair)) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert re.search(reason, error[0])
    assert not run.lm_eval()


def quick_manager(real):
    """Without the harness's own 14,000 tasks, whose listing takes seconds."""
    return lambda include_path=None, include_defaults=True, metadata=None: real(
        include_path=include_path, include_defaults=False, metadata=metadata
    )


def test_a_model_without_a_tokenizer_and_a_missing_package_are_named(theirs, tasks, tmp_path, monkeypatch, capsys):
    bare = shutil.copytree(theirs, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    given = ("--model", bare, "--tasks", "next_word", "--include-path", tasks)
    assert command(monkeypatch, *given) == 1
    assert f"error: {bare} has no tokenizer" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "experiments.harness.adapter", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)
    assert command(monkeypatch, *given) == 1
    assert "pip install 'seqarch[lm-eval]'" in capsys.readouterr().err


def test_a_line_that_was_cut_by_a_crash_is_named_and_costs_no_other(run):
    run.append_lm_eval({"tasks": {"a": {}}})
    with open(run.lm_eval_file, "a") as file:
        file.write('{"tasks": {')
    assert len(run.lm_eval()) == 1
    run.append_lm_eval({"tasks": {"b": {}}})
    with pytest.raises(RunnerError, match=r"line 2 of .*lm_eval\.jsonl is damaged; delete that line"):
        run.lm_eval()
