"""Whether a run's states go on from one training step to the next, or begin otherwise, and what refuses that."""

from __future__ import annotations

from collections.abc import Iterator

from experiments.config.schema import RunConfig
from experiments.tasks import Task
from experiments.util.errors import ConfigError
from seqarch.layers import Mixer
from seqarch.layers.mixer import MOST_COUNTED
from seqarch.models import LanguageModel, tile_pattern
from seqarch.models.stack_layer import StackLayer

KEY = "train.carry_state"


def carries(config: RunConfig, task: Task) -> bool:
    """Whether the states of a run go on from one step to the next."""
    return task.continues if config.train.carry_state is None else config.train.carry_state


def check_carrying(config: RunConfig, task: Task, model: LanguageModel) -> None:
    """Refuse states that have nothing to go on with, or that would grow with every step.

    Raises:
        ConfigError: naming the mixer or the option, and what can be chosen instead.
    """
    if task.continues and config.train.compile:
        raise ConfigError(
            "train.compile: texts begin at other places in each batch of task.documents: streamed, and each would be"
            " compiled anew; choose one of the two"
        )
    if task.continues and config.train.objective != "targets":
        raise ConfigError(
            f"train.objective: {config.train.objective} is of whole sequences from their start, and those of"
            " task.documents: streamed go on from step to step: choose another order of documents"
        )
    names = ", ".join(dict.fromkeys(name for name, mixer in _mixers(config, model) if grows(mixer)))
    if task.continues and config.train.bptt and names:
        raise ConfigError(
            f"train.bptt: texts begin within the segments of task.documents: streamed, and the state of {names} grows"
            " with every token: choose a mixer with a state of fixed size in its place, or train.bptt=0"
        )
    if config.train.first_state != "initial":
        _check_first_state(config, task, model)
    if not carries(config, task):
        return
    if not task.continues:
        raise ConfigError(
            f"{KEY}: the training batches of the task {config.task.name} do not continue one another; of the task text"
            " they do with task.documents=streamed"
        )
    if config.task.train_on:
        raise ConfigError(
            f"{KEY}: states go on over one stream of text, and task.train_on has {len(config.task.train_on)}; take one,"
            f" or {KEY}=false"
        )
    if names:
        raise ConfigError(
            f"{KEY}: the state of {names} grows with every token, and a document has no bound: choose a mixer with a"
            f" state of fixed size in its place, such as sliding_window, or {KEY}=false, which begins each window anew"
        )


def _check_first_state(config: RunConfig, task: Task, model: LanguageModel) -> None:
    kind = f"train.first_state: {config.train.first_state}"
    if task.continues:
        raise ConfigError(
            f"{kind} is for sequences that follow nothing, and with task.documents=streamed a window follows the one"
            " before it: choose one of the two"
        )
    if config.task.train_on:
        raise ConfigError(
            f"{kind} takes the states of as many sequences as a step has, and task.train_on has"
            f" {len(config.task.train_on)} sources, of which each has its own number: take one"
        )
    if config.train.objective != "targets":
        raise ConfigError(
            f"{kind} does not go with train.objective: {config.train.objective}, which is of whole sequences from the"
            " initial state"
        )
    mixers, is_noise = dict(_mixers(config, model)), config.train.first_state != "passed"
    if not any(passes(mixer) and (mixer.takes_any_state or not is_noise) for mixer in mixers.values()):
        raise ConfigError(
            f"{kind} is for states of a fixed size{' that any numbers can be' if is_noise else ''}, and those of"
            f" {', '.join(mixers)} are none"
        )


def passes(mixer: Mixer) -> bool:
    """Whether another sequence's state can be the mixer's first one: it neither grows nor counts up to an end."""
    return not grows(mixer) and mixer.most_tokens is None


def grows(mixer: Mixer) -> bool:
    """Whether the mixer's state has no bound."""
    return mixer.state_bytes(MOST_COUNTED) > mixer.state_bytes(MOST_COUNTED // 2)


def _mixers(config: RunConfig, model: LanguageModel) -> Iterator[tuple[str, Mixer]]:
    """The mixers of all layers, with their names in the pattern."""
    patterns = tile_pattern(config.model.options.pattern, config.model.options.depth)
    layers = [layer for layer in model.stack.layers if isinstance(layer, StackLayer)]
    for pattern, layer in zip(patterns, layers, strict=True):
        for name, mixer in zip(pattern.mixers, layer.mixers, strict=True):
            if isinstance(mixer, Mixer):
                yield name, mixer
