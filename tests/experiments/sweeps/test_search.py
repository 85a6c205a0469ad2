"""Searches with Optuna: on validation alone, the same again by the same command, pruned on request."""

from __future__ import annotations

import copy
import functools
import json
import statistics
from functools import cache
from pathlib import Path

import optuna
import pytest

from experiments.config.overrides import Interval, compose, parse_choice
from experiments.config.schema import FORMAT
from experiments.runs.folder import RunFolder
from experiments.search import main
from experiments.sweeps import search as search_module
from experiments.sweeps.execute import resolve_composed
from experiments.sweeps.search import Pruner, Search
from experiments.sweeps.status import SweepStatus
from experiments.tasks import TASKS
from experiments.util.errors import ConfigError
from experiments.util.output import exit_code
from tests.support.runs import TINY, call

SPACE = ["train.lr=tag(log, interval(1e-4, 1e-1))", "train.weight_decay=0.0,0.1"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("train.lr=tag(log, interval(1e-4, 1e-2))", Interval(1e-4, 1e-2, True)),
        ("train.lr=interval(0, 1)", Interval(0.0, 1.0, False)),
        ("train.steps=range(1,4)", ["1", "2", "3"]),
        ("model=attention,mamba2", ["attention", "mamba2"]),
        ("search.trials=3", 3),
        ("task.test_lengths=[64,128]", "[64,128]"),
    ],
)
def test_arguments_are_in_hydras_grammar(argument, value):
    assert parse_choice(argument) == (argument.partition("=")[0], value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.lr=1e-3"], "nothing is searched"),
        (["task=mqar,stdlib_text"], "task cannot be searched"),
        ([*SPACE, "search.trial=3"], "search.trial: unknown key.*Did you mean 'trials'"),
        ([*SPACE, "search.trials=many"], "search.trials: expected an integer"),
        ([*SPACE, "search.jobs=0"], "jobs must be at least 1"),
        ([*SPACE, "search.seed=-1"], "seed must be at least 0 and below 2\\^32, got -1"),
        ([*SPACE, "seed=interval(0, 5)"], r"seed=interval\(0, 5\): .*give them one by one, as seed=0,1,2"),
        ([*SPACE, "seed=0,1,0"], "seed=0,1,0: a seed is given twice"),
        ([*SPACE, "seed=0,two"], "seed=two of the search: seed: expected an integer"),
        ([*SPACE, "train.keep_last=1,2"], "train.keep_last cannot be searched"),
        ([*SPACE, "+machine.processes=1,2"], r"\+machine.processes cannot be searched"),
        ([*SPACE, "train.dry_run=true"], "a search trains its trials"),
        (["train.weight_decay=0,-1"], "train.weight_decay=-1 of the search: train: weight_decay must be .*, got -1.0"),
        (["train.warmup=0,5,2000"], "train.warmup=2000 of the search: train: warmup must be at most steps"),
        (["train.lr=interval(-1, 1)"], "train: lr must be a finite number and not negative, got -1.0"),
        (["train.steps=interval(10, 20)"], "train.steps: expected an integer, got 10.0"),
        (["model=attention,none"], "model=none of the search: .*Could not find 'model/none'"),
        ([*SPACE, "search.sampler=grid"], "sampler is 'grid', expected one of random, tpe"),
        ([*SPACE, "train.lrr=1"], "train.lrr: unknown key"),
        ([*SPACE, "model=none"], "Could not find 'model/none'"),
        (["model=glob(*)"], r"model=glob\(\*\): give the choices one by one"),
        (["train.lr=interval(1"], "no viable alternative|missing"),
        (["train.lr=interval(1, 0)"], "expected two finite numbers, the smaller one first"),
        (["train.lr=tag(log, interval(0, 1))"], "expected two finite numbers above 0, the smaller one first"),
        ([*SPACE, "train=null"], "train=null: expected one of default"),
    ],
)
def test_a_mistake_is_reported_before_anything_runs(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        Search([*TINY, f"runs={tmp_path}", *arguments])
    assert list(tmp_path.iterdir()) == []


def test_the_last_one_of_a_key_counts(tmp_path):
    """And what is fixed need not make a run without what is searched."""
    given = ["train.lr=1,2", "train.lr=0.5", "seed=0,1", "seed=3", "train.warmup=2000", "train.steps=3000,4000"]
    search = Search([*TINY, f"runs={tmp_path}", *given])
    assert (search.space, search.seeds) == ({"train.steps": ["3000", "4000"]}, ["3"])
    assert (search.config.train.lr, search.config.seed) == (0.5, 3)


def record(folder: Path, validation: float, test: float = 0.0, status: str = "finished") -> None:
    """The folder that a training process leaves."""
    results = {"results": {"validation": validation, "test": test}} if status == "finished" else {}
    (folder / "run.json").write_text(json.dumps({"format": FORMAT, "status": status, "attempt": 1, **results}))


class Trainer:
    """Stands for training processes: a validation metric that is best at a rate of 0.01, and a test metric against it.

    Attributes:
        trained: the rate and seed of every run that was not there already.
        fails: the rate above which runs fail.
    """

    def __init__(self):
        self.trained, self.fails = [], 1.0

    def __call__(self, composed, sweep, job, should_prune=None):
        config = resolve_composed(composed)
        folder = RunFolder(config.folder())
        lr = config.train.lr
        if folder.status() == "finished":
            return sweep.update(job, status="kept", name="n")
        folder.create(config)
        self.trained.append((lr, config.seed))
        if lr > self.fails:
            record(folder.path, 0.0, status="failed")
            return sweep.update(job, status="failed", name="n")
        quality = 1 / (1 + abs(lr - 0.01) * 100) + 0.01 * config.seed
        for step in (5, 10):
            folder.append_metrics(step=step, validation_accuracy=quality * step / 10)
            if should_prune is not None and should_prune(folder):
                folder.update(status="interrupted", attempt=1)
                return sweep.update(job, status="interrupted", name="n")
        record(folder.path, quality, test=1 - quality)
        return sweep.update(job, status="finished", name="n")


@cache
def composed_once(*fixed: str) -> dict:
    return compose(fixed)


def compose_quickly(arguments):
    """As ``compose``, where what is searched are numbers and Hydra has composed the rest once."""
    searched = [each for each in arguments if each.startswith(("train.lr=", "train.weight_decay=", "seed="))]
    composed = copy.deepcopy(composed_once(*(each for each in arguments if each not in searched)))
    for argument in searched:
        path, _, value = argument.partition("=")
        *parts, last = path.split(".")
        functools.reduce(dict.__getitem__, parts, composed)[last] = json.loads(value)
    return composed


@pytest.fixture
def trainer(monkeypatch) -> Trainer:
    trainer = Trainer()
    monkeypatch.setattr(search_module, "execute", trainer)
    monkeypatch.setattr(search_module, "compose", compose_quickly)
    return trainer


def done(tmp_path: Path, *arguments: str) -> tuple[Search, str]:
    sweep = SweepStatus(tmp_path / "sweep")
    sweep.create()
    search = Search([*TINY, f"runs={tmp_path}", *SPACE, *arguments])
    return search, search.run(sweep)


def test_the_best_on_validation_is_chosen_and_never_the_best_on_test(tmp_path, trainer):
    search, ending = done(tmp_path, "seed=0,1,2", "search.trials=12")
    assert ending == "complete"
    assert len(trainer.trained) == 36
    assert {seed for _, seed in trainer.trained} == {0, 1, 2}
    by_rate = {}
    for path in tmp_path.glob("mqar/*/run.json"):
        lr = json.loads(path.with_name("config.json").read_text())["train"]["lr"]
        by_rate.setdefault(lr, []).append(json.loads(path.read_text())["results"])
    best = max(by_rate, key=lambda lr: statistics.median(result["validation"] for result in by_rate[lr]))
    assert search.best()["overrides"][0] == f"train.lr={best}"
    assert best != max(by_rate, key=lambda lr: statistics.median(result["test"] for result in by_rate[lr]))
    written = json.loads(search.file.read_text())
    assert written["best"] == search.best()
    assert len(written["trials"]) == 12


def test_results_of_other_code_are_no_trials_unless_they_are_taken_as_they_are(tmp_path, monkeypatch, trainer):
    first, _ = done(tmp_path, "search.trials=2")
    monkeypatch.setattr(search_module, "refusal", lambda folder, _: "my_mixers/mixers.py changed")
    again, ending = done(tmp_path, "search.trials=2")
    assert (ending, again.best(), len(trainer.trained)) == ("failed", None, 2)
    kept, ending = done(tmp_path, "search.trials=2", "other_code=keep")
    assert (ending, kept.best(), kept.file) == ("complete", first.best(), first.file)


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_same_command_resumes_where_it_was_stopped(tmp_path, monkeypatch, trainer, jobs):
    search, _ = done(tmp_path / "whole", "search.trials=14", f"search.jobs={jobs}")
    whole, stopping = list(trainer.trained), Trainer()
    sweep = SweepStatus(tmp_path / "sweep")
    sweep.create()

    def stop(composed, sweep, job, should_prune=None):
        if job == 7:
            sweep.stop()
        if not sweep.should_stop():
            stopping(composed, sweep, job, should_prune)

    monkeypatch.setattr(search_module, "execute", stop)
    arguments = [*TINY, f"runs={tmp_path / 'parts'}", *SPACE, "search.trials=14", f"search.jobs={jobs}"]
    assert Search(arguments).run(sweep) == "stopped"
    finished = sorted(stopping.trained)
    assert 0 < len(finished) < 14
    monkeypatch.setattr(search_module, "execute", trainer)
    trainer.trained.clear()
    again, ending = done(tmp_path / "parts", "search.trials=14", f"search.jobs={jobs}")
    assert ending == "complete"
    assert sorted([*finished, *trainer.trained]) == sorted(whole)
    assert again.summary()["trials"] == search.summary()["trials"]


def test_no_secret_is_in_the_file_of_a_search(tmp_path, trainer):
    search, _ = done(tmp_path, "search.trials=1", "tracker=wandb", "tracker.options.project=hf_abcdefghijklmnopqrst")
    assert "tracker.options.project=***" in json.loads(search.file.read_text())["fixed"]


def test_failed_trials_are_shown_and_not_chosen(tmp_path, trainer):
    trainer.fails = 0.01
    search, ending = done(tmp_path, "search.trials=12")
    assert ending == "failed"
    states = [trial["state"] for trial in search.summary()["trials"]]
    assert set(states) == {"complete", "fail"}
    assert float(search.best()["overrides"][0].partition("=")[2]) <= 0.01


def test_trials_are_pruned_only_on_request(tmp_path, trainer):
    kept, _ = done(tmp_path / "kept", "search.trials=12")
    assert all(trial["state"] == "complete" for trial in kept.summary()["trials"])
    pruned, ending = done(tmp_path / "pruned", "search.trials=12", "search.prune=true")
    assert ending == "complete"
    states = [trial["state"] for trial in pruned.summary()["trials"]]
    assert "pruned" in states
    assert set(states[:5]) == {"complete"}
    reasons = [json.loads(path.read_text()).get("reason") for path in (tmp_path / "pruned").glob("mqar/*/run.json")]
    assert any(reason and reason.endswith("is worse than the median of the trials before") for reason in reasons)
    trainer.trained.clear()
    again, _ = done(tmp_path / "pruned", "search.trials=12", "search.prune=true")
    assert trainer.trained == []
    assert again.summary() == pruned.summary()


def test_a_pruner_compares_with_the_median_of_earlier_trials(tmp_path):
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    first = study.ask()
    first.report(0.5, 5)
    study.tell(first, 0.5)
    metric = TASKS["mqar"](TASKS["mqar"].Config()).metric
    folder = RunFolder(tmp_path)
    for value, worse in ((0.6, False), (0.4, True)):
        folder.metrics_file.write_text(json.dumps({"step": 5, f"validation_{metric.name}": value}) + "\n")
        pruner = Pruner(study.ask(), metric)
        assert bool(pruner(folder)) == worse
        assert bool(pruner(folder)) == worse
    assert "0.4 on validation at step 5 is worse than the median" in pruner.reason


@pytest.mark.slow
def test_a_search_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Two trials at a time, each a real run; another time nothing is trained, and a full output is said once."""
    arguments = [*TINY, "train.steps=10", SPACE[0], "search.trials=2", "search.jobs=2"]
    first = call("experiments.search", *arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "best: train.lr=" in first.stdout
    assert "2 runs: 2 finished" in first.stdout
    assert "Warning" not in first.stderr
    (written,) = tmp_path.glob("runs/mqar/search-*.json")
    before = {path: path.read_bytes() for path in tmp_path.glob("runs/mqar/*/run.json")}
    assert len(before) == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mqar"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["search", *arguments])
    assert main() == 0
    assert "2 runs: 2 finished before" in capsys.readouterr().out
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert exit_code(main) == 1
    message = "error: cannot write the standard output: No space left on device; the record of the runs is whole\n"
    assert capsys.readouterr().err == message
    assert {path: path.read_bytes() for path in before} == before
    assert json.loads(written.read_text())["best"]["validation"] >= 0
