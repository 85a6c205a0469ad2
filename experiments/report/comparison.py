"""Recorded runs, grouped into what a report compares."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field
from typing import Any

from experiments.config import options
from experiments.config.schema import NOT_IDENTITY, TrainConfig, flat, without
from experiments.config.tasks import task_config
from experiments.runs.recorded import RecordedRun
from experiments.util.errors import ConfigError
from experiments.util.plot_style import colours, family, pattern_channels, pattern_mixers

TUNED = {"train.lr": "learning rate", "train.weight_decay": "weight decay"}
"""The options that a comparison chooses for each model by its median validation metric, by path and in words."""

MOST_LISTED = 8
"""Values of a grid that are listed one by one."""


@dataclass
class Setting:
    """One setting of a model in a comparison: the runs that differ in nothing but the seed.

    Attributes:
        colour: that of the family, or of the mixer's own where it has none; the same throughout a report.
        grid: the values that were tried, ``{"train.lr": [0.001, 0.003]}``.
        passed_over: the same model with the settings that were not chosen.
    """

    label: str
    pattern: str
    colour: str
    runs: list[RecordedRun]
    grid: dict[str, list[Any]] = field(default_factory=dict)
    passed_over: list[Setting] = field(default_factory=list)

    @property
    def family(self) -> str:
        return family(self.pattern)

    @property
    def finished(self) -> list[RecordedRun]:
        return [run for run in self.runs if run.finished]

    def values(self, get: Callable[[RecordedRun], float]) -> list[float]:
        return [get(run) for run in self.finished]

    def median(self, get: Callable[[RecordedRun], float]) -> float:
        return statistics.median(self.values(get))

    def tuned(self, name: str) -> Any:
        """The value of one of :data:`TUNED`."""
        return flat(self.runs[0].config)[name]


@dataclass
class Comparison:
    """The runs of one experiment on one task.

    Attributes:
        name: the experiment's, with the task where the experiment has several.
        seeds: those that any of its runs has.
        remarks: a sentence on each run that is missing or failed.
        distinction: from other tasks of that title, such as ``pairs=8``.
        stem: what the names of its plots begin with; those of a report are different.
    """

    name: str
    settings: list[Setting]
    seeds: list[int]
    remarks: list[str]
    distinction: str = ""
    stem: str = ""

    @property
    def shown(self) -> list[Setting]:
        return [setting for setting in self.settings if setting.finished]

    @property
    def sample(self) -> dict[str, Any]:
        """The record of some finished run, for what all have in common."""
        return self.shown[0].finished[0].record

    @property
    def title(self) -> str:
        return self.sample["task"]["title"] + (f" ({self.distinction})" if self.distinction else "")

    @property
    def grids(self) -> dict[str, list[Any]]:
        """The values that were tried for any of the models, by the paths of :data:`TUNED`."""
        tried = {name: sorted({each for setting in self.settings for each in setting.grid[name]}) for name in TUNED}
        return {name: values for name, values in tried.items() if _is_tuned(name, self.settings)}


def _is_tuned(name: str, settings: Iterable[Setting]) -> bool:
    return any(len(setting.grid[name]) > 1 for setting in settings)


def listed(values: Sequence[float]) -> str:
    """``0.001, 0.003``; of very many, how many and from where to where."""
    if len(values) > MOST_LISTED:
        return f"{len(values)} values from {min(values):g} to {max(values):g}"
    return ", ".join(f"{value:g}" for value in values)


def compare(runs: list[RecordedRun]) -> list[Comparison]:
    """One comparison for each task of an experiment, the best model first.

    A task with other options is another one: it has its own chance level, and is evaluated on its own data.
    """
    colour_of = colours(run.config["model"]["pattern"] for run in runs)
    found: list[Comparison] = []
    for name in sorted({run.config["experiment"] for run in runs}):
        found += _of_experiment(name, [run for run in runs if run.config["experiment"] == name], colour_of)
    found.sort(key=lambda comparison: comparison.name)
    for place, comparison in enumerate(found):
        comparison.stem = _stem(comparison.name, {other.stem for other in found[:place]})
    return found


def _of_experiment(name: str, runs: Sequence[RecordedRun], colour_of: dict[str, str]) -> list[Comparison]:
    tasks: dict[str, list[RecordedRun]] = {}
    for run in runs:
        tasks.setdefault(repr(sorted(_task(run).items())), []).append(run)
    comparisons = []
    distinguished = _distinguished([_task(members[0]) for members in tasks.values()])
    for members, (task, distinction) in zip(tasks.values(), distinguished, strict=True):
        full = f"{name}, {task}" + (f" ({distinction})" if distinction else "") if len(tasks) > 1 else name
        comparisons.append(_comparison(full, members, colour_of, distinction))
    return comparisons


def _stem(name: str, taken: Container[str]) -> str:
    """A comparison's name as that of a file, different from those taken."""
    plain = re.sub(r"[^\w.+]+", "-", name).strip("-")
    names = itertools.chain([plain], (f"{plain}-{number}" for number in itertools.count(2)))
    return next(each for each in names if each not in taken)


def _task(run: RecordedRun) -> dict[str, Any]:
    """The task's name and options by path, with its defaults where this version knows it."""
    given = run.config["task"]
    try:
        typed = task_config(given)
    except ConfigError:
        return flat(given)
    return {"name": typed.name, **flat(asdict(typed.options)), "test_on": typed.test_on}


def _distinguished(tasks: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Each task's name, and those of its options in which others of the same name differ from it."""
    found = []
    for own in tasks:
        rivals = [task for task in tasks if task.get("name") == own.get("name")]
        names = sorted(_differing(own, rivals))
        found.append((str(own.get("name")), ", ".join(f"{name}={own.get(name)}" for name in names)))
    return found


def _differing(own: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]]) -> set[str]:
    """The names of the options in which one of several differs from another."""
    return {name for rival in rivals for name in {**rival, **own} if rival.get(name) != own.get(name)}


def _comparison(name: str, runs: list[RecordedRun], colour_of: dict[str, str], distinction: str) -> Comparison:
    higher = next((run.record["metric"]["higher_is_better"] for run in runs if run.finished), True)
    settings, doubled = _settings(runs, colour_of)
    settings = _choose(settings, higher)
    settings.sort(key=lambda setting: _goodness(setting, "test", higher), reverse=True)
    seeds = sorted({run.config["seed"] for run in runs})
    remarks = [remark for setting in settings for remark in _remarks(setting, seeds)]
    return Comparison(name, settings, seeds, remarks + doubled, distinction)


def _remarks(setting: Setting, seeds: Sequence[int]) -> list[str]:
    """The runs of a model that are missing or failed: of the setting that is shown, and of those not chosen."""
    there = {run.config["seed"] for run in setting.runs}
    remarks = [f"{setting.label}, seed {seed}: missing" for seed in seeds if seed not in there]
    for each in (setting, *setting.passed_over):
        words = [f"{TUNED[name]} {each.tuned(name):g}" for name, tried in setting.grid.items() if len(tried) > 1]
        which = "" if each is setting else f", not chosen: {', '.join(words)}"
        for run in each.runs:
            if not run.finished:
                remarks.append(f"{setting.label}{which}, seed {run.config['seed']}: {run.ending}")
    return remarks


def _settings(runs: list[RecordedRun], colour_of: dict[str, str]) -> tuple[list[Setting], list[str]]:
    """Runs that share all but the seed, and a sentence on each that is there twice."""
    groups: dict[str, list[RecordedRun]] = {}
    options_by_key: dict[str, dict[str, Any]] = {}
    for run in runs:
        kept = _options(run)
        groups.setdefault(repr(sorted(kept.items())), []).append(run)
        options_by_key[repr(sorted(kept.items()))] = kept
    settings, doubled = [], []
    for key, members in groups.items():
        model = members[0].config["model"]
        own = options_by_key[key]
        label = _label(own, [other for other in options_by_key.values() if other["model.name"] == model["name"]])
        once: dict[int, RecordedRun] = {}
        for run in sorted(members, key=lambda run: (run.config["seed"], not run.finished)):
            first = once.setdefault(run.config["seed"], run)
            if first is not run:
                doubled.append(f"{label}, seed {run.config['seed']}: twice, of which {first.path} is shown"
                               f" and {run.path} is not")  # fmt: skip
        settings.append(Setting(label, model["pattern"], colour_of[model["pattern"]], list(once.values())))
    return settings, doubled


def _options(run: RecordedRun) -> dict[str, Any]:
    """All that makes a setting, by path: not the seed, nor what changes no result; equal options are written alike.

    Nor the task that it is tested on, but what of it the run was trained on in its place.
    """
    trained = {key: run.config["task"][key] for key in ("train_on", "order") if key in run.config["task"]}
    config = {**without(run.config, ("seed", "task", *NOT_IDENTITY)), "task": trained}
    whole = flat({**config, "model": options.canonical(config["model"])})
    return {name: value for name, value in whole.items() if value != {} and value != _training_default(name)}


def _training_default(name: str) -> Any:
    """The default of an option of training, which runs from before there was this option do not name."""
    part, _, own = name.partition(".")
    return getattr(TrainConfig, own, MISSING) if part == "train" and name not in TUNED else MISSING


def _label(own: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]]) -> str:
    """The model's name, and the options in which it differs from others of that name; none that it does not have."""
    differing = _differing(own, rivals) - TUNED.keys()
    names = sorted(name for name in differing if name in own or _value(own, name) is not None)
    last = [name.rpartition(".")[2] for name in names]
    differences = [f"{short if last.count(short) < 2 else name}={_value(own, name)}"
            for name, short in zip(names, last, strict=True)]  # fmt: skip
    return own["model.name"] + (f" ({', '.join(differences)})" if differences else "")


def _value(own: Mapping[str, Any], name: str) -> Any:
    """An option, or the default of one that is left out of a mixer or channel mixer which the model has."""
    has = {own.get("model.channel"), *pattern_mixers(own["model.pattern"]), *pattern_channels(own["model.pattern"])}
    left_out = name not in own and any(f".{layer}." in name for layer in has)
    of_training = _training_default(name)
    if name not in own and of_training is not MISSING:
        return of_training
    return options.default(name) if left_out else own.get(name)


def _choose(settings: list[Setting], higher: bool) -> list[Setting]:
    """The best on validation of the settings that differ in tuned options alone."""
    chosen = []
    for label in dict.fromkeys(setting.label for setting in settings):
        rivals = [setting for setting in settings if setting.label == label]
        best = max(rivals, key=lambda setting: _goodness(setting, "validation", higher))
        best.grid = {name: sorted({setting.tuned(name) for setting in rivals}) for name in TUNED}
        best.passed_over = [setting for setting in rivals if setting is not best]
        chosen.append(best)
    return chosen


def _goodness(setting: Setting, name: str, higher: bool) -> tuple[float, int]:
    """The median over seeds, larger is better; where that is equal, the number of finished seeds.

    A failed seed counts as the worst, and so does one whose result is no number: a setting that diverges on most seeds
    must not win by the one on which it does not.
    """
    worst, sign = float("-inf"), 1 if higher else -1
    failed = [worst for run in setting.runs if run.recorded_status in ("failed", "finished") and not run.finished]
    finished = [sign * run.result(name) for run in setting.finished]
    return statistics.median([*failed, *finished] or [worst]), len(finished)
