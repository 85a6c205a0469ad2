"""Mixtures and curricula: which data a step has, what ends a stage, and runs that resume exactly."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.config.data import build_data
from experiments.replay import replay
from experiments.training.loop import Run
from experiments.training.lr_scheduler import learning_rate
from tests.support.runs import last, same, tensors, tiny_config, train_here

SHORT, LONG = {"length": 8, "pairs": 1}, {"length": 32, "pairs": 4}
MIXTURE = {"task__train_on": [{**SHORT, "share": 3}, {**LONG, "batch_size": 6}]}
CURRICULUM = {
    "task__train_on": [SHORT, {}, LONG],
    "task__order": "curriculum",
    "train__schedule": "until_converged",
    "train__steps": 100,
    "train__eval_every": 4,
    "train__stage_warmup": 2,
}
NEVER_BETTER = {"train__lr": 1e-9, "train__plateau_tokens": 8 * 8 * 16}
"""At a rate of nothing the loss never falls: two windows of so many tokens, then a fifth more."""


def stopped_at(monkeypatch, step: int, config):
    """The folder of a run that was preempted in that step, and resumed."""
    take = Run.step

    def preempted(run):
        run.interrupts.requested = run.state.step == step
        return take(run)

    monkeypatch.setattr(Run, "step", preempted)
    assert train_here(config)[0] == 75
    monkeypatch.setattr(Run, "step", take)
    code, folder = train_here(config)
    assert code == 0
    return folder


def assert_equal_runs(one, other):
    assert one.record()["results"] == other.record()["results"]
    for ours, theirs in zip(one.metrics(), other.metrics(), strict=True):
        assert ours | {"tokens_per_second": 0} == theirs | {"tokens_per_second": 0}
    assert same(tensors(last(one)), tensors(last(other)))


def test_a_step_of_a_mixture_depends_on_seed_and_step_alone(tmp_path):
    data, again, other = (build_data(tiny_config(tmp_path, seed=seed, **MIXTURE)) for seed in (0, 0, 1))
    numbers = [data.number(step, 0) for step in range(4000)]
    assert numbers[::-1] == [again.number(step, 0) for step in reversed(range(4000))]
    assert np.mean(numbers) == pytest.approx(1 / 4, abs=0.02)
    assert numbers != [other.number(step, 0) for step in range(4000)]
    whole, rows = data.sources[1].batch(0, 7), data.sources[1].batch(0, 7, first=2, size=3)
    assert np.array_equal(whole.tokens[2:5], rows.tokens)
    assert whole.tokens.shape == (6, 32)


def test_sources_share_no_random_numbers_and_about_the_tokens_of_a_step(tmp_path):
    changes = {"task__train_on": [{"length": 16}, SHORT, {"length": 48}], "task__order": "curriculum"}
    data = build_data(tiny_config(tmp_path, **changes, train__schedule="until_converged", train__micro_batch=4))
    assert [source.batch_size for source in data.sources] == [8, 16, 3]
    assert [source.micro_batch for source in data.sources] == [4, 8, 1]
    assert [source.tokens for source in data.sources] == [128, 128, 144]
    main = data.task.train_batch(0, 0, 8).tokens
    assert not np.array_equal(data.sources[0].batch(0, 0).tokens, main)
    one = build_data(tiny_config(tmp_path))
    assert np.array_equal(one.sources[0].batch(0, 5).tokens, one.task.train_batch(0, 5 * 8, 8).tokens)


def test_a_mixture_counts_what_it_takes_and_resumes_to_the_bit(tmp_path, monkeypatch):
    changes = {"train__steps": 24, "train__eval_every": 8, "train__save_every": 3, **MIXTURE}
    _, whole = train_here(tiny_config(tmp_path / "whole", **changes))
    run = Run(whole.config(), whole)
    steps = np.bincount([run.data.number(step, 0) for step in range(24)], minlength=2).tolist()
    cost = whole.record()["cost"]
    assert [each["steps"] for each in cost["sources"].values()] == steps
    assert cost["tokens"] == steps[0] * 16 * 8 + steps[1] * 6 * 32
    assert cost["flops"] == 3 * (steps[0] * run.model.flops(8, 16) + steps[1] * run.model.flops(32, 6))
    assert cost["tokens_per_second"] == pytest.approx(cost["tokens"] / cost["train_seconds"])
    assert whole.record()["model"]["state_length"] == 32
    named = {name for line in whole.metrics() for name in line if name.startswith("loss_")}
    assert named == {"loss_8_pairs_1", "loss_32_pairs_4"}
    assert_equal_runs(whole, stopped_at(monkeypatch, 12, tiny_config(tmp_path / "torn", **changes)))


def test_the_mean_loss_of_each_source_is_that_of_its_steps(tmp_path, monkeypatch):
    seen, take = [], Run.step

    def watched(run):
        loss = take(run)
        seen.append((run.data.number(run.state.step, 0), loss.item()))
        return loss

    monkeypatch.setattr(Run, "step", watched)
    _, folder = train_here(tiny_config(tmp_path, train__steps=40, train__eval_every=40, **MIXTURE))
    (line,) = folder.evaluations()
    for number, name in enumerate(("loss_8_pairs_1", "loss_32_pairs_4")):
        assert line[name] == pytest.approx(np.mean([loss for source, loss in seen if source == number]), rel=1e-6)


def test_stages_end_when_they_have_converged_and_the_last_one_decays(tmp_path, monkeypatch):
    changes = {**CURRICULUM, **NEVER_BETTER}
    _, whole = train_here(tiny_config(tmp_path / "whole", **changes))
    results, lines = whole.record()["results"], whole.metrics()
    assert [(each["options"], each["steps"], each["ending"]) for each in results["stages"]] == [
        (SHORT, 12, "plateau"),
        ({}, 12, "plateau"),
        (LONG, 20, "plateau"),
    ]
    assert results["stable_phase"] == {"ending": "plateau", "steps": 36}
    assert [(line["step"], line["stage"]) for line in lines if "ending" in line] == [(12, 0), (24, 1), (36, 2)]
    assert lines[-1]["step"] == 36 + 8
    assert whole.record()["cost"]["tokens"] == (12 + 12 + 20) * 8 * 16
    assert results["checkpoint_step"] > 24
    # In the middle of the second stage, at the very end of the first, and in the decay.
    for step in (15, 11, 37):
        assert_equal_runs(whole, stopped_at(monkeypatch, step, tiny_config(tmp_path / f"torn{step}", **changes)))


def test_the_validation_of_a_stage_is_at_its_options(tmp_path, monkeypatch):
    seen = []

    def scored(_, task, split, engine):
        seen.append((task.length, split))
        return {"accuracy": len(seen) / 10, "loss": 1.0 / len(seen)}

    monkeypatch.setattr("experiments.training.loop.evaluate_split", scored)
    changes = {**CURRICULUM, "train__stage_target": 0.3, "train__steps": 36}
    _, folder = train_here(tiny_config(tmp_path, **changes))
    # The accuracies are .1, .2, .3 (over), .4 (over), .5 ...; the budget ends the last stage, and the decay follows.
    assert [length for length, _ in seen] == [8, 8, 8, 16, 32, 32, 32, 32, 32]
    assert {split for _, split in seen} == {"validation"}
    results = folder.record()["results"]
    assert [each["ending"] for each in results["stages"]] == ["target", "target", "budget"]
    assert [each["steps"] for each in results["stages"]] == [12, 4, 18]


def test_a_stage_that_uses_up_the_steps_ends_with_the_decay(tmp_path):
    """And what would have followed is not trained on; the results say where it ended."""
    changes = {**CURRICULUM, "train__stage_target": 2.0, "train__plateau_tokens": 10**9, "train__steps": 12}
    _, folder = train_here(tiny_config(tmp_path, **changes))
    results = folder.record()["results"]
    assert results["stages"] == [{"options": SHORT, "steps": 10, "ending": "budget"}]
    assert results["stable_phase"] == {"ending": "budget", "steps": 8}


def test_a_stage_begins_with_a_climb(tmp_path):
    config = tiny_config(tmp_path, **CURRICULUM, train__warmup=4, train__lr=1.0).train
    assert [learning_rate(config, step) for step in (0, 3, 4, 20)] == [0.25, 1, 1, 1]
    assert [learning_rate(config, step, None, 20) for step in (20, 21, 22)] == [0.5, 1, 1]


def test_the_target_of_a_run_is_that_of_its_last_stage(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.training.loop.evaluate_split", lambda *_: {"accuracy": 1.0, "loss": 0.1})
    _, folder = train_here(tiny_config(tmp_path, **{**CURRICULUM, "train__stage_target": 0.5, "train__target": 0.9}))
    results = folder.record()["results"]
    assert [(each["steps"], each["ending"]) for each in results["stages"]] == [(4, "target")] * 3
    assert folder.record()["cost"]["steps"] == 12


@pytest.mark.parametrize("data", [MIXTURE, {**CURRICULUM, **NEVER_BETTER}], ids=["mixture", "curriculum"])
def test_a_bad_step_is_met_again_to_the_bit(tmp_path, data):
    """Over the ends of stages, and with the rate of the decay."""
    skip = {"train__spike": 1.01, "train__bad_step": "skip", "train__keep_last": 1, "train__eval_checkpoint": "last"}
    _, folder = train_here(tiny_config(tmp_path, **{"train__steps": 40, "train__eval_every": 30, **data, **skip}))
    for path in (min(folder.bad.iterdir()), max(folder.bad.iterdir())):
        again = replay(path)
        assert (again.loss, again.grad_norm) == (again.recorded.loss, again.recorded.grad_norm)


def test_further_tests_are_splits_with_their_options(tmp_path):
    changes = {"task__test_lengths": [24], "task__test_on": [{"length": 32}, {"length": 32, "pairs": 4}, {"pairs": 1}]}
    _, folder = train_here(tiny_config(tmp_path, **changes))
    record, run = folder.record(), Run(folder.config(), folder)
    tests = record["results"]["tests"]
    assert {name: (each["length"], each.get("options")) for name, each in tests.items()} == {
        "test": (16, None),
        "test_24": (24, None),
        "test_32": (32, {"length": 32}),
        "test_32_pairs_4": (32, {"length": 32, "pairs": 4}),
        "test_pairs_1": (16, {"pairs": 1}),
    }
    assert [each["chance"] for each in tests.values()] == [1 / 2, 1 / 2, 1 / 2, 1 / 4, 1]
    curve = record["results"]["curve"]
    assert curve["x"] == [16, 24, 32]
    assert curve["y"] == [tests[name]["accuracy"] for name in ("test", "test_24", "test_32")]
    assert record["model"]["state_length"] == 32
    assert "32 sequences of 32" in record["data"]["test_32_pairs_4"]
    assert record["data"]["hash"] == run.data.manifest()["hash"] != run.task.manifest()["hash"]
