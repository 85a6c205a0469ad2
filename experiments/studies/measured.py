"""A study that measures decoding: its plan, its records and what they say of its claims.

``records.jsonl`` has a line for each condition's models, for each pass of reading prompts and for each round of
decoding. A claim compares times from the same rounds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.bench.decoding import FILLED, Condition
from experiments.bench.decoding_rounds import MODELS, PREFILL, ROUND, counts, missing
from experiments.config.schema import without
from experiments.report.figures import bytes_text
from experiments.report.statistics import Interval, Verdict, mean_interval, verdict
from experiments.studies.records import FILE
from experiments.studies.study import Planned
from experiments.util.errors import RunnerError
from experiments.util.files import write_atomic

FORMAT = 1
"""Of the lines; another is refused."""

Point = tuple[str, int | str]
"""A model and a context, or the state that was filled."""


@dataclass(frozen=True)
class TimeClaim:
    """A statement on ratios of times per token, with the margin beyond which a ratio matters.

    Attributes:
        name: short, for tables and tests.
        said: the statement.
        pairs: of points, ``(left, right)``; of several the geometric mean of the ratios counts.
        kind: ``more``: the left ones take more than ``factor`` times as long; ``less``: they take less than that;
            ``equal``: the ratio lies between ``1 / factor`` and ``factor``.
    """

    name: str
    said: str
    pairs: tuple[tuple[Point, Point], ...]
    kind: Literal["more", "less", "equal"]
    factor: float


@dataclass(frozen=True)
class Measuring:
    """How times are taken.

    Attributes:
        models: the pattern of each and its mixers' options, as text.
        conditions: one after another. Claims are decided by the first, and by the others once more.
        alone: the share of the machine that other processes may take in a round that counts.
    """

    models: Mapping[str, str]
    conditions: tuple[Condition, ...]
    alone: float


@dataclass(frozen=True)
class MeasuredVersion(Planned):
    """A study at one size: what its plan holds."""

    common: str
    protocol: Measuring
    claims: tuple[TimeClaim, ...]

    @cached_property
    def fixed(self) -> dict[str, Any]:
        """All that is fixed before the first round."""
        claims = {claim.name: without(asdict(claim), ("name",)) for claim in self.claims}
        return {"common": self.common, "protocol": asdict(self.protocol), "claims": claims}


@dataclass(frozen=True)
class Decision:
    """A claim, what was found and the ratio's interval as logarithms; ``None`` where too little is on record."""

    claim: TimeClaim
    verdict: Verdict
    interval: Interval | None


class Measured:
    """The lines of one condition.

    Attributes:
        condition: that they are of.
        models: sizes by name; empty before anything is on record.
        rounds, passes: the lines that count, by their numbers.
        discarded: how many do not, as others kept the machine busy.
        plans: that the lines name.
    """

    def __init__(self, condition: Condition, lines: Sequence[Mapping[str, Any]], alone: float):
        self.condition = condition
        own = [line for line in lines if line["condition"] == condition.name]
        self.plans = {line["plan"] for line in own}
        self.settled = next((line for line in own if line["kind"] == MODELS), None)
        self.models: Mapping[str, Any] = {} if self.settled is None else self.settled["models"]
        timed = [line for line in own if line["kind"] != MODELS]
        self.discarded = sum(not counts(line, alone) for line in timed)
        kept = sorted((line for line in timed if counts(line, alone)), key=lambda line: line["number"])
        self.rounds = [line for line in kept if line["kind"] == ROUND]
        self.passes = [line for line in kept if line["kind"] == PREFILL]
        self.missing = sum(map(len, missing(condition, own, alone).values()))

    def contexts(self, model: str) -> list[int]:
        """The contexts at which a model was measured."""
        measured = self.models[model]["measured_state_bytes"] if model in self.models else {}
        return [context for context in self.condition.contexts if str(context) in measured]

    def seconds(self, point: Point) -> np.ndarray:
        """Of a token, ``[rounds]``; empty where the point was not measured."""
        model, key = point
        found = [line["seconds"].get(model, {}).get(str(key)) for line in self.rounds]
        return np.array([value for value in found if value is not None])

    def ratio(self, left: Point, right: Point) -> np.ndarray:
        """The logarithms of the ratios of two points' times in the same rounds, ``[rounds]``."""
        over, under = self.seconds(left), self.seconds(right)
        return np.log(over / under) if len(over) == len(under) else np.array([])

    def rates(self) -> np.ndarray:
        """Bytes per second that this machine's memory gave to the fastest call of each round, ``[rounds]``."""
        return np.array([max(line["bandwidth"].values()) for line in self.rounds])

    def bound(self, point: Point) -> np.ndarray:
        """The share of a token's time that reading weights and state once would take at that rate, ``[rounds]``."""
        model, key = point
        size = self.models[model]["read_weight_bytes"] + self.models[model]["measured_state_bytes"][str(key)]
        return size / self.rates() / self.seconds(point)

    def lacking(self, point: Point) -> list[str]:
        """Why nothing can be said of a point."""
        model, key = point
        if not self.models:
            return [f"{self.condition.name} is not on record"]
        if not (self.condition.check_from if key == FILLED else key in self.condition.contexts):
            return [f"{self.condition.name} measures no such state"]
        if key != FILLED and key not in self.contexts(model):
            needs = bytes_text(self.models[model]["state_bytes"].get(str(key), 0))
            return [f"{model} at {key:,} tokens was not measured: its state of {needs} found no room"]
        found = len(self.seconds(point))
        wanted = max(self.condition.rounds, 2)
        return [] if found >= wanted else [f"{self.condition.name} has {found} of {wanted} rounds"]


def decide(measured: Measured, claim: TimeClaim) -> Decision:
    """What one condition says of a claim."""
    points = dict.fromkeys(point for pair in claim.pairs for point in pair)
    lacking = list(dict.fromkeys(reason for point in points for reason in measured.lacking(point)))
    if lacking:
        return Decision(claim, verdict(None, 0.0, "more", lacking), None)
    ratios = np.mean([measured.ratio(left, right) for left, right in claim.pairs], axis=0)
    interval, margin = mean_interval(ratios[:, None]), math.log(claim.factor)
    if claim.kind == "less":  # the inverse ratio is more than the inverse factor
        return Decision(claim, verdict(mean_interval(-ratios[:, None]), -margin, "more"), interval)
    return Decision(claim, verdict(interval, margin, claim.kind), interval)


class Ledger:
    """The file of a study's lines.

    Raises:
        RunnerError: a line that is there is no record, or of another plan.
    """

    def __init__(self, folder: Path, plan: str):
        self._file, self._plan = folder / FILE, plan
        self.lines = read(folder) if self._file.exists() else []
        self._texts = self._file.read_text(encoding="utf-8").splitlines() if self.lines else []
        if other := next((line["plan"] for line in self.lines if line["plan"] != plan), None):
            raise RunnerError(f"{self._file} was recorded under the plan {other}, and the study's is {plan}")

    def add(self, line: Mapping[str, Any]) -> None:
        """Write one more line; the file is whole at every moment."""
        whole = {"format": FORMAT, "plan": self._plan, **line}
        self.lines.append(whole)
        self._texts.append(json.dumps(whole, separators=(",", ":")))
        write_atomic(self._file, "".join(f"{text}\n" for text in self._texts))


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines that a folder's file of records holds.

    Raises:
        RunnerError: there is no such file, or a line of it is no record.
    """
    file = folder / FILE
    try:
        texts = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise RunnerError(f"{file} does not exist: run the study {folder.name} first, in the same version") from None
    except (OSError, ValueError) as error:
        raise RunnerError(f"cannot read {file}: {error}") from error
    return [_parsed(text, f"line {number} of {file}") for number, text in enumerate(texts, 1)]


def _parsed(text: str, where: str) -> dict[str, Any]:
    needed = {MODELS: {"models", "hardware", "software", "code"}, PREFILL: {"number", "seconds", "others"},
              ROUND: {"number", "seconds", "bandwidth", "others"}}  # fmt: skip
    try:
        line = json.loads(text)
        lacks = ({"plan", "condition", "format"} | needed[line["kind"]]) - line.keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunnerError(f"{where} is no record of a measurement ({type(error).__name__}: {error})") from error
    if lacks:
        raise RunnerError(f"{where} is no record of a measurement: it has no {sorted(lacks)[0]}")
    if line["format"] != FORMAT:
        raise RunnerError(f"{where} is of format {line['format']}, and this version reads {FORMAT}")
    return line
