"""Statistics of comparisons, against SciPy, closed forms and published values; coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from experiments.report import statistics
from experiments.report.statistics import (
    Interval,
    difference,
    holm,
    mean_interval,
    share_interval,
    sign_flip,
    steps_to_threshold,
    verdict,
)

MANY = 40_000
"""Resamples that know a standard error to 0.35 %."""


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def ends(interval):
    return interval.low, interval.high


class TestIntervals:
    def test_of_seeds_alone_they_are_students(self, rng):
        """One column, each run's metric: Student's interval of one arm and of pairs, Welch's of two arms."""
        a, b = rng.normal(0.8, 0.1, 5), rng.normal(0.6, 0.02, 8)
        column = {"a": a[:, None], "b": b[:, None]}
        one = mean_interval(column["a"], MANY)
        assert one.estimate == pytest.approx(a.mean())
        assert one.degrees_of_freedom == pytest.approx(4)
        assert ends(one) == pytest.approx(stats.ttest_1samp(a, 0).confidence_interval(0.95), rel=0.02)
        welch, two = stats.ttest_ind(a, b, equal_var=False), difference(column["a"], column["b"], MANY)
        assert two.estimate == pytest.approx(a.mean() - b.mean())
        assert two.degrees_of_freedom == pytest.approx(welch.df)
        assert ends(two) == pytest.approx(welch.confidence_interval(0.95), rel=0.03)
        paired = difference(column["a"], column["b"][:5], MANY, paired_seeds=True, confidence=0.9)
        assert ends(paired) == pytest.approx(stats.ttest_rel(a, b[:5]).confidence_interval(0.9), rel=0.03)

    def test_of_items_alone_they_are_students_of_pairs(self, rng):
        """Runs that all score alike: what is left is which items there are, the same for both arms."""
        hard = rng.normal(0.5, 0.3, 40)
        a, b = hard + rng.normal(0.05, 0.1, 40), hard
        found = difference(np.tile(a, (3, 1)), np.tile(b, (4, 1)), MANY)
        assert found.degrees_of_freedom == pytest.approx(39)
        assert ends(found) == pytest.approx(stats.ttest_rel(a, b).confidence_interval(0.95), rel=0.02)
        apart = stats.ttest_ind(a, b).confidence_interval(0.95)
        assert found.high - found.low < 0.4 * (apart.high - apart.low)

    def test_the_standard_error_is_that_of_crossed_axes(self, rng):
        """The closed form: variance of seeds and of items, and the residual three times at most (Owen 2007)."""
        a = rng.normal(0, 1, (6, 1)) + rng.normal(0, 2, 50) + rng.normal(0, 0.5, (6, 50))
        seeds, items = a.mean(axis=1).var(ddof=1) / 6, a.mean(axis=0).var(ddof=1) / 50
        residual = (a - a.mean(axis=1, keepdims=True) - a.mean(axis=0) + a.mean()).var() / 300
        variance = mean_interval(a, MANY).standard_error ** 2
        assert seeds + items - residual < variance < seeds + items + 3 * residual
        assert variance == pytest.approx(seeds + items, rel=0.03)

    def test_the_same_arguments_give_the_same_bits(self, rng):
        a, b = rng.random((5, 30)), rng.random((3, 30))
        assert difference(a, b) == difference(a, b, seed=0)
        assert difference(a, b, seed=1) != difference(a, b)
        assert ends(difference(b, a, MANY)) == pytest.approx([-x for x in ends(difference(a, b, MANY))[::-1]], rel=0.05)

    def test_seeds_that_agree_give_no_width(self):
        assert ends(difference(np.full((5, 7), 0.7), np.full((5, 7), 0.4))) == pytest.approx((0.3, 0.3), abs=1e-12)

    def test_five_seeds_are_covered_where_percentiles_are_too_narrow(self, rng):
        """95 % intervals of two arms and of one, with 5 seeds whose differences dominate, over 500 data sets each."""
        for arms, at_most in ((2, 0.91), (1, 0.87)):
            covered = np.zeros(2)
            for number in range(500):
                scores = [rng.normal(0, 1, (5, 1)) + rng.normal(0, 0.5, (5, 20)) for _ in range(arms)]
                found = difference(*scores, 200, number) if arms == 2 else mean_interval(*scores, 200, number)
                signed = [scores[0], *(-other for other in scores[1:])]
                low, high = np.quantile(statistics._resampled(signed, 200, number), [0.025, 0.975])
                covered += found.low <= 0 <= found.high, low <= 0 <= high
            ours, percentiles = covered / 500
            assert 0.93 <= ours <= 0.98
            assert percentiles < at_most

    def test_wilsons_interval_of_a_share(self):
        z, n, share = stats.norm.ppf(0.975), 5, 0.8
        middle, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        found = share_interval(4, 5)
        assert (found.estimate, found.standard_error) == (0.8, None)
        assert ends(found) == pytest.approx([(middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)])
        assert share_interval(5, 5).high == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([[1.0]], [[1.0], [2.0]]), "a: expected at least 2 seeds, got 1"),
            (([1.0, 2.0], [[1.0], [2.0]]), r"a: expected scores \[seeds, items\], got the shape \[2\]"),
            (([[1.0], [2.0]], [[1.0], [math.nan]]), "b: expected finite scores, got 1 that are not"),
            ((np.ones((2, 3)), np.ones((2, 4))), "same items: got 3 of a and 4 of b"),
            ((np.ones((2, 3)), np.ones((3, 3)), 100, 0, 0.95, True), "paired seeds are as many .* 2 of a and 3 of b"),
            ((np.ones((2, 3)), np.ones((3, 3)), 10), "resamples: expected at least 100, got 10"),
            ((np.ones((2, 3)), np.ones((3, 3)), 100, 0, 95), "confidence: expected a number between 0 and 1, got 95"),
        ],
    )
    def test_what_cannot_be_judged_is_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            difference(*arguments)

    def test_shares_are_of_trials(self):
        for successes, n in ((-1, 5), (6, 5), (0, 0)):
            with pytest.raises(ValueError, match=f"got {successes} in {n}"):
                share_interval(successes, n)


class TestSignFlip:
    @pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
    @pytest.mark.parametrize("values", [[0.3, -0.1, 0.2, 0.2, -0.4, 0.7, 0.1], [0.1, 0.2, 0.3, 0.0]])
    def test_all_flips_are_those_of_scipy(self, values, alternative):
        found = sign_flip(values, alternative)
        theirs = stats.permutation_test((values,), np.mean, permutation_type="samples", alternative=alternative)
        assert (found.p_value, found.mean) == pytest.approx((theirs.pvalue, np.mean(values)))
        assert (found.flips, found.exact) == (2 ** len(values), True)

    def test_five_of_five_are_one_of_sixteen(self):
        assert sign_flip([2.0]).p_value == 1
        assert sign_flip([0.1, 0.2, 0.3, 0.4, 0.5]).p_value == 2 / 32
        assert sign_flip([0.1, 0.2, 0.3, 0.4, 0.5], "greater").p_value == 1 / 32

    def test_many_differences_are_flipped_at_random(self):
        """Equal ones: the sign test, whose distribution is binomial."""
        values = np.where(np.arange(30) < 20, 1.0, -1.0)
        for alternative in ("two-sided", "greater"):
            found = sign_flip(values, alternative)
            assert found.p_value == pytest.approx(stats.binomtest(20, 30, alternative=alternative).pvalue, rel=0.05)
            assert (found.flips, found.exact) == (99_999, False)
        assert sign_flip(np.ones(60), "greater").p_value == 1 / 100_000
        assert sign_flip(np.ones(20)).p_value == 2 / 2**20

    def test_what_is_no_list_of_differences_is_refused(self):
        for values in ([], [math.nan], [[1.0]]):
            with pytest.raises(ValueError, match="differences: expected at least one, all finite"):
                sign_flip(values)
        with pytest.raises(ValueError, match="expected two-sided, greater or less, got 'more'"):
            sign_flip([1.0], "more")


def test_holm_is_step_down():
    """R: ``p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")``."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]).shape == (0,)
    for wrong in ([1.1], [math.nan], [-0.1]):
        with pytest.raises(ValueError, match="expected numbers from 0 to 1"):
            holm(wrong)


class TestVerdict:
    @pytest.mark.parametrize(
        ("low", "high", "margin", "claim", "answer"),
        [
            (0.06, 0.2, 0.05, "more", "yes"),
            (0.05, 0.2, 0.05, "more", "unresolved"),
            (-0.1, 0.05, 0.05, "more", "no"),
            (-0.1, 0.06, 0.05, "more", "unresolved"),
            (-0.04, 0.2, -0.05, "more", "yes"),
            (-0.04, 0.04, 0.05, "equal", "yes"),
            (-0.05, 0.04, 0.05, "equal", "unresolved"),
            (0.04, 0.06, 0.05, "equal", "unresolved"),
            (0.05, 0.06, 0.05, "equal", "no"),
            (-0.2, -0.06, 0.05, "equal", "no"),
            (-0.2, 0.2, 0.05, "equal", "unresolved"),
        ],
    )
    def test_by_where_the_interval_lies(self, low, high, margin, claim, answer):
        found = verdict(Interval((low + high) / 2, low, high), margin, claim)
        assert found.answer == answer
        assert f"[{low:.4g}, {high:.4g}]" in found.reason

    def test_what_lacks_is_unresolved_in_words(self):
        sure = Interval(1.0, 0.9, 1.1)
        found = verdict(sure, 0.1, "more", ["mamba2, seed 3: not converged", "attention, seed 1: missing"])
        assert (found.answer, found.reason) == (
            "unresolved",
            "mamba2, seed 3: not converged; attention, seed 1: missing",
        )
        assert verdict(None, 0.1, "more").answer == "unresolved"
        for margin, claim, message in (
            (0.0, "equal", "positive"),
            (math.inf, "more", "finite"),
            (0.1, "less", "'less'"),
        ):
            with pytest.raises(ValueError, match=message):
                verdict(sure, margin, claim)
        with pytest.raises(ValueError, match="low <= high"):
            verdict(Interval(0, 1.0, -1.0), 0.1, "more")


class TestStepsToThreshold:
    def test_the_medians_of_freireich(self):
        """Remission in weeks, 6-MP and placebo (Freireich et al. 1963), as SAS's LIFETEST prints them."""
        drug = [6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35]
        seen = [1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
        placebo = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]
        found = steps_to_threshold(drug, seen)
        assert (found.median, found.low, found.high, found.reached, found.runs) == (23, 13, math.inf, 9, 21)
        found = steps_to_threshold(placebo, np.ones(21))
        assert (found.median, found.low, found.high) == (8, 4, 11)

    def test_runs_that_all_arrive_have_their_own_median(self):
        found = steps_to_threshold([900, 300, 500, 700, 1100], [True] * 5)
        assert (found.median, found.low, found.high) == (700, 300, 1100)
        assert str(found) == "700 (300 to 1100; 5 of 5 runs)"
        assert str(steps_to_threshold([400, 400], [True, True])) == "400 (400 to 400; 2 of 2 runs)"

    def test_half_of_the_runs_is_half_however_it_rounds(self):
        for half in range(1, 60):
            found = steps_to_threshold(np.arange(2 * half) + 1, np.arange(2 * half) < half)
            assert (found.median, found.reached) == (half, half)

    def test_a_median_that_is_not_reached_is_infinite(self):
        found = steps_to_threshold([300, 700, 1000, 1000, 1000], [True, True, False, False, False])
        assert (found.median, found.low, found.high) == (math.inf, 300, math.inf)
        assert str(found) == "not reached (300 to not reached; 2 of 5 runs)"
        assert (
            str(steps_to_threshold([9, 9], [False, False])) == "not reached (not reached to not reached; 0 of 2 runs)"
        )

    def test_what_are_no_runs_is_refused(self):
        for steps, reached, message in (
            ([], [], "as many steps as flags"),
            ([1], [True, False], "as many steps as flags"),
            ([math.inf], [False], "steps: expected finite numbers"),
        ):
            with pytest.raises(ValueError, match=message):
                steps_to_threshold(steps, reached)


def test_a_pooled_difference_of_normal_means_has_the_interval_of_welch():
    """Of two arms of one pair, with a column each, pooled as if it were two pairs with an arm that is known exactly."""
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.0, 1.0, (8, 1)), generator.normal(1.0, 3.0, (5, 1))
    intervals = []
    for scores in (a, -b):
        error, freedom = float(scores.std(ddof=1) / np.sqrt(len(scores))), len(scores) - 1.0
        mean = float(scores.mean())
        intervals.append(statistics.Interval(mean, mean, mean, 0.95, error, freedom))
    found = statistics.pooled(intervals)
    welch = stats.ttest_ind(a[:, 0], b[:, 0], equal_var=False).confidence_interval(0.95)
    assert 2 * found.estimate == pytest.approx(a.mean() - b.mean())
    assert (2 * found.low, 2 * found.high) == pytest.approx((welch.low, welch.high))
    with pytest.raises(ValueError, match="at least one"):
        statistics.pooled([])


def test_pooling_what_does_not_vary_gives_no_width():
    still = statistics.Interval(0.5, 0.5, 0.5, 0.95, 0.0, np.inf)
    assert statistics.pooled([still, still]).low == 0.5
