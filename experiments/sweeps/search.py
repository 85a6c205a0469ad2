"""A search for the setting that is best on validation data, with Optuna.

Choices and intervals in Hydra's grammar are searched; every trial is trained with each seed, and its value is their
median on the validation split. A trial is made of runs like any others, and the next setting depends on the results of
those before alone: so the same search again finds what is finished and resumes with what is missing.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import Trial, TrialState

from experiments.config.build import build_task
from experiments.config.convert import convert
from experiments.config.overrides import Interval, compose, parse_choice
from experiments.config.schema import NOT_IDENTITY, RunConfig
from experiments.runs.folder import RunFolder
from experiments.runs.other_code import refusal
from experiments.sweeps.execute import OF_SWEEP, execute, resolve_composed
from experiments.sweeps.status import SweepStatus
from experiments.tasks.task import Metric
from experiments.util.errors import ConfigError, RunnerError, choices_hint
from experiments.util.files import write_json
from experiments.util.secrecy import masked

SAMPLERS = ("tpe", "random")
CONFIG_DIR = "--config-dir"
NOT_SEARCHED = ("experiment", "name", "task", "launcher", "hydra", "imports", *OF_SWEEP, *NOT_IDENTITY)
"""Trials that differed in these could not be compared, or would be the same."""


@dataclass(frozen=True)
class SearchOptions:
    """The options ``search.*``.

    Attributes:
        trials: settings to try.
        jobs: trials at a time. They do not know of one another, so another number makes another search.
        sampler: ``tpe`` (tree-structured Parzen estimator, after ten random trials) or ``random``.
        seed: of the sampler.
        prune: end a trial once its first seed's validation metric is worse than the median of the trials before it at
            the same step; the first five are never ended.
    """

    trials: int = 20
    jobs: int = 1
    sampler: str = "tpe"
    seed: int = 0
    prune: bool = False

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be at least 0 and below 2^32, got {self.seed}")
        for name in ("trials", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}, {choices_hint(self.sampler, SAMPLERS)}")


class Search:
    """One search: what is fixed, what is searched, and Optuna's study of it.

    Args:
        arguments: as of ``experiments.run``, with ``search.*`` besides.

    Raises:
        ConfigError: the arguments do not make one.
    """

    def __init__(self, arguments: Sequence[str]):
        options, self.space, self.fixed, seeds = {}, {}, [], None
        for key, (argument, value) in _last_of_each(arguments).items():
            if key == CONFIG_DIR:
                self.fixed.append(argument)
            elif key.startswith("search."):
                options[key.removeprefix("search.")] = value
            elif key == "seed" and isinstance(value, Interval):
                raise ConfigError(
                    f"{argument}: a trial is trained with every seed; give them one by one, as seed=0,1,2"
                )
            elif key == "seed" and isinstance(value, list):
                if len(set(value)) < len(value):
                    raise ConfigError(f"{argument}: a seed is given twice, and would count twice in the median")
                seeds = value
            elif isinstance(value, (list, Interval)):
                self.space[key] = value
            else:
                self.fixed.append(argument)
        self.options = convert(SearchOptions, options, "search")
        refused = [key for key in self.space if f"{key.lstrip('+')}.".startswith(tuple(f"{n}." for n in NOT_SEARCHED))]
        if refused or not self.space:
            what = f"{refused[0]} cannot be searched" if refused else "nothing is searched"
            raise ConfigError(f"{what}; give choices or an interval of another key, as train.lr=1e-3,3e-3")
        self.config: RunConfig = self._checked(seeds or [])
        self.seeds: list[str] = seeds or [str(self.config.seed)]
        self.metric: Metric = build_task(self.config).metric
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(
            direction="maximize" if self.metric.higher_is_better else "minimize",
            sampler=_sampler(self.options),
            pruner=optuna.pruners.MedianPruner() if self.options.prune else optuna.pruners.NopPruner(),
        )

    def _checked(self, seeds: Sequence[str]) -> RunConfig:
        """A run of the search, after every choice, the ends of every interval and every seed have been tried in it.

        Raises:
            ConfigError: naming the choice that makes no run; choices that make none together show as trials that fail.
        """
        ends = {key: [value.low, value.high] if isinstance(value, Interval) else value
                for key, value in {"seed": seeds, **self.space}.items() if value}  # fmt: skip
        first = {key: values[0] for key, values in ends.items()}
        config = resolve_composed(compose([*self.fixed, *_overrides(first)]))
        if config.train.dry_run or not config.machine.processes:
            raise ConfigError(
                "a search trains its trials: train.dry_run and machine.processes=0 are for experiments.run"
            )
        for key, value in ((key, value) for key, values in ends.items() for value in values[1:]):
            try:
                resolve_composed(compose([*self.fixed, *_overrides({**first, key: value})]))
            except ConfigError as error:
                raise ConfigError(f"{key}={value} of the search: {error}") from error
        return config

    @property
    def file(self) -> Path:
        """Where the results are written; different searches have different names."""
        fixed = [argument for argument in self.fixed if not argument.startswith("other_code=")]
        identity = [repr(self.space), fixed, self.seeds, {**asdict(self.options), "trials": 0}]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]
        return Path(self.config.runs) / self.config.experiment / f"search-{digest}.json"

    def run(self, sweep: SweepStatus) -> str:
        """Do all trials: ``complete``, ``failed`` if one is, or ``stopped``."""
        ending = "complete"
        for first in range(0, self.options.trials, self.options.jobs):
            trials = [self.study.ask() for _ in range(min(self.options.jobs, self.options.trials - first))]
            composed = [self._compose(self._suggest(trial)) for trial in trials]
            with ThreadPoolExecutor(len(trials)) as pool:
                states = list(pool.map(self._try, trials, composed, [sweep] * len(trials)))
            if sweep.should_stop():
                return "stopped"
            for trial, (state, value) in zip(trials, states, strict=True):
                self.study.tell(trial, value, state)
                ending = "failed" if state == TrialState.FAIL else ending
            write_json(self.file, masked(self.summary()))
        return ending

    def _suggest(self, trial: Trial) -> list[str]:
        """The trial's setting, as overrides."""
        chosen = {}
        for key, value in self.space.items():
            if isinstance(value, Interval):
                chosen[key] = trial.suggest_float(key, value.low, value.high, log=value.log)
            else:
                chosen[key] = trial.suggest_categorical(key, value)
        overrides = _overrides(chosen)
        trial.set_user_attr("overrides", overrides)
        return overrides

    def _compose(self, overrides: list[str]) -> list[dict[str, Any]]:
        return [compose([*self.fixed, *overrides, f"seed={seed}"]) for seed in self.seeds]

    def _try(self, trial: Trial, composed: list[dict[str, Any]], sweep: SweepStatus) -> tuple[TrialState, float | None]:
        """Train a trial with every seed; its state and the median over them on validation."""
        values = []
        for i, each in enumerate(composed):
            job = trial.number * len(composed) + i
            pruner = Pruner(trial, self.metric) if self.options.prune and i == 0 else None
            try:
                config = resolve_composed(each)
                folder = RunFolder(config.folder())
                _train(folder, each, sweep, job, pruner)
                if each.get("other_code", "refuse") == "refuse" and refusal(folder, config):
                    return TrialState.FAIL, None  # Its result is that of other code.
                if folder.status() != "finished":
                    return TrialState.PRUNED if pruner and pruner.reason else TrialState.FAIL, None
                values.append(folder.record()["results"]["validation"])
            except RunnerError as error:
                sweep.update(job, status="refused", name=f"trial {trial.number}", message=str(error))
                return TrialState.FAIL, None
        return TrialState.COMPLETE, statistics.median(values)

    def summary(self) -> dict[str, Any]:
        """All trials and the best one, for people and programs."""
        trials = [
            {
                "number": trial.number,
                "overrides": trial.user_attrs.get("overrides"),
                "state": trial.state.name.lower(),
                "validation": trial.value if trial.state == TrialState.COMPLETE else None,
            }
            for trial in self.study.trials
        ]
        fixed = {"fixed": self.fixed, "seeds": self.seeds, "options": asdict(self.options)}
        return {**fixed, "metric": asdict(self.metric), "trials": trials, "best": self.best()}

    def best(self) -> dict[str, Any] | None:
        """The setting with the best median on validation, ``None`` where no trial is complete."""
        if not any(trial.state == TrialState.COMPLETE for trial in self.study.trials):
            return None
        trial = self.study.best_trial
        return {"overrides": trial.user_attrs["overrides"], "validation": trial.value}


class Pruner:
    """Reports a run's validation metric to its trial while it trains, and says why the run should end.

    Attributes:
        reason: why, once it should.
    """

    def __init__(self, trial: Trial, metric: Metric):
        self._trial, self._metric = trial, metric
        self._step, self._size = 0, 0
        self.reason: str | None = None

    def __call__(self, folder: RunFolder) -> str | None:
        size = folder.metrics_file.stat().st_size if folder.metrics_file.exists() else 0
        if size == self._size:
            return self.reason
        self._size = size
        for line in folder.metrics():
            value = line.get(f"validation_{self._metric.name}")
            if self.reason is None and line["step"] > self._step and value is not None:
                self._step = line["step"]
                self._trial.report(value, self._step)
                if self._trial.should_prune():
                    found = f"its {self._metric.label.lower()} of {value:.4g} on validation at step {self._step}"
                    self.reason = f"{found} is worse than the median of the trials before"
        return self.reason


def _train(folder: RunFolder, composed: Mapping[str, Any], sweep: SweepStatus, job: int, pruner: Pruner | None) -> None:
    """Do a run of a trial, unless an earlier search pruned it; the same trials before it prune it again."""
    if pruner is None or pruner(folder) is None or folder.status() == "finished":
        execute(composed, sweep, job, pruner)
        if pruner is None or pruner.reason is None or folder.status() == "finished":
            return
        folder.update(reason=pruner.reason)
    sweep.update(job, status="pruned", name=folder.path.name, message=pruner.reason)


def _last_of_each(arguments: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """The argument and its value by key: as in Hydra, the last one of a key counts."""
    given: dict[str, tuple[str, Any]] = {}
    for argument in arguments:
        is_folder = argument.startswith(f"{CONFIG_DIR}=")
        key, value = (CONFIG_DIR, None) if is_folder else parse_choice(argument)
        given.pop(key, None)
        given[key] = argument, value
    return given


def _overrides(chosen: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in chosen.items()]


def _sampler(options: SearchOptions) -> optuna.samplers.BaseSampler:
    if options.sampler == "random":
        return optuna.samplers.RandomSampler(options.seed)
    return optuna.samplers.TPESampler(seed=options.seed, constant_liar=options.jobs > 1)
