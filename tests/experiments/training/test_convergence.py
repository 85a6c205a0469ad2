from __future__ import annotations

import math

import pytest

from experiments.config.schema import TrainConfig
from experiments.training.convergence import Convergence
from experiments.training.loop import Run
from experiments.training.lr_scheduler import last_step, learning_rate
from experiments.util.errors import ConfigError
from tests.support.runs import last, same, tensors, tiny_config, train_here

TOKENS = 16
"""Of a step, so that an evaluation every 10 steps comes after 160 tokens."""


def rule(**changes) -> Convergence:
    options = {"steps": 100_000, "batch_size": 1, "lr": 1.0, "eval_every": 10, "schedule": "until_converged"}
    return Convergence(TrainConfig(**{**options, **changes}), TOKENS)


def first_ending(rule: Convergence, losses: list[float]) -> tuple[int, str]:
    return next((n, found) for n in range(1, len(losses) + 1) if (found := rule.ending(losses[:n])))


@pytest.mark.parametrize("power", [0.02, 0.05, 0.2])
def test_a_power_law_ends_where_a_quarter_of_the_steps_gains_one_percent(power):
    """``n^-p`` falls by ``1 - .75^p`` over the last quarter, whatever n: below 1 % for p < .035 alone."""
    losses = [n**-power for n in range(1, 401)]
    gain = 1 - 0.75**power
    assert (gain < 0.01) == (power < 0.035)
    if gain < 0.01:
        assert first_ending(rule(), losses)[1] == "plateau"
    else:
        # The first windows are of whole evaluations and so hold more than a quarter, never less.
        assert all(rule().ending(losses[:n]) is None for n in range(1, 401))


def test_an_exponential_approach_ends_when_the_last_quarter_is_flat():
    losses = [1 + math.exp(-n / 20) for n in range(1, 401)]
    found, ending = first_ending(rule(), losses)
    before, within = min(losses[: found - math.ceil(found / 4)]), losses[found - 1]
    assert ending == "plateau"
    assert before - within < 0.01 * before
    assert losses[found - 2 - math.ceil((found - 1) / 4)] - losses[found - 2] >= 0.01 * losses[found - 3]


def test_a_false_plateau_is_waited_out_with_patience_and_not_without():
    losses = [2.0] * 40 + [2.0 * 0.9**n for n in range(40)] + [0.01] * 400
    assert first_ending(rule(), losses)[0] < 40
    patient = rule(plateau_tokens=50 * 10 * TOKENS)
    assert first_ending(patient, losses)[0] > 80


def test_noise_around_a_flat_loss_counts_as_flat():
    losses = [1.0 + 0.02 * math.sin(7.0 * n) for n in range(200)]
    assert first_ending(rule(), losses)[1] == "plateau"


def test_a_loss_that_keeps_falling_ends_with_the_budget_and_leaves_room_for_the_decay():
    number, ending = first_ending(rule(steps=1200), [0.9**n for n in range(200)])
    assert (number * 10, ending) == (1000, "budget")
    assert last_step(rule(steps=1200).config, 1000) == 1200


def test_the_rate_stays_then_falls_over_a_fifth_more():
    config = rule(steps=1200, warmup=20).config
    assert [learning_rate(config, step) for step in (19, 500, 1100)] == [1.0, 1.0, 1.0]
    rates = [learning_rate(config, step, 500) for step in range(499, 601)]
    assert rates[:2] == [1.0, 1.0]
    assert rates[51] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert last_step(config, 500) == 600


def test_the_warm_up_has_to_fit_before_the_decay():
    assert rule(steps=120, warmup=100).config.most_warmup == 100
    with pytest.raises(ValueError, match=r"warmup \(101\) and the 20 steps of decay_share"):
        rule(steps=120, warmup=101)


def test_a_run_that_converges_says_so_and_resumes_to_the_bit(tmp_path, monkeypatch):
    """At a rate of nothing the loss never falls: two windows, then a fifth more."""
    changes = {"train__schedule": "until_converged", "train__steps": 100, "train__eval_every": 4}
    changes |= {"train__lr": 1e-9, "train__plateau_tokens": 8 * 8 * 16}
    _, whole = train_here(tiny_config(tmp_path / "whole", **changes))
    results = whole.record()["results"]
    assert results["stable_phase"] == {"ending": "plateau", "steps": 12}
    assert [line["step"] for line in whole.evaluations()] == [4, 8, 12, 15]
    assert whole.record()["cost"]["steps"] == 15

    step = Run.step

    def preempted_in_the_decay(run):
        run.interrupts.requested = run.state.step == 12
        return step(run)

    monkeypatch.setattr(Run, "step", preempted_in_the_decay)
    torn_config = tiny_config(tmp_path / "torn", **changes)
    assert train_here(torn_config)[0] == 75
    monkeypatch.setattr(Run, "step", step)
    _, torn = train_here(torn_config)
    assert torn.record()["results"] == results
    assert same(tensors(last(whole)), tensors(last(torn)))


def test_a_target_ends_a_run_without_a_decay(tmp_path):
    changes = {"train__schedule": "until_converged", "train__eval_every": 4, "train__target": 0.0}
    _, folder = train_here(tiny_config(tmp_path, **changes))
    assert folder.record()["results"]["stable_phase"] == {"ending": "target", "steps": 4}


def test_a_share_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"least_improvement must be a finite number and not negative, got -0\.1"):
        tiny_config(tmp_path, train__least_improvement=-0.1)
