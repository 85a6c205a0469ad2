"""How an arm of a study is trained: tuned on seeds of its own, reported on others, and checked at twice the budget.

Which runs are wanted follows from the runs that are there, so that a study can be stopped anywhere and goes on with
what is missing:

1. *Tuning*: every rate of the grid on the tuning seeds. Where the best is at an edge, the grid is extended there.
2. *Reporting*: the best rate on the reporting seeds, from which all results are.
3. *Doubled*: the worst of the reporting seeds on validation once more, at twice the steps that it took, unless nothing
   is left to gain. Where that gains more than ``gain``, the arm has not converged and is not ranked.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from experiments.config.schema import without
from experiments.runs.recorded import RecordedRun

Stage = Literal["tuning", "reporting", "doubled"]

PACE = 1.1
"""Numbers of steps within this factor count as equal."""


@dataclass(frozen=True)
class Arm:
    """One of what a study compares.

    Attributes:
        name: in tables and records.
        overrides: of the study's common configuration, in the grammar of ``experiments.run``.
        factors: the level of each factor of the study, such as ``{"mixer": "gla", "gates": "slow"}``.
        start, teacher: the arms of whose runs, of the same seed and at the rate that was chosen, its runs take their
            first weights, and learn; they are trained before.
    """

    name: str
    overrides: str
    factors: Mapping[str, str] = field(default_factory=dict)
    start: str | None = None
    teacher: str | None = None

    @property
    def sources(self) -> dict[str, str]:
        """Those arms by the option of training that names a run of them."""
        named = {"start_from": self.start, "teacher": self.teacher}
        return {key: arm for key, arm in named.items() if arm is not None}


@dataclass(frozen=True)
class Wanted:
    """A run that a study wants.

    Attributes:
        rate: the learning rate.
        steps: of a doubled run, its number of steps; ``None`` where convergence decides.
    """

    arm: str
    stage: Stage
    rate: float
    seed: int
    steps: int | None = None

    @property
    def key(self) -> tuple[str, str, float, int]:
        return self.arm, self.stage, self.rate, self.seed


@dataclass(frozen=True)
class Protocol:
    """The numbers of this procedure, committed before a study's runs.

    Attributes:
        rates: the first grid in half decades: k stands for the learning rate ``10^(k / 2)``, to one digit.
        most_rates: how many rates are tried at most as the grid is extended.
        tuning_seeds, reporting_seeds: of which none is in both.
        tie: a rate whose score is this near to the best is as good, and of these the one that took the fewest steps is
            chosen; where several took about as few (within ``PACE``), the one in the middle of these.
        gain: what an arm that has converged may gain at most from twice the budget.
        tests_for_reporting: whether the tests besides that of the task's own options (``test_lengths``, ``test_on``)
            are of the reporting runs alone. Nothing is chosen by a test, and long ones take long.
        fixed_budget: whether arms are compared after so many steps as they have, and none is asked to have converged:
            nothing is trained at twice the budget.
    """

    rates: tuple[int, ...] = (-7, -6, -5, -4, -3)
    most_rates: int = 9
    tuning_seeds: tuple[int, ...] = (100, 101, 102)
    reporting_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tie: float = 0.01
    gain: float = 0.02
    tests_for_reporting: bool = False
    fixed_budget: bool = False

    def __post_init__(self):
        if both := set(self.tuning_seeds) & set(self.reporting_seeds):
            raise ValueError(f"seeds {sorted(both)} are for tuning and for reporting; none may be both")
        if list(self.rates) != list(range(self.rates[0], self.rates[0] + len(self.rates))):
            raise ValueError(f"rates must be half decades one after the other, got {self.rates}")

    def plain(self) -> dict[str, Any]:
        """As it stands in a plan, which has nothing of what later versions added and a study does not use."""
        later = ("tests_for_reporting", "fixed_budget")
        return without(asdict(self), tuple(name for name in later if not getattr(self, name)))


LONG_RUNS = Protocol(rates=(-6, -5, -4), most_rates=6, tuning_seeds=(100,))
"""Of studies whose runs take minutes each: few rates to begin with, on one seed."""

IN_MINUTES = Protocol(rates=(-5, -4), most_rates=2, tuning_seeds=(100,), reporting_seeds=(0, 1))
"""Of small versions, which show that a study runs, and decide nothing."""


def rate_of(half_decades: int) -> float:
    """``-5`` is 0.003."""
    return float(f"{10 ** (half_decades / 2):.0e}")


@dataclass(frozen=True)
class Progress:
    """The runs of one arm that are over, and what follows from them."""

    protocol: Protocol
    arm: Arm
    runs: Mapping[tuple[str, str, float, int], RecordedRun]

    def of(self, stage: Stage, rate: float, seeds: Iterable[int]) -> list[RecordedRun]:
        """The runs of a stage that are over."""
        keys = ((self.arm.name, stage, rate, seed) for seed in seeds)
        return [self.runs[key] for key in keys if key in self.runs]

    @cached_property
    def rates(self) -> list[int]:
        """The grid, extended as far as the runs there ask for."""
        rates = list(self.protocol.rates)
        while (towards := self._outward(rates)) is not None and len(rates) < self.protocol.most_rates:
            rates = [rates[0] - 1, *rates] if towards < 0 else [*rates, rates[-1] + 1]
        return rates

    def _outward(self, rates: Sequence[int]) -> int | None:
        """Where the grid has to be extended: -1 or 1, ``None`` where the best is inside or nobody knows it yet."""
        best = self._best(rates)
        if best is None or rates[0] < best < rates[-1]:
            return None
        return -1 if best == rates[0] else 1

    def _best(self, rates: Sequence[int]) -> int | None:
        """The best rate on validation; ``None`` before all runs of tuning are over."""
        scores = {each: self.score(each) for each in rates}
        if any(score is None for score in scores.values()):
            return None
        best = max(score for score in scores.values() if score is not None)
        tied = [each for each, score in scores.items() if score is not None and score >= best - self._scaled(best)]
        steps = {each: self._steps(each) for each in tied}
        soon = [each for each in tied if steps[each] <= PACE * min(steps.values())]
        middle = (soon[0] + soon[-1]) / 2
        return min(soon, key=lambda each: (abs(each - middle), each))

    def _steps(self, rate: int) -> float:
        """The mean number of steps that the tuning runs of a rate took; 0 where all failed."""
        runs = self.of("tuning", rate_of(rate), self.protocol.tuning_seeds)
        return statistics.fmean([run.record["cost"]["steps"] for run in runs if run.finished] or [0])

    def _scaled(self, score: float) -> float:
        """The difference below which scores are tied: of shares absolute, of others relative."""
        if not math.isfinite(score):
            return 0.0
        return self.protocol.tie * (1.0 if self.is_share else abs(score))

    def score(self, rate: int) -> float | None:
        """The mean validation metric of the tuning seeds, larger is better, failed runs the worst; ``None`` before all
        are over.
        """
        runs = self.of("tuning", rate_of(rate), self.protocol.tuning_seeds)
        if len(runs) < len(self.protocol.tuning_seeds):
            return None
        if not all(run.finished for run in runs):
            return -math.inf
        return self._sign * statistics.fmean(run.result("validation") for run in runs)

    @property
    def _metric(self) -> Mapping[str, Any]:
        return next((run.record["metric"] for run in self.runs.values() if run.finished), {})

    @property
    def _sign(self) -> int:
        return 1 if self._metric.get("higher_is_better", True) else -1

    @property
    def is_share(self) -> bool:
        """Whether the metric is a share between 0 and 1, as accuracy is."""
        return self._metric.get("unit", "") == ""

    @property
    def chosen(self) -> float | None:
        """The learning rate that tuning chose; ``None`` while it is not over."""
        return None if (best := self._chosen) is None else rate_of(best)

    @property
    def _chosen(self) -> int | None:
        return self._best(self.rates)

    @property
    def at_edge(self) -> bool:
        """Whether the rate that was chosen is the smallest or the largest that was tried."""
        return self._chosen in (self.rates[0], self.rates[-1])

    @property
    def reporting(self) -> list[RecordedRun]:
        """The runs that results are from: those of the chosen rate on the reporting seeds that are over."""
        return [] if self.chosen is None else self.of("reporting", self.chosen, self.protocol.reporting_seeds)

    def source(self, seed: int) -> RecordedRun | None:
        """The run of a seed, for tuning or reporting, that others start from or learn from; ``None`` before it is over.

        It is at the rate that was chosen; one that failed is none.
        """
        if self.chosen is None:
            return None
        found = [*self.of("reporting", self.chosen, [seed]), *self.of("tuning", self.chosen, [seed])]
        return found[0] if found and found[0].finished else None

    @property
    def doubled(self) -> RecordedRun | None:
        """The run at twice the budget; ``None`` while it is missing, or where there was nothing left to gain."""
        if self.chosen is None or (worst := self.worst) is None:
            return None
        found = self.of("doubled", self.chosen, [worst.config["seed"]])
        return found[0] if found else None

    @property
    def worst(self) -> RecordedRun | None:
        """The finished reporting run with the worst result on validation; ``None`` before all are over."""
        finished = [run for run in self.reporting if run.finished]
        if len(self.reporting) < len(self.protocol.reporting_seeds) or not finished:
            return None
        return min(finished, key=lambda run: (self._sign * run.result("validation"), run.config["seed"]))

    def gained(self) -> float | None:
        """What twice the budget gained: of shares absolute, of others relative; ``None`` while that is unknown."""
        if (worst := self.worst) is None:
            return None
        if self._cannot_gain(worst):
            return 0.0
        doubled = self.doubled
        if doubled is None or not doubled.finished:
            return None
        difference = self._sign * (doubled.result("validation") - worst.result("validation"))
        return difference if self.is_share else difference / abs(worst.result("validation"))

    def _cannot_gain(self, run: RecordedRun) -> bool:
        """Whether a share is so near to one that nothing could gain more than is allowed."""
        return self.is_share and self._sign > 0 and run.result("validation") >= 1 - self.protocol.gain

    @property
    def converged(self) -> bool | None:
        """Whether twice the budget gained no more than is allowed, or nobody asks; ``None`` while that is unknown."""
        if self.protocol.fixed_budget:
            return True
        gained = self.gained()
        return None if gained is None else gained <= self.protocol.gain

    def wanted(self) -> list[Wanted]:
        """The runs that are known to be missing by now; empty where the arm is done."""
        name, protocol = self.arm.name, self.protocol
        # The first seed of all rates comes first, so that there is something to see early.
        tuning = [Wanted(name, "tuning", rate_of(rate), seed) for seed in protocol.tuning_seeds for rate in self.rates]
        missing = [each for each in tuning if each.key not in self.runs]
        if missing or self.chosen is None:
            return missing
        reporting = [Wanted(name, "reporting", self.chosen, seed) for seed in protocol.reporting_seeds]
        missing = [each for each in reporting if each.key not in self.runs]
        if protocol.fixed_budget:
            return missing
        if missing or (worst := self.worst) is None or self._cannot_gain(worst) or self.doubled:
            return missing
        steps = 2 * worst.record["cost"]["steps"]
        return [Wanted(name, "doubled", self.chosen, worst.config["seed"], steps)]
