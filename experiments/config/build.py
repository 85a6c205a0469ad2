"""From a run's configuration to its task and its model, checked before anything is written."""

from __future__ import annotations

from dataclasses import replace

import torch

from experiments.config.carrying import check_carrying
from experiments.config.data import build_data
from experiments.config.matching import matched
from experiments.config.schema import RunConfig, TrainConfig
from experiments.config.start import with_start
from experiments.tasks import TASKS, Task
from experiments.trackers import missing_package
from experiments.util.errors import ConfigError
from seqarch.models import LanguageModel, parse_pattern
from seqarch.models.low_rank import LoraAdapters
from seqarch.models.optimisation import train_only


def build_task(config: RunConfig) -> Task:
    return TASKS[config.task.name](config.task.options)


def resolve(config: RunConfig) -> RunConfig:
    """The configuration without the options of unused mixers, with the widths of its match, sure to build a model that
    fits what it starts from.

    Raises:
        ConfigError: no model can be built from it, none with what its match asks for, its states cannot go on from one
            step to the next as they are to, the processes cannot share its batches evenly, what it starts from is not
            there or does not fit, or its tracker is not installed.
    """
    if package := missing_package(config.tracker.name):
        raise ConfigError(
            f"tracker.name: {config.tracker.name!r} needs the package {package}, which is not installed: pip install"
            f" {package}, or choose tracker=none"
        )
    resolved = _used(config)
    _check_builds(resolved)
    if config.match.asks:
        resolved = _sized(resolved)
        _check_builds(resolved)
    _check_shares(resolved)
    return with_start(resolved)


def identified(config: RunConfig) -> RunConfig:
    """The configuration as :func:`resolve` returns it, fast: whether it builds a model is left to that.

    Raises:
        ConfigError: there is no model with what its match asks for, or what it starts from is not there.
    """
    used = _used(config)
    return with_start(_sized(used) if config.match.asks else used)


def _sized(config: RunConfig) -> RunConfig:
    """The configuration with the widths of its match."""
    sized = matched(config.model.options, config.match, build_task(config).length)
    return replace(config, model=replace(config.model, options=sized))


def _used(config: RunConfig) -> RunConfig:
    """The configuration without the options of mixers and channel mixers that its pattern does not have."""
    options = config.model.options
    layers = parse_pattern(options.pattern)
    mixers = {name for layer in layers for name in layer.mixers}
    channels = {layer.channel or options.channel for layer in layers}
    used = replace(
        options,
        mixers={name: values for name, values in options.mixers.items() if name in mixers},
        channels={name: values for name, values in options.channels.items() if name in channels},
    )
    return replace(config, model=replace(config.model, options=used))


def _check_builds(config: RunConfig) -> None:
    try:
        with torch.device("meta"):
            model = build_model(config)
            restrict(model, config.train)
    except RuntimeError as error:  # Torch's, of sizes beyond all machines.
        raise ConfigError(f"model: {str(error).splitlines()[0]}") from error
    check_carrying(config, build_task(config), model)


def _check_shares(config: RunConfig) -> None:
    """Refuse entries of ``task.train_on`` whose batches cannot be shared out evenly."""
    count = max(config.machine.processes, 1)
    for source in build_data(config).sources:
        if source.batch_size % count:
            raise ConfigError(
                f"task.train_on[{source.stream}]: its batch_size is {source.batch_size}, machine.processes {count}:"
                " every process has to get the same number of sequences"
            )


def build_model(config: RunConfig) -> LanguageModel:
    """The language model that a run trains, with freshly initialised parameters.

    Raises:
        ConfigError: the library refuses the configuration.
    """
    try:
        return LanguageModel(config.model.options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from error


def restrict(model: LanguageModel, train: TrainConfig) -> LoraAdapters | None:
    """Let only those of a model's weights learn that a run trains, and put its adapters on, which are returned.

    Raises:
        ConfigError: a name matches nothing, or the model cannot have adapters there.
    """
    key = "train.trainable"
    try:
        if not train.trains_all:
            train_only(model, train.trainable or [])
        key = "train.lora"
        lora = train.lora
        return None if lora is None else LoraAdapters(model, lora.rank, lora.alpha, lora.targets)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error
