"""The verdicts of a study again, from its files alone: nothing here is the project's own code.

Reads ``plan.json`` and ``records.jsonl`` as a stranger would, and computes intervals by formula where the project
draws bootstraps: the variance of a mean over seeds and items that were both drawn is, to first order, that of the means
of seeds over their number plus that of the means of items over theirs.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student


@dataclass(frozen=True)
class Again:
    """A claim decided again.

    Attributes:
        answer: ``yes``, ``no`` or ``unresolved``.
        low, high: of the interval; NaN where there is none.
        near: how far from the margin an end of the interval lies at least, as a share of its width.
    """

    answer: str
    low: float = math.nan
    high: float = math.nan
    near: float = math.inf


def recompute(folder: Path) -> dict[str, Again]:
    """Every claim of the study in a folder."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {}
    for name, claim in plan["claims"].items():
        found[name] = _decide(claim, plan["protocol"], lines)
        if "learnt" in plan and claim["threshold"] is None and _voided(claim, found[name].answer, plan, lines):
            found[name] = replace(found[name], answer="unresolved")
    return found


def _voided(claim: dict[str, Any], answer: str, plan: dict[str, Any], lines: list[dict[str, Any]]) -> bool:
    """Whether runs at chance could have turned an answer: for "yes" those on the right, for "no" those on the left."""
    for left, right in claim["pairs"]:
        both = claim["kind"] == "equal"
        doubtful = [right] * (both or answer == "yes") + [left] * (both or answer == "no")
        for arm in doubtful if answer != "unresolved" else ():
            for run in _reporting(arm, plan["protocol"], lines) or ():
                over = run["record"]["status"] == "finished"
                if not over or np.mean(_items(run, plan["learnt"]["split"])) < plan["learnt"]["least"]:
                    return True
    return False


def _decide(claim: dict[str, Any], protocol: dict[str, Any], lines: list[dict[str, Any]]) -> Again:
    names = {name for pair in claim["pairs"] for name in pair}
    arms = {name: _reporting(name, protocol, lines) for name in names}
    if any(runs is None for runs in arms.values()):
        return Again("unresolved")
    sums, variances, freedoms, stuck = 0.0, [], [], False
    for left, right in claim["pairs"]:
        a, b = (_scores(arms[name], claim) for name in (left, right))
        if a is None or b is None or (claim["threshold"] is not None and not _all_reach(arms[right], claim)):
            return Again("unresolved")
        stuck |= claim["threshold"] is not None and not _all_reach(arms[left], claim)
        mean, variance, freedom = _difference(a, b)
        sums += mean
        variances.append(variance)
        freedoms.append(freedom)
    count = len(claim["pairs"])
    total = sum(variances)
    freedom = total**2 / sum(v**2 / f for v, f in zip(variances, freedoms, strict=True) if v) if total else math.inf
    reach = student.ppf(0.975, freedom) * math.sqrt(total) / count if total else 0.0
    low, high, margin = sums / count - reach, sums / count + reach, claim["margin"]
    if claim["kind"] == "more":
        answer = "yes" if low > margin else "no" if high <= margin else "unresolved"
        gaps = [abs(low - margin), abs(high - margin)]
    else:
        inside, outside = -margin < low and high < margin, low >= margin or high <= -margin
        answer = "yes" if inside else "no" if outside else "unresolved"
        gaps = [abs(end - side * margin) for end in (low, high) for side in (-1, 1)]
    if stuck and answer == "no":
        answer = "unresolved"
    if claim["threshold"] is not None and answer != "unresolved":
        # Between two evaluations nobody looked: each side may have been there up to one evaluation before.
        sooner = [float(np.mean([_blur(arms[pair[side]], claim) for pair in claim["pairs"]])) for side in (0, 1)]
        if any((end > margin) != (answer == "yes") for end in (low - sooner[0], high + sooner[1])):
            answer = "unresolved"
    return Again(answer, low, high, min(gaps) / max(high - low, 1e-12))


def _difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """The difference of two means, its variance and Satterthwaite's degrees of freedom."""
    seeds = [each.mean(axis=1).var(ddof=1) / len(each) for each in (a, b)]
    items = 0.0 if a.shape[1] == 1 else (a.mean(axis=0) - b.mean(axis=0)).var(ddof=1) / a.shape[1]
    parts = [(seeds[0], len(a) - 1), (seeds[1], len(b) - 1), (items, max(a.shape[1] - 1, 1))]
    total = sum(variance for variance, _ in parts)
    freedom = total**2 / sum(variance**2 / count for variance, count in parts) if total else math.inf
    return a.mean() - b.mean(), total, freedom


def _reporting(arm: str, protocol: dict[str, Any], lines: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The reporting runs of an arm that nothing is to be said against; ``None`` for another arm."""
    own = [line for line in lines if line["record"]["study"]["arm"] == arm]
    sign = 1 if all(line["record"].get("metric", {}).get("higher_is_better", True) for line in own) else -1
    share = all(line["record"].get("metric", {}).get("unit", "") == "" for line in own)

    def stage(name: str) -> list[dict[str, Any]]:
        return [line for line in own if line["record"]["study"]["stage"] == name]

    by_rate: dict[float, list[float]] = {}
    steps: dict[float, list[int]] = {}
    for line in stage("tuning"):
        value = line["record"].get("results", {}).get("validation")
        by_rate.setdefault(line["config"]["train"]["lr"], []).append(-math.inf if value is None else sign * value)
        if value is not None:
            steps.setdefault(line["config"]["train"]["lr"], []).append(line["record"]["cost"]["steps"])
    scores = {rate: float(np.mean(values)) for rate, values in sorted(by_rate.items())}
    if len(scores) < len(protocol["rates"]) or min(map(len, by_rate.values())) < len(protocol["tuning_seeds"]):
        return None
    best = max(scores.values())
    rates = list(scores)
    tied = [n for n, rate in enumerate(rates)
            if scores[rate] >= best - protocol["tie"] * (1 if share or math.isinf(best) else abs(best))]  # fmt: skip
    pace = [float(np.mean(steps.get(rates[n]) or [0])) for n in tied]
    soon = [n for n, count in zip(tied, pace, strict=True) if count <= 1.1 * min(pace)]
    chosen = min(soon, key=lambda n: (abs(n - (soon[0] + soon[-1]) / 2), n))
    reporting = [line for line in stage("reporting") if line["config"]["train"]["lr"] == rates[chosen]]
    finished = [line for line in reporting if line["record"]["status"] == "finished"]
    at_edge = chosen in (0, len(rates) - 1)
    if at_edge or len(reporting) < len(protocol["reporting_seeds"]) or not finished:
        return None
    if not share and len(finished) < len(reporting):
        return None
    if protocol.get("fixed_budget"):
        return reporting
    scored = [(sign * line["record"]["results"]["validation"], line["config"]["seed"], line) for line in finished]
    *_, worst = min(scored, key=lambda each: each[:2])
    before = worst["record"]["results"]["validation"]
    if not (share and sign > 0 and before >= 1 - protocol["gain"]):
        key = rates[chosen], worst["config"]["seed"]
        doubled = [line for line in stage("doubled") if (line["config"]["train"]["lr"], line["config"]["seed"]) == key]
        after = [line["record"]["results"]["validation"] for line in doubled if line["record"]["status"] == "finished"]
        if not after:
            return None
        gained = sign * (after[0] - before) / (1 if share else abs(before))
        if gained > protocol["gain"]:
            return None
    return reporting


def _scores(runs: list[dict[str, Any]] | None, claim: dict[str, Any]) -> np.ndarray | None:
    assert runs is not None
    if claim["threshold"] is not None:
        return np.array([[math.log2(_steps(run, claim["threshold"])[0])] for run in runs if run.get("metrics")])
    rows = [None if run["record"]["status"] != "finished" else _items(run, claim["split"]) for run in runs]
    if claim.get("whole"):
        rows = [None if row is None else (row == 1) * 1.0 for row in rows]
    size = next(len(row) for row in rows if row is not None)
    return np.array([np.zeros(size) if row is None else row for row in rows])


def _items(run: dict[str, Any], split: str) -> np.ndarray:
    results = run["record"]["results"]
    text = results["tests"][split]["items"] if "tests" in results else results["items"]
    head, packed = text.split(":")
    kind, denominator = head.split("/")
    numbers = np.frombuffer(zlib.decompress(base64.b64decode(packed)), f"<{kind}").astype(float) / int(denominator)
    return numbers if run["record"]["metric"]["higher_is_better"] else -numbers


def _steps(run: dict[str, Any], threshold: float) -> tuple[int, bool]:
    metric = run["record"]["metric"]
    sign = 1 if metric["higher_is_better"] else -1
    there = [each["step"] for each in run["metrics"] if sign * each[f"validation_{metric['name']}"] >= sign * threshold]
    return (there[0], True) if there else (run["metrics"][-1]["step"], False)


def _blur(runs: list[dict[str, Any]] | None, claim: dict[str, Any]) -> float:
    """By how much log2 of the steps would be less at the evaluation before, in the mean of an arm."""
    assert runs is not None
    found = []
    for run in runs:
        steps, there = _steps(run, claim["threshold"])
        before = max(steps - run["metrics"][0]["step"], 1) if there else steps
        found.append(math.log2(steps) - math.log2(before))
    return float(np.mean(found))


def _all_reach(runs: list[dict[str, Any]] | None, claim: dict[str, Any]) -> bool:
    assert runs is not None
    return all(_steps(run, claim["threshold"])[1] for run in runs if run.get("metrics"))
