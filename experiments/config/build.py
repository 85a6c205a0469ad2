"""From a run's configuration to its task and its model, checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from experiments.config.schema import RunConfig
from experiments.tasks import TASKS, Task
from experiments.trackers import require_tracker
from experiments.util.errors import ConfigError, choices_hint
from seqarch.layers import CHANNEL_MIXERS, MIXERS
from seqarch.layers.mixer import build_config
from seqarch.models import LanguageModel, LMConfig, parse_pattern


def build_task(config: RunConfig) -> Task:
    return TASKS[config.task.name](config.task.options)


def resolve(config: RunConfig) -> RunConfig:
    """The configuration with the options of unused mixers checked and left out, sure to build a model.

    Raises:
        ConfigError: no model can be built from it, or its tracker is not installed.
    """
    require_tracker(config.tracker.name)
    model = config.model
    try:
        layers = parse_pattern(model.pattern)
    except ValueError as error:
        raise ConfigError(f"model.pattern: {error}") from error
    mixers = {name for layer in layers for name in layer.mixers}
    channels = {layer.channel or model.channel for layer in layers}
    used = {
        "mixers": _used("mixers", model.mixers, MIXERS, mixers, model.d_model),
        "channels": _used("channels", model.channels, CHANNEL_MIXERS, channels, model.d_model),
    }
    resolved = replace(config, model=replace(model, **used))
    try:
        with torch.device("meta"):
            build_model(resolved)
    except RuntimeError as error:  # Torch's, of sizes beyond all machines.
        raise ConfigError(f"model: {str(error).splitlines()[0]}") from error
    return resolved


def build_model(config: RunConfig) -> LanguageModel:
    """The language model that a run trains, with freshly initialised parameters.

    Raises:
        ConfigError: the library refuses the configuration.
    """
    options = {name: value for name, value in vars(config.model).items() if name != "name"}
    try:
        return LanguageModel(LMConfig(vocab_size=build_task(config).vocab_size, **options))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from error


def _used(
    key: str, options: dict[str, dict[str, Any]], registry: Mapping[str, Any], used: set[str], d_model: int
) -> dict[str, dict[str, Any]]:
    for name, values in options.items():
        if name not in registry:
            raise ConfigError(f"model.{key}.{name}: unknown name, {choices_hint(name, registry)}")
        try:
            build_config(key.rstrip("s"), name, registry[name].Config, {"d_model": d_model, **values})
        except (ValueError, TypeError) as error:
            raise ConfigError(f"model.{key}: {error}") from error
    return {name: values for name, values in options.items() if name in used}
