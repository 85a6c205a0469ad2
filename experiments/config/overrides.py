"""``key=value`` of the command line: in Hydra's grammar, and composed to a run's configuration."""

from __future__ import annotations

import argparse
import copy
import math
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, OverrideType, QuotedString
from hydra.errors import CompactHydraException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config.convert import convert
from experiments.config.names import is_shown, placed
from experiments.config.schema import TrainConfig, flat
from experiments.util.errors import ConfigError, choices_hint
from experiments.util.paths import CONFIGS

HYDRA_OPTIONS = (
    *("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.launcher", "hydra/launcher"),
    *("hydra.sweeper.max_batch_size", "hydra.mode", "hydra.verbose"),
)
"""Options of Hydra that mean something here; others would move the runs, or write over files."""

KEY = r"[A-Za-z_][\w.]*"
"""The path of an option, without a sign."""


def _fitting_warmup(most: int, *, _parent_: DictConfig) -> int:
    """A warm-up of so many steps, or as many as a training of these options has room for.

    Where the options make no training, the typed configuration reports them, and the warm-up says nothing.
    """
    given = {key: _parent_[key] for key in _parent_ if key != "warmup"}
    try:
        return min(most, convert(TrainConfig, given, "train").most_warmup)
    except ConfigError:
        return 0


OmegaConf.register_new_resolver("fitting_warmup", _fitting_warmup, replace=True)


@dataclass(frozen=True)
class Interval:
    """``interval(low, high)``, or ``tag(log, interval(low, high))`` for one that is searched by its logarithm."""

    low: float
    high: float
    log: bool


def config_folder(arguments: Sequence[str]) -> Path | None:
    """The folder that ``--config-dir`` names, as Hydra reads it; ``None`` where it is not given.

    Raises:
        ConfigError: there is no such folder.
    """
    flags = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    flags.add_argument("--config-dir", "-cd", type=Path)
    try:
        folder = flags.parse_known_args(list(arguments))[0].config_dir
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}, as in --config-dir FOLDER") from error
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--config-dir {folder}: there is no such folder")
    return folder


def hydra_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line of the runner as Hydra is to see it.

    Raises:
        ConfigError: something in it is not for this runner, or cannot be read.
    """
    for argument in arguments:
        if argument.partition("=")[0] in ("--shell-completion", "-sc"):
            raise ConfigError(f"{argument}: Hydra completes `python FILE` and not `python -m experiments.run`")
        if argument.partition("=")[0] == "--experimental-rerun":
            raise ConfigError(f"{argument}: the same command again does what is missing; give that")
    folder = config_folder(arguments)
    return [as_override(argument, (CONFIGS, *([folder] if folder else []))) for argument in arguments]


def as_override(argument: str, folders: Sequence[Path] = (CONFIGS,)) -> str:
    """Let Hydra pass every ``key=value`` on, so that the typed configuration checks it.

    Hydra knows only the keys that some YAML mentions: it would refuse an option left at its default, and name no
    near key for a misspelt one. Groups, ``hydra.*`` and arguments with a sign of their own stay as they are.

    Args:
        folders: those of configurations, in which groups are found.

    Raises:
        ConfigError: it has no key, chooses nothing of a group, or sets an option of Hydra that is not taken here.
    """
    key, equals, value = argument.partition("=")
    if equals and not key.strip("+~"):
        raise ConfigError(f"{argument}: expected KEY=VALUE, such as train.lr=1e-3")
    if value.startswith("~"):
        raise ConfigError(f"{argument}: the shell replaces a ~ only where a word begins with it; write $HOME instead")
    own = key.lstrip("+~")
    if own.split("/")[0].split(".")[0] == "hydra":
        if not own.startswith(HYDRA_OPTIONS):
            raise ConfigError(f"{argument}: of Hydra's own options the runner takes {', '.join(HYDRA_OPTIONS)}")
        return argument
    if any((folder / own).is_dir() for folder in folders):
        choices = [path.stem for folder in folders for path in (folder / own).glob("*.yaml")]
        if equals and not _chooses(argument):
            raise ConfigError(f"{argument}: {choices_hint(value, choices)}")
        return argument
    return f"++{argument}" if equals and re.fullmatch(KEY, key) else argument


def _chooses(argument: str) -> bool:
    """Whether names of a group's files are given: of other values Hydra would make a traceback."""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return True  # It reports what it cannot read.
    swept = override.is_sweep_override() and override.is_discrete_sweep()
    values = list(override.sweep_iterator()) if swept else [override.value()]
    return all(isinstance(value, (str, list, QuotedString)) for value in values)


class Composer:
    """Composes the configurations of many runs, each as Hydra would compose it.

    Hydra composes each combination of groups once. What is set besides goes into copies of that, as Hydra puts it in;
    a run whose overrides are more than groups and ``++key=value`` is composed by Hydra as a whole.

    Args:
        load: Hydra's composition of some overrides, without Hydra's own node.
        folders: those of configurations, in which groups are found.
    """

    def __init__(self, load: Callable[[list[str]], DictConfig], folders: Sequence[Path] = (CONFIGS,)):
        self._load, self._folders = load, folders
        self._groups: dict[tuple[str, ...], DictConfig] = {}
        self._parsed: dict[str, Override] = {}

    def __call__(self, overrides: Sequence[str], swept: Container[str] = ()) -> dict[str, Any]:
        """The configuration of one run, with its place: the experiment that it belongs to and what its name shows.

        Args:
            overrides: of this run, as :func:`as_override` writes them.
            swept: keys that differ between the runs of a sweep: after the learning rate, the name shows them first.

        Raises:
            CompactHydraException, MissingConfigException, OmegaConfBaseException: as of Hydra.
            ConfigError: ``name`` cannot be the name of an experiment.
        """
        plain, parsed = self.plain(overrides), [self._parse(each) for each in overrides]
        groups = [text for text, each in zip(overrides, parsed, strict=True) if self._is_group(each)]
        without_task = [text for text in groups if not text.startswith("task=")]
        own_task = OmegaConf.select(self._of_groups(without_task), "task.name")
        found, base = placed(plain, own_task), flat(to_plain(self._of_groups(groups)))
        keys = [each.key_or_group for each in parsed if not self._is_group(each)]
        keys.sort(key=lambda key: (key != "train.lr", key not in swept))
        here = flat(plain)
        shown = {path: here[path] for key in keys for path in here
                 if f"{path}.".startswith(f"{key}.") and is_shown(path) and here[path] != base.get(path)}  # fmt: skip
        task = base.get("task.name")
        if task not in (own_task, found["experiment"]):
            shown = {"task": task, **shown}
        return found | ({"shown": shown} if shown else {})

    def plain(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The configuration of one run as Hydra composes it; errors as of a call."""
        parsed = [self._parse(each) for each in overrides]
        if not all(self._is_group(each) or self._is_value(each) for each in parsed):
            return to_plain(self._load(list(overrides)))
        groups = [text for text, each in zip(overrides, parsed, strict=True) if self._is_group(each)]
        whole = copy.deepcopy(self._of_groups(groups))
        try:
            for each in parsed:
                if self._is_value(each):
                    OmegaConf.update(whole, each.key_or_group, each.value(), merge=True, force_add=True)
        except OmegaConfBaseException:  # Hydra says what is wrong.
            return to_plain(self._load(list(overrides)))
        return to_plain(whole)

    def _of_groups(self, groups: list[str]) -> DictConfig:
        if tuple(groups) not in self._groups:
            self._groups[tuple(groups)] = self._load(groups)
        return self._groups[tuple(groups)]

    def _parse(self, text: str) -> Override:
        if text not in self._parsed:
            self._parsed[text] = OverridesParser.create().parse_override(text)
        return self._parsed[text]

    def _is_group(self, override: Override) -> bool:
        """Whether it only chooses a file of a group, or is Hydra's own."""
        key = override.key_or_group
        return _is_plain(override, OverrideType.CHANGE) and (_of_hydra(key) or self._is_folder(key))

    def _is_value(self, override: Override) -> bool:
        """Whether it only sets a value, or adds one."""
        key = override.key_or_group
        is_key = re.fullmatch(KEY, key) is not None and not _of_hydra(key) and not self._is_folder(key)
        return is_key and _is_plain(override, OverrideType.FORCE_ADD)

    def _is_folder(self, key: str) -> bool:
        return any((folder / key).is_dir() for folder in self._folders)


def _is_plain(override: Override, kind: OverrideType) -> bool:
    return override.type == kind and override.package is None and not override.is_sweep_override()


def _of_hydra(key: str) -> bool:
    return re.split("[/.]", key)[0] == "hydra"


def to_plain(composed: DictConfig) -> dict[str, Any]:
    """A composed configuration with its interpolations resolved.

    Raises:
        OmegaConfBaseException: one of them cannot be, or a value is missing.
    """
    plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def compose(arguments: Sequence[str]) -> dict[str, Any]:
    """The configuration of one run, as a job of ``experiments.run`` gets it.

    Args:
        arguments: ``key=value``, and ``--config-dir=FOLDER`` for configurations besides the runner's own.

    Raises:
        ConfigError: Hydra refuses the arguments.
    """
    folder = config_folder(arguments)
    folders = (CONFIGS, *([folder] if folder else []))
    overrides = [as_override(argument, folders) for argument in arguments if not argument.startswith("--config-dir=")]
    if folder is not None:
        overrides.append(f"hydra.searchpath=['file://{folder.absolute()}']")
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return Composer(load, folders)(overrides)
    except (CompactHydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from error


def load(overrides: list[str]) -> DictConfig:
    """Hydra's composition, without its own node, where Hydra has been told the folders of configurations."""
    return hydra.compose("config", overrides)


def parse_choice(argument: str) -> tuple[str, Any]:
    """The key of an override in Hydra's grammar and its value: an :class:`Interval`, a list of choices, or one value.

    A value that is a list itself, ``[64,128]``, is no choice: it comes back as its text.

    Raises:
        ConfigError: it is no override.
    """
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException as error:
        raise ConfigError(f"{argument}: {error}") from error
    value = override.value()
    key = override.get_key_element()
    if isinstance(value, Glob):
        raise ConfigError(f"{argument}: give the choices one by one; only experiments.run takes a glob")
    if isinstance(value, IntervalSweep):
        interval = Interval(float(value.start or 0), float(value.end or 0), "log" in value.tags)
        if not (0 if interval.log else -math.inf) < interval.low < interval.high < math.inf:
            above = " above 0" if interval.log else ""
            raise ConfigError(f"{argument}: expected two finite numbers{above}, the smaller one first")
        return key, interval
    if override.is_sweep_override():
        return key, list(override.sweep_string_iterator())
    return key, argument.partition("=")[2] if isinstance(value, list) else value
