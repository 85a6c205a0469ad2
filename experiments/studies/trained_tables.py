"""What every study that trains models shows: verdicts, how its arms were tuned and converged, what failed and where."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from experiments.report.comparison import listed
from experiments.report.figures import bytes_text
from experiments.report.starts import start_text
from experiments.report.statistics import Interval, mean_interval
from experiments.runs.recorded import RecordedRun
from experiments.studies.claims import Decision, adjusted, bonferroni, decide, not_learnt, scores_of
from experiments.studies.protocol import Progress, rate_of
from experiments.studies.study import Table
from experiments.studies.trained import Claim, Results


def verdicts(found: Results) -> Table:
    """A row for every claim: what is said, by how much it is so here, and the verdict."""
    decisions, changed = decide(found), bonferroni(found)
    rows = [
        [decision.claim.said, _margin(decision.claim), _seen(decision, p_value), _answer(decision)]
        for decision, p_value in zip(decisions, adjusted(decisions), strict=True)
    ]
    said = f"Each interval is of 95 %, and there are {len(rows)} claims."
    if any(decision.verdict.answer != "unresolved" for decision in decisions):
        said += (
            " With Bonferroni's correction these verdicts would be unresolved: " + (", ".join(changed) or "none") + "."
        )
    return Table("Verdicts", [["claim", "margin", "difference seen (95 % interval)", "verdict"], *rows], said)


def _margin(claim: Claim) -> str:
    sign = "> " if claim.kind == "more" else "± "
    return f"{sign}{2**claim.margin:g} times" if claim.threshold is not None else f"{sign}{claim.margin:g}"


def _seen(decision: Decision, p_value: float | None) -> str:
    if (interval := decision.interval) is None:
        return ""
    ends = (interval.estimate, interval.low, interval.high)
    if decision.claim.threshold is not None:
        middle, low, high = (f"{2**end:.2g}" for end in ends)
        return f"{middle} times the steps ({low} to {high})"
    middle, low, high = (f"{end:+.3f}" for end in ends)
    tested = "" if p_value is None else f"; sign flips against no difference p = {p_value:.2g} (Holm)"
    return f"{middle} ({low} to {high}){tested}"


def _answer(decision: Decision) -> str:
    if decision.verdict.answer != "unresolved":
        return f"**{decision.verdict.answer}**"
    first, *others = decision.verdict.reason.split("; ")
    return f"unresolved: {first}" + (f"; {len(others)} more" if others else "")


def training(found: Results) -> Table:
    """How each arm was tuned, and what twice its budget gained."""
    header = ["arm", "start", "rate, of those tried", "steps", "stable phase ended by", "twice the budget gains",
              "parameters", "state", "processor time"]  # fmt: skip
    rows = [header, *(_training_row(each) for each in found.arms.values())]
    if found.version.learnt is None:
        return Table("Tuning and convergence", rows)
    learnt = ["did not learn", *(_not_learnt_cell(found, name) for name in found.arms)]
    return Table("Tuning and convergence", [[*row, cell] for row, cell in zip(rows, learnt, strict=True)])


def _not_learnt_cell(found: Results, name: str) -> str:
    reporting = len(found.arms[name].reporting)
    return f"{not_learnt(found, name)} of {reporting}" if reporting else ""


def so_text(answer: str | None) -> str:
    """The answer to a claim as the end of "that ... is"."""
    return {"yes": "so", "no": "not so"}.get(answer or "", "unresolved")


def not_learnt_text(found: Results) -> str:
    """A sentence that names the arms of which runs have not learnt their task; empty where there are none."""
    arms = [f"{name} ({_not_learnt_cell(found, name)})" for name in found.arms if not_learnt(found, name)]
    if not arms or (asked := found.version.learnt) is None:
        return ""
    return (
        f" Runs that did not learn (below {asked.least:g} on {asked.split}), whose scores decide nothing in favour of"
        f" others: {', '.join(arms)}."
    )


def _training_row(progress: Progress) -> list[str]:
    name, tried = progress.arm.name, listed([rate_of(rate) for rate in progress.rates])
    runs = [run for run in progress.reporting if run.finished]
    if progress.chosen is None or not runs:
        return [name, "", f"none yet of {tried}", "", "", "", "", "", ""]
    endings = Counter(run.record["results"].get("stable_phase", {}).get("ending", "its steps") for run in runs)
    gained, model = progress.gained(), runs[0].record["model"]
    steps = [run.record["cost"]["steps"] for run in runs]
    return [
        name,
        start_text(runs[0].config["model"]),
        f"{progress.chosen:g} of {tried}" + (", **at the edge**" if progress.at_edge else ""),
        f"{statistics.median(steps):,.0f}",
        ", ".join(f"{ending} {number}" for ending, number in sorted(endings.items())),
        "" if gained is None else f"{gained:+.3f}" + ("" if progress.converged else ", **not converged**"),
        f"{model['parameters']:,}",
        bytes_text(model["state_bytes"]),
        f"{statistics.median(run.record['cost']['processor_seconds'] for run in runs):.0f} s",
    ]


def unfinished(found: Results) -> list[str]:
    """A sentence where runs are missing, and one for each arm that is missing some for good."""
    done, lost = sum(not progress.wanted() for progress in found.arms.values()), found.stranded
    said = f"**In progress**: {done} of {len(found.arms)} arms are done; the others are unresolved until they are."
    return [
        *([said] if done + len(lost) < len(found.arms) else []),
        *(f"**Runs of {name} are missing for good**: they start from runs of {' and '.join(sources)}, or learn of them,"
          " and these failed." for name, sources in lost.items()),
    ]  # fmt: skip


def failures(runs: Sequence[RecordedRun]) -> str:
    """The runs that failed, with their reasons."""
    failed = [run for run in runs if not run.finished]
    if not failed:
        return "No run failed."
    lines = [f"- {run.record['study']['arm']}, {run.record['study']['stage']}, rate {run.config['train']['lr']:g}, seed"
             f" {run.config['seed']}: {run.record.get('reason', run.ending)}" for run in failed]  # fmt: skip
    return f"**Failed runs: {len(failed)} of {len(runs)}**\n\n" + "\n".join(lines)


def machines(runs: Sequence[RecordedRun]) -> list[str]:
    """The machines and versions of the code, with the number of runs that each made."""
    counts = Counter(_machine(run) for run in runs if "hardware" in run.record)
    return [f"- {number} runs: {text}" for text, number in sorted(counts.items())]


def _machine(run: RecordedRun) -> str:
    hardware, software = run.record["hardware"], run.record["environment"]
    versions = f"Python {software['python']}, torch {software['torch']}"
    threads = f"{hardware['threads']} thread{'' if hardware['threads'] == 1 else 's'}"
    return f"{run.device}, {threads} per run; {versions}; code {run.commit}"


def mean_of(progress: Progress, split: str) -> Interval | None:
    """The mean of a split over seeds and sequences; ``None`` before two seeds are there."""
    runs = [run for run in progress.reporting if run.finished]
    if len(runs) < 2 or runs[0].items(split) is None:
        return None
    return mean_interval(scores_of(progress, Claim("", "", (), "more", 0.0, split)))


def median_text(values: Sequence[float]) -> str:
    """The median and the range of some numbers; empty where there are none."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else ""


def mean_text(progress: Progress, split: str) -> str:
    found = mean_of(progress, split)
    return "" if found is None else f"{found.estimate:.3f} ({max(found.low, 0):.3f} to {min(found.high, 1):.3f})"
