"""What a study that trains models has: arms that are compared, claims with their margins, and recorded runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from experiments.config.overrides import compose
from experiments.config.schema import run_config, without
from experiments.runs.recorded import RecordedRun
from experiments.studies.protocol import Arm, Progress, Protocol
from experiments.studies.records import shortened
from experiments.studies.study import Planned


@dataclass(frozen=True)
class Claim:
    """A statement on differences between arms, with the margin beyond which a difference matters.

    Attributes:
        name: short, for tables and tests.
        said: the statement, with its source.
        pairs: of arms, ``(left, right)``; of several pairs the mean difference counts.
        kind: ``more``: the left ones exceed the right ones by more than the margin; ``equal``: they differ by less.
        margin: in the unit of the metric, or in factors of two of steps.
        split: the test split that is compared.
        threshold: where given, the steps to reach this validation metric are compared, and not the test results.
        whole: count a test sequence where it is right throughout, and not its share of right answers.
    """

    name: str
    said: str
    pairs: tuple[tuple[str, str], ...]
    kind: Literal["more", "equal"]
    margin: float
    split: str = "test"
    threshold: float | None = None
    whole: bool = False

    def plain(self) -> dict[str, Any]:
        """As it stands in a plan by its name, which has nothing of what later versions added and it does not use."""
        return without(asdict(self), ("name",) if self.whole else ("name", "whole"))


@dataclass(frozen=True)
class Learnt:
    """By what a reporting run counts as having learnt its task.

    A run that stays at chance shows nothing of what its model could hold, and another one at twice the steps that stays
    there too makes its arm look converged.

    Attributes:
        split: an easy test split.
        least: the least mean score on it, of which more is better.
    """

    split: str
    least: float


@dataclass(frozen=True)
class Version(Planned):
    """A study at one size.

    Attributes:
        common: what all its runs share, in the grammar of ``experiments.run``.
        arms: what is compared. Arms may be added later; what is planned of the others stays.
        protocol: how each of them is tuned and reported.
        claims: what is to be decided.
        learnt: where given, runs that have not learnt their task decide no claim on scores in favour of others.
    """

    common: str
    arms: tuple[Arm, ...]
    protocol: Protocol = field(default_factory=Protocol)
    claims: tuple[Claim, ...] = ()
    learnt: Learnt | None = None

    @cached_property
    def fixed(self) -> dict[str, Any]:
        """All that is fixed before the first run: the task and its budget, the procedure, the claims."""
        composed = without(compose(shlex.split(self.common)), ("retry", "train.lr"))
        config = shortened(run_config({**composed, "train": {**composed["train"], "lr": 1.0}}))
        configuration = {"task": config["task"], "train": without(config["train"], ("lr",))}
        return {
            "common": self.common,
            "configuration": configuration,
            "protocol": self.protocol.plain(),
            "claims": {claim.name: claim.plain() for claim in self.claims},
            **({} if self.learnt is None else {"learnt": asdict(self.learnt)}),
        }


@dataclass(frozen=True)
class Results:
    """The recorded runs of a version of a study.

    Attributes:
        decided: the decisions on its claims by their confidence, kept as they are made: a page needs them often.
    """

    version: Version
    runs: Sequence[RecordedRun]
    decided: dict[float, list[Any]] = field(default_factory=dict, compare=False)

    @cached_property
    def arms(self) -> dict[str, Progress]:
        """The progress of every arm, by its name."""
        protocol, by_key = self.version.protocol, {key_of(run): run for run in self.runs}
        return {
            arm.name: Progress(protocol, arm, {key: run for key, run in by_key.items() if key[0] == arm.name})
            for arm in self.version.arms
        }

    @cached_property
    def stranded(self) -> dict[str, list[str]]:
        """The arms of which runs are missing for good, each with the arms whose runs they start from or learn of: these
        are over and failed.
        """
        found: dict[str, list[str]] = {}
        for name, progress in self.arms.items():
            seeds, sources = {wanted.seed for wanted in progress.wanted()}, dict.fromkeys(progress.arm.sources.values())
            if lost := [source for source in sources if any(self._is_lost(source, seed) for seed in seeds)]:
                found[name] = lost
        return found

    def _is_lost(self, arm: str, seed: int) -> bool:
        """Whether no run of an arm with a seed is a source, nor will be one."""
        if arm not in self.arms:
            return True
        progress = self.arms[arm]
        waiting = [wanted.seed for wanted in progress.wanted() if progress.chosen is None or wanted.seed == seed]
        if waiting:
            return all(any(self._is_lost(source, each) for source in progress.arm.sources.values()) for each in waiting)
        return self.source(arm, seed) is None

    def source(self, arm: str, seed: int) -> RecordedRun | None:
        """The finished run of an arm that runs of this seed of others start from or learn of."""
        return self.arms[arm].source(seed) if arm in self.arms else None


def key_of(run: RecordedRun) -> tuple[str, str, float, int]:
    """The arm, the stage, the learning rate and the seed of a recorded run."""
    study = run.record["study"]
    return study["arm"], study["stage"], run.config["train"]["lr"], run.config["seed"]
