"""What the recorded runs say of a study's claims: yes, no or unresolved, by its margins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.report.statistics import Interval, SignFlip, Verdict, difference, holm, pooled, sign_flip, verdict
from experiments.runs.recorded import RecordedRun
from experiments.studies.protocol import Progress
from experiments.studies.trained import Claim, Results
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


def decide(results: Results, confidence: float = 0.95) -> list[Decision]:
    """The decisions on all claims of a study."""
    if confidence not in results.decided:
        results.decided[confidence] = [decide_one(results, claim, confidence) for claim in results.version.claims]
    return results.decided[confidence]


def decide_one(results: Results, claim: Claim, confidence: float = 0.95) -> Decision:
    """The decision on one claim."""
    names = list(dict.fromkeys(name for pair in claim.pairs for name in pair))
    lacking = [reason for name in names for reason in lacks(results.arms[name])]
    scores = {name: scores_of(results.arms[name], claim) for name in names}
    if any(len(each) < 2 for each in scores.values()):
        return Decision(claim, verdict(None, claim.margin, claim.kind, lacking), None)
    interval = _interval(claim, scores, scores, confidence)
    decided = verdict(interval, claim.margin, claim.kind, lacking)
    if claim.threshold is not None and decided.answer != "unresolved":
        decided = _of_steps(results, claim, decided, confidence)
    elif decided.answer != "unresolved":
        decided = _of_learners(results, claim, decided)
    flips = None
    if len(claim.pairs) > 1:
        flips = sign_flip(np.concatenate([_paired(scores[left], scores[right]) for left, right in claim.pairs]))
    return Decision(claim, decided, interval, flips)


def _interval(
    claim: Claim, left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray], confidence: float
) -> Interval:
    found = [difference(left[a], right[b], confidence=confidence) for a, b in claim.pairs]
    return found[0] if len(found) == 1 else pooled(found, confidence)


def _of_steps(results: Results, claim: Claim, decided: Verdict, confidence: float) -> Verdict:
    """A verdict on steps, unresolved where runs that never got there or the time between evaluations leave it open.

    A run that never got there has taken more steps than it is counted with: on the left that speaks for the claim, so
    it leaves a "yes" alone, on the right against it.
    """
    right = dict.fromkeys(name for _, name in claim.pairs)
    left = dict.fromkeys(name for name, _ in claim.pairs)
    late = _never(results, claim, right)
    late += _never(results, claim, left) if decided.answer == "no" or claim.kind == "equal" else []
    if late:
        return Verdict("unresolved", "; ".join(late))
    seen, before = ({name: scores_of(results.arms[name], claim, early) for name in {**left, **right}}
                    for early in (False, True))  # fmt: skip
    ends = [_interval(claim, before, seen, confidence), _interval(claim, seen, before, confidence)]
    if {verdict(end, claim.margin, claim.kind).answer for end in ends} != {decided.answer}:
        return Verdict("unresolved", "evaluations are too far apart to tell")
    return decided


def _of_learners(results: Results, claim: Claim, decided: Verdict) -> Verdict:
    """A verdict on scores, unresolved where runs that have not learnt their task leave it open.

    Such a run scores less than its model could: on the right that speaks for the claim, so it voids a "yes", on the
    left against it, so it voids a "no". Of a claim that arms are equal it voids either.
    """
    sides = {"yes": (1,), "no": (0,)}[decided.answer] if claim.kind == "more" else (0, 1)
    names = dict.fromkeys(pair[side] for side in sides for pair in claim.pairs)
    found = {name: not_learnt(results, name) for name in names}
    open_yet = [f"{number} of {len(results.arms[name].reporting)} seeds of {name} did not learn"
                for name, number in found.items() if number]  # fmt: skip
    return Verdict("unresolved", "; ".join(open_yet)) if open_yet else decided


def not_learnt(results: Results, name: str) -> int:
    """How many reporting runs of an arm have not learnt their task, those that failed among them; 0 where the study
    does not ask.
    """
    if (asked := results.version.learnt) is None:
        return 0
    runs = results.arms[name].reporting
    return sum(not run.finished or _items(run, asked.split).mean() < asked.least for run in runs)


def bonferroni(results: Results) -> list[str]:
    """The claims whose verdicts would be others at 95 % over all claims together."""
    confidence = 1 - 0.05 / max(len(results.version.claims), 1)
    pairs = zip(decide(results), decide(results, confidence), strict=True)
    return [one.claim.name for one, strict in pairs if one.verdict.answer != strict.verdict.answer]


def adjusted(decisions: Sequence[Decision]) -> list[float | None]:
    """The p-values of the sign-flip tests, adjusted by Holm for as many as there are; ``None`` where there is none."""
    tested = [decision.flips.p_value for decision in decisions if decision.flips is not None]
    values = iter(holm(tested).tolist() if tested else [])
    return [None if decision.flips is None else next(values) for decision in decisions]


def lacks(progress: Progress) -> list[str]:
    """Why no verdict on an arm is possible."""
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
    elif progress.worst is None:
        found.append(f"every run of {name} failed")
    elif progress.converged is None:
        checked = "failed" if progress.doubled else "is missing"
        found.append(f"the run of {name} at twice the budget {checked}")
    elif not progress.converged:
        found.append(f"{name} has not converged: twice the budget gains {progress.gained():.3f}")
    return found


def scores_of(progress: Progress, claim: Claim, early: bool = False) -> np.ndarray:
    """``[seeds, items]`` of the reporting runs: the scores of the test sequences, of which more is better; or, for a
    claim on steps, log2 of the steps, of which more is slower.

    A run that failed got nothing right where the scores are shares, and else has none.

    Args:
        early: count the evaluation before the one at which the threshold was seen, which is as late as it was not.
    """
    if claim.threshold is not None:
        steps = [steps_to(run, claim.threshold) for run in progress.reporting if run.metrics]
        back = progress.reporting[0].metrics[0]["step"] if early and steps else 0
        return np.array([[np.log2(max(count - back * reached, 1))] for count, reached in steps])
    rows = [_items(run, claim.split) if run.finished else None for run in progress.reporting]
    rows = [np.equal(row, 1.0).astype(float) if claim.whole and row is not None else row for row in rows]
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
    return (run.metrics[-1]["step"] if run.metrics else 0), False


def _never(results: Results, claim: Claim, names: Iterable[str]) -> list[str]:
    """Of a claim on steps, the arms of which a run never got there."""
    assert claim.threshold is not None
    late = {name: sum(not steps_to(run, claim.threshold)[1] for run in results.arms[name].reporting) for name in names}
    return [f"{number} runs of {name} never reached {claim.threshold:g}" for name, number in late.items() if number]


def _paired(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The differences of the seeds' means, as far as both have seeds."""
    both = min(len(left), len(right))
    return left[:both].mean(axis=1) - right[:both].mean(axis=1)
