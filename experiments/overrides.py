"""``key=value`` of the command line: in Hydra's grammar, and composed to a run's configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.errors import CompactHydraException, HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import ConfigError, choices_hint

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class Interval:
    """``interval(low, high)``, or ``tag(log, interval(low, high))`` for one that is searched by its logarithm."""

    low: float
    high: float
    log: bool


def as_override(argument: str) -> str:
    """Let Hydra pass every ``key=value`` on, so that the typed configuration judges it.

    Hydra knows only the keys that some YAML mentions: it would refuse an option left at its default, and name no
    near key for a misspelt one. Groups, ``hydra.*`` and arguments with a sign of their own stay as they are.

    Raises:
        ConfigError: it sets a group to nothing, of which Hydra would make a traceback.
    """
    key, _, value = argument.partition("=")
    is_value = re.fullmatch(r"[A-Za-z_][\w.]*", key) and "=" in argument
    is_group = (CONFIGS / key).is_dir() or key.partition(".")[0] == "hydra"
    if is_group and value.strip().lower() == "null":
        choices = [path.stem for path in (CONFIGS / key).glob("*.yaml")]
        raise ConfigError(f"{argument}: {choices_hint(value, choices)}")
    return f"++{argument}" if is_value and not is_group else argument


def compose(arguments: Sequence[str]) -> dict[str, Any]:
    """The configuration of one run, as :func:`job` would get it.

    Raises:
        ConfigError: Hydra refuses the arguments.
    """
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = hydra.compose("config", [as_override(argument) for argument in arguments])
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (CompactHydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


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
    if isinstance(value, IntervalSweep):
        interval = Interval(float(value.start or 0), float(value.end or 0), "log" in value.tags)
        if not (0 if interval.log else -math.inf) < interval.low < interval.high < math.inf:
            above = " above 0" if interval.log else ""
            raise ConfigError(f"{argument}: expected two finite numbers{above}, the smaller one first")
        return key, interval
    if override.is_sweep_override():
        return key, list(override.sweep_string_iterator())
    return key, argument.partition("=")[2] if isinstance(value, list) else value
