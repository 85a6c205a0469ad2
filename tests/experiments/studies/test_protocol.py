"""Which runs a study wants next, from those that are there: on made-up results, so that every way is gone."""

from __future__ import annotations

import pytest

from experiments.runs.folder import RunFolder
from experiments.runs.recorded import RecordedRun
from experiments.studies.claims import lacks
from experiments.studies.protocol import Arm, Progress, Protocol, Wanted, rate_of

ARM = Arm("a", "model=attention")
SHORT = Protocol(rates=(-5, -4, -3), most_rates=5, tuning_seeds=(100, 101), reporting_seeds=(0, 1, 2))
SHARE = {"name": "accuracy", "unit": "", "higher_is_better": True}
BITS = {"name": "bits_per_byte", "unit": "bits/byte", "higher_is_better": False}


def run(wanted: Wanted, score: float | None, metric=SHARE, steps=100) -> RecordedRun:
    """A run that is over with that score on both splits; failed for ``None``."""
    config = {"seed": wanted.seed, "train": {"lr": wanted.rate}}
    study = {"arm": wanted.arm, "stage": wanted.stage}
    record = {"status": "failed", "study": study}
    if score is not None:
        results = {"test": score, "validation": score}
        record |= {"status": "finished", "results": results, "metric": metric, "cost": {"steps": steps}}
    return RecordedRun(RunFolder("run"), config, record)


def finish(score, protocol=SHORT, metric=SHARE, steps=lambda wanted: 100) -> tuple[Progress, list[Wanted]]:
    """An arm trained to its end, with the score of a function of what is wanted; and all runs in their order."""
    runs, order = {}, []
    while wanted := Progress(protocol, ARM, runs).wanted():
        order.append(wanted[0])
        runs[wanted[0].key] = run(wanted[0], score(wanted[0]), metric, steps(wanted[0]))
    return Progress(protocol, ARM, runs), order


def peaked(best: int):
    return lambda wanted: 0.9 - 0.1 * abs([rate_of(each) for each in range(-12, 3)].index(wanted.rate) - 12 - best)


def test_rates_are_half_decades_of_one_digit():
    assert [rate_of(each) for each in (-7, -6, -5, -4, -3, -2, 0)] == [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 1.0]


def test_the_best_rate_inside_is_reported_and_checked_at_twice_its_steps():
    progress, order = finish(peaked(-4))
    tuned = [wanted for wanted in order if wanted.stage == "tuning"]
    assert len(tuned) == 3 * 2
    assert [wanted.seed for wanted in tuned] == [100] * 3 + [101] * 3
    assert progress.chosen == 1e-2
    assert [(wanted.stage, wanted.seed) for wanted in order[6:]] == [
        *[("reporting", seed) for seed in (0, 1, 2)],
        ("doubled", 0),
    ]
    assert {wanted.rate for wanted in order[6:]} == {1e-2}
    assert order[-1].steps == 200
    assert progress.converged
    assert not progress.at_edge
    assert lacks(progress) == []


@pytest.mark.parametrize(("best", "rates"), [(-6, [-7, -6, -5, -4, -3]), (-2, [-5, -4, -3, -2, -1])])
def test_the_grid_is_extended_until_the_best_is_inside(best, rates):
    progress, _ = finish(peaked(best))
    assert progress.rates == rates
    assert progress.chosen == rate_of(best)
    assert not progress.at_edge


def test_a_grid_that_never_turns_ends_and_says_that_it_lies_at_the_edge():
    progress, _ = finish(peaked(-9))
    assert progress.rates == [-7, -6, -5, -4, -3]
    assert progress.at_edge
    assert lacks(progress) == ["the rate of a, 0.0003, lies at an edge of its grid"]


def test_of_equal_rates_the_middle_one_is_chosen_also_where_nothing_learns():
    assert finish(lambda wanted: 1.0)[0].chosen == 1e-2
    progress, _ = finish(lambda wanted: 0.1 + 0.009 * (wanted.rate == 3e-2))
    assert progress.chosen == 1e-2
    assert not progress.at_edge


def test_of_rates_that_do_equally_well_the_one_that_took_the_fewest_steps_is_chosen():
    """And where that is at an edge, the grid is extended there."""
    progress, _ = finish(lambda wanted: 1.0, steps=lambda wanted: {1e-2: 300, 3e-2: 200}.get(wanted.rate, 400))
    assert progress.chosen == 3e-2
    assert progress.rates == [-5, -4, -3, -2]


def test_the_worst_seed_is_checked_at_twice_its_steps():
    """One that is stuck, where the others have nothing left to gain."""
    stuck = {("reporting", 1e-2, 2): 0.1, ("doubled", 1e-2, 2): 0.8}
    progress, order = finish(lambda wanted: stuck.get(wanted.key[1:], 0.99 - 0.1 * (wanted.rate != 1e-2)))
    assert order[-1].key[1:] == ("doubled", 1e-2, 2)
    assert progress.gained() == pytest.approx(0.7)
    assert progress.converged is False


def test_a_rate_at_which_a_seed_diverges_is_not_chosen():
    progress, _ = finish(lambda wanted: None if (wanted.rate, wanted.seed) == (1e-2, 101) else peaked(-4)(wanted))
    assert progress.chosen == 3e-3


def test_an_arm_that_gains_from_twice_the_budget_has_not_converged():
    progress, _ = finish(lambda wanted: peaked(-4)(wanted) + 0.05 * (wanted.stage == "doubled"))
    assert progress.converged is False
    assert progress.gained() == pytest.approx(0.05)
    assert lacks(progress) == ["a has not converged: twice the budget gains 0.050"]


def test_where_nothing_is_left_to_gain_nothing_is_run_again():
    progress, order = finish(lambda wanted: 0.99)
    assert "doubled" not in {wanted.stage for wanted in order}
    assert progress.converged


def test_less_is_better_where_the_metric_says_so():
    progress, order = finish(lambda wanted: 3.0 - peaked(-4)(wanted), metric=BITS)
    assert progress.chosen == 1e-2
    worse, _ = finish(lambda wanted: 3.0 - peaked(-4)(wanted) * (1 + (wanted.stage == "doubled")), metric=BITS)
    assert worse.gained() == pytest.approx(0.9 / 2.1)
    assert order[-1].stage == "doubled"


def test_failed_reporting_seeds_are_results_and_hold_nobody_up():
    progress, _ = finish(lambda wanted: None if wanted.key[1:] == ("reporting", 1e-2, 0) else peaked(-4)(wanted))
    assert len(progress.reporting) == 3
    assert progress.converged
    assert lacks(progress) == []


def test_what_is_missing_is_said():
    def of(count):
        runs = {}
        for _ in range(count):
            wanted = Progress(SHORT, ARM, runs).wanted()[0]
            runs[wanted.key] = run(wanted, peaked(-4)(wanted))
        return lacks(Progress(SHORT, ARM, runs))

    assert [of(count) for count in (3, 7, 9)] == [
        ["a is being tuned"],
        ["a has 1 of 3 seeds"],
        ["the run of a at twice the budget is missing"],
    ]


def test_a_seed_is_for_tuning_or_for_reporting():
    with pytest.raises(ValueError, match=r"seeds \[1\] are for tuning and for reporting"):
        Protocol(tuning_seeds=(1, 2), reporting_seeds=(0, 1))
    with pytest.raises(ValueError, match="half decades one after the other"):
        Protocol(rates=(-5, -3))
