"""Secrets are masked by name or form wherever a run is recorded."""

from __future__ import annotations

import json
import shlex

import pytest

from experiments.training.loop import Run
from experiments.util.secrecy import MASK, masked, masked_command
from tests.support.runs import tiny_config, train_here

SECRETS = [
    *("tracker.options.api_key=abc123x", "+password=hunter2", "--hf-token=hf_short", "WANDB_API_KEY=0a1b2c"),
    *("accessToken=abcdef", "data.url=https://me:hunter2@host/x", "--api-key hunter2", "model.Secret=s3"),
    *("auth=me:it", "x=sk-proj-abcdefghijklmnop1234", "x=ghp_abcdefghijklmnopqrstuv", "x=AKIAABCDEFGHIJKLMNOP"),
]
PLAIN = [
    *("train.tokens=100", "model.pad_token=3", "task.name=tokens", "tokenizer=bpe", "keys=8", "model.key=conv"),
    *("--parent 12", "train.lr=1e-3", "runs=/data/passwords/runs", "experiment=secretary", "author=me", "x=sk-1"),
]


@pytest.mark.parametrize("words", SECRETS)
def test_secrets_on_a_command_line_are_masked(words):
    shown = masked_command(f"python -m experiments.run {words} seed=0")
    assert MASK in shown
    assert shown.endswith(" seed=0")
    assert not any(secret in shown for secret in ("hunter2", "abc", "ABC", "hf_s", "0a1", "me:it", "s3"))


@pytest.mark.parametrize("words", PLAIN)
def test_what_is_no_secret_is_recorded_as_it_is(words):
    command = f"python -m experiments.run {words} 'train.lr=tag(log, interval(1e-4, 1e-2))'"
    assert shlex.split(masked_command(command)) == shlex.split(command)


def test_what_is_nested_is_masked_by_name_and_form():
    plain = {"tokens": 3, "token": 4, "auth": None}
    given = {"options": {"api_key": "x", "tags": ["hf_abcdefghijklmnopqrst", "plain"]}, **plain}
    shown = {"options": {"api_key": MASK, "tags": [MASK, "plain"]}, **plain}
    assert masked(given) == shown
    assert masked_command("an open 'quote sk-abcdefghijklmnopqrst") == f"an open 'quote {MASK}"


def test_no_secret_is_in_a_record(tmp_path, monkeypatch):
    """Given on the command line, or met in an error's text."""

    def failing(run):
        raise ValueError("401 for https://me:hunter2@host with hf_abcdefghijklmnopqrstuv")

    monkeypatch.setattr(Run, "step", failing)
    monkeypatch.setenv("SEQARCH_COMMAND", "python -m experiments.run +tracker.options.api_key=hunter2 seed=0")
    folder = train_here(tiny_config(tmp_path))[1]
    assert folder.record()["command"].split()[-2:] == ["'+tracker.options.api_key=***'", "seed=0"]
    assert folder.record()["reason"] == "ValueError: 401 for https://***@host with ***"
    assert "hunter2" not in json.dumps(folder.record())
