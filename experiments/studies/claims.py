"""What the recorded runs say of a study's claims: yes, no or unresolved, by its margins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.report.statistics import Interval, SignFlip, Verdict, difference, holm, pooled, sign_flip, verdict
from experiments.runs.recorded import RecordedRun
from experiments.studies.protocol import Progress
from experiments.studies.study import Claim, Results
from experiments.util.errors import RunnerError


@dataclass(frozen=True)
class Decision:
    """A claim and what was found.

    Attributes:
        interval: of the difference, or of the mean of several; ``None`` where too few runs are there.
        flips: a sign-flip test over all seeds of all pairs, for claims on several pairs; ``None`` for others.
    """

    claim: Claim
    verdict: Verdict
    interval: Interval | None
    flips: SignFlip | None = None


def decide(results: Results) -> list[Decision]:
    """The decisions on all claims of a study."""
    return [decide_one(results, claim) for claim in results.version.claims]


def decide_one(results: Results, claim: Claim) -> Decision:
    """The decision on one claim."""
    names = list(dict.fromkeys(name for pair in claim.pairs for name in pair))
    lacking = [reason for name in names for reason in lacks(results.arms[name])]
    scores = {name: scores_of(results.arms[name], claim) for name in names}
    if any(len(each) < 2 for each in scores.values()):
        return Decision(claim, verdict(None, claim.margin, claim.kind, lacking), None)
    lacking += _censored(results, claim)
    found = [difference(scores[left], scores[right]) for left, right in claim.pairs]
    interval = found[0] if len(found) == 1 else pooled(found)
    flips = None
    if len(found) > 1:
        flips = sign_flip(np.concatenate([_paired(scores[left], scores[right]) for left, right in claim.pairs]))
    return Decision(claim, verdict(interval, claim.margin, claim.kind, lacking), interval, flips)


def adjusted(decisions: Sequence[Decision]) -> list[float | None]:
    """The p-values of the sign-flip tests, adjusted by Holm for as many as there are; ``None`` where there is none."""
    tested = [decision.flips.p_value for decision in decisions if decision.flips is not None]
    values = iter(holm(tested).tolist() if tested else [])
    return [None if decision.flips is None else next(values) for decision in decisions]


def lacks(progress: Progress) -> list[str]:
    """Why nothing can be said of an arm yet, or no more."""
    name, protocol = progress.arm.name, progress.protocol
    if progress.chosen is None:
        return [f"{name} is being tuned"]
    found = []
    if progress.at_edge:
        found.append(f"the rate of {name}, {progress.chosen:g}, lies at an edge of its grid")
    failed = [run for run in progress.reporting if not run.finished]
    if failed and not progress.is_share:
        found.append(f"{len(failed)} runs of {name} failed, and have no score")
    if (there := len(progress.reporting)) < len(protocol.reporting_seeds):
        found.append(f"{name} has {there} of {len(protocol.reporting_seeds)} seeds")
    elif progress.middle is None:
        found.append(f"every run of {name} failed")
    elif progress.converged is None:
        found.append(f"{name} was not checked at twice the budget")
    elif not progress.converged:
        found.append(f"{name} has not converged: twice the budget gains {progress.gained():.3f}")
    return found


def scores_of(progress: Progress, claim: Claim) -> np.ndarray:
    """``[seeds, items]``, more is better: the scores of the test sequences, or minus the steps, of the reporting runs.

    A run that failed got nothing right where the scores are shares, and else has none.
    """
    if claim.threshold is not None:
        return np.array([[np.log2(steps_to(run, claim.threshold)[0])] for run in progress.reporting if run.metrics])
    rows = [_items(run, claim.split) if run.finished else None for run in progress.reporting]
    finished = [row for row in rows if row is not None]
    if not progress.is_share:
        return np.array(finished)
    return np.array([np.zeros_like(finished[0]) if row is None else row for row in rows] if finished else [])


def _items(run: RecordedRun, split: str) -> np.ndarray:
    """The scores of a split's sequences, more is better.

    Raises:
        RunnerError: the record has none.
    """
    if (scores := run.items(split)) is None:
        raise RunnerError(f"the record of {run.name} has no item scores of the split {split!r}: train the run again")
    return scores if run.record["metric"]["higher_is_better"] else -scores


def steps_to(run: RecordedRun, threshold: float) -> tuple[int, bool]:
    """The step of the first evaluation with so good a validation metric and ``True``, or the last and ``False``."""
    metric = run.record["metric"]
    name, sign = f"validation_{metric['name']}", 1 if metric["higher_is_better"] else -1
    for line in run.metrics:
        if sign * line[name] >= sign * threshold:
            return line["step"], True
    return run.metrics[-1]["step"], False


def _censored(results: Results, claim: Claim) -> list[str]:
    """Of a claim on steps, the arms on the right, said to be faster, of which a run never got there.

    One on the left that never did has taken more steps than it is counted with, which speaks for the claim.
    """
    if claim.threshold is None:
        return []
    right = dict.fromkeys(name for _, name in claim.pairs)
    late = {name: sum(not steps_to(run, claim.threshold)[1] for run in results.arms[name].reporting) for name in right}
    return [f"{number} runs of {name} never reached {claim.threshold:g}" for name, number in late.items() if number]


def _paired(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The differences of the seeds' means, as far as both have seeds."""
    both = min(len(left), len(right))
    return left[:both].mean(axis=1) - right[:both].mean(axis=1)


def said_of(decisions: Iterable[Decision], answer: str) -> list[str]:
    """The names of the claims with that answer."""
    return [decision.claim.name for decision in decisions if decision.verdict.answer == answer]
