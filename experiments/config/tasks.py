"""The task of a run: its options, and the other options of the same task that it is trained on and tested on.

``task.train_on`` and ``task.test_on`` list overrides, such as ``{length: 256, pairs: 64}``. Each makes a task of the
same class, whose options are those of the run's task but for these; all have the vocabulary of the run's task.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from experiments.config.convert import convert
from experiments.config.plugins import register_path
from experiments.tasks import TASKS, Task
from experiments.util.errors import ConfigError, choices_hint

MOST = 2**31 - 1
"""Sequences per step and the numbers that make a task: beyond it nothing can be counted, held or waited for."""

Overrides = dict[str, Any]
"""Options of a task by name, for those of the run's task."""

Order = Literal["mixture", "curriculum"]


@dataclass(frozen=True)
class TrainOn:
    """An entry of ``task.train_on``; its other keys are options of the task.

    Attributes:
        overrides: those options.
        share: of the optimizer steps in a mixture, relative to the shares of the other entries.
        batch_size: sequences per step; 0 for as many as hold about the tokens of ``train.batch_size`` sequences of the
            run's task.
    """

    overrides: Overrides
    share: float = 1.0
    batch_size: int = 0

    def __post_init__(self):
        if not self.share > 0:
            raise ValueError(f"share must be positive, got {self.share}")
        if not 0 <= self.batch_size <= MOST:
            raise ValueError(f"batch_size must be from 1 to {MOST}, or 0 for as many as fit, got {self.batch_size}")

    def plain(self) -> dict[str, Any]:
        """As it is given: the options, and what differs from the defaults of the rest."""
        kept = {name: getattr(self, name) for name in OF_ENTRY if getattr(self, name) != getattr(TrainOn, name)}
        return {**self.overrides, **kept}


OF_ENTRY = ("share", "batch_size")
"""The keys of an entry of ``task.train_on`` that are no options of the task."""


@dataclass(frozen=True)
class TaskConfig:
    """A task's name and options, and what it is trained and tested on besides.

    Attributes:
        name: a key of ``TASKS``.
        options: an instance of ``TASKS[name].Config``.
        train_on: what to train on in place of the options themselves; empty for these.
        order: ``mixture``: each optimizer step takes one entry, drawn by the shares; or ``curriculum``: one entry after
            another, each until the model has learnt it (``train.stage_target``, ``train.schedule``).
        test_on: further test splits, each at other options.
    """

    name: str
    options: Any
    train_on: list[TrainOn] = field(default_factory=list)
    order: Order = "mixture"
    test_on: list[Overrides] = field(default_factory=list)

    def with_overrides(self, overrides: Mapping[str, Any], path: str) -> Any:
        """The options with some of them replaced; the error of a wrong one begins with ``path``.

        Options that only list further tests are at their defaults, since those are tests of the run's task.
        """
        task = TASKS[self.name]
        kept = [each.name for each in fields(task.Config) if each.init and each.name not in task.test_options]
        given = {**{name: getattr(self.options, name) for name in kept}, **overrides}
        return convert(task.Config, given, path)

    def plain(self) -> dict[str, Any]:
        """``train_on``, ``order`` and ``test_on`` as they are given; nothing of what is at its default."""
        found: dict[str, Any] = {}
        if self.train_on:
            found = {"train_on": [entry.plain() for entry in self.train_on], "order": self.order}
        return found | ({"test_on": [dict(entry) for entry in self.test_on]} if self.test_on else {})


def label(overrides: Mapping[str, Any]) -> str:
    """A name for overrides, fit for a key: ``256_pairs_64`` of ``{length: 256, pairs: 64}``; ``main`` of none."""
    words = [str(overrides["length"])] if "length" in overrides else []
    words += [f"{name}_{value}" for name, value in overrides.items() if name != "length"]
    return re.sub(r"[^\w-]+", "-", "_".join(words)) or "main"


def task_config(task: Mapping[str, Any]) -> TaskConfig:
    """The typed form of a task's name, its options and what it is trained and tested on.

    Raises:
        ConfigError: naming the full path of a wrong key, type or value and the nearest right one.
    """
    options = dict(task)
    name = options.pop("name", None)
    register_path("task.name", name)
    if not isinstance(name, str) or name not in TASKS:
        raise ConfigError(f"task.name: unknown task {name!r}, {choices_hint(name, TASKS)}")
    lists = {key: options.pop(key) for key in ("train_on", "test_on") if key in options}
    order = convert(Order, options.pop("order", "mixture"), "task.order")
    _check_size(name, options, "task")
    main = TaskConfig(name, convert(TASKS[name].Config, options, "task"))
    train_on = [_train_on(main, *each) for each in _entries("train_on", lists)]
    test_on = [_overrides(main, *each) for each in _entries("test_on", lists)]
    _check_order(order, train_on)
    _check_tests(main, test_on)
    return TaskConfig(name, main.options, train_on, order, test_on)


def _entries(key: str, lists: Mapping[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """The entries of a list of overrides, each with its path."""
    found = convert(list[dict[str, Any]], lists.get(key, []), f"task.{key}")
    return [(entry, f"task.{key}[{number}]") for number, entry in enumerate(found)]


def _train_on(main: TaskConfig, entry: dict[str, Any], path: str) -> TrainOn:
    own = {key: entry.pop(key) for key in OF_ENTRY if key in entry}
    if taken := [each.name for each in fields(TASKS[main.name].Config) if each.name in OF_ENTRY]:
        raise ConfigError(f"{path}: {taken[0]} is of the entry, and the task {main.name} has an option of that name")
    overrides = _overrides(main, entry, path)
    return convert(TrainOn, own, path, known={"overrides": overrides})


def _overrides(main: TaskConfig, entry: dict[str, Any], path: str) -> Overrides:
    """The overrides with their values as the task's options have them, in the order of these.

    Raises:
        ConfigError: they make no task, or one of another vocabulary.
    """
    task = TASKS[main.name]
    for key in task.test_options:
        if key in entry:
            raise ConfigError(f"{path}.{key}: the tests of a run are in task.{key} and task.test_on alone")
    _check_size(main.name, entry, path)
    typed = main.with_overrides(entry, path)
    theirs, own = (task(options).vocab_size for options in (typed, main.options))
    if theirs != own:
        raise ConfigError(f"{path}: its vocabulary has {theirs} tokens, that of the task {own}; one model reads both")
    return {each.name: getattr(typed, each.name) for each in fields(task.Config) if each.name in entry}


def _check_size(name: str, options: Mapping[str, Any], path: str) -> None:
    """Refuse whole numbers beyond :data:`MOST`."""
    whole = [each.name for each in fields(TASKS[name].Config) if "int" in str(each.type)]
    for key in (key for key in whole if key in options):
        for number in options[key] if isinstance(options[key], list) else [options[key]]:
            if isinstance(number, int) and abs(number) > MOST:
                raise ConfigError(f"{path}.{key} must be at most {MOST}, got {reprlib.repr(number)}")


def _check_order(order: str, train_on: Sequence[TrainOn]) -> None:
    if order == "curriculum":
        if not train_on:
            raise ConfigError("task.order: a curriculum needs entries in task.train_on, and there are none")
        if odd := [number for number, entry in enumerate(train_on) if entry.share != 1]:
            raise ConfigError(f"task.train_on[{odd[0]}].share: a curriculum takes its entries one after another")
    else:
        names = [label(entry.overrides) for entry in train_on]
        for number, name in enumerate(names):
            if name in names[:number]:
                first = names.index(name)
                raise ConfigError(
                    f"task.train_on[{number}] is task.train_on[{first}] again; give that one a larger share"
                )


def _check_tests(main: TaskConfig, test_on: Sequence[Overrides]) -> None:
    """Refuse tests that are there already."""
    made: Task = TASKS[main.name](main.options)
    names = [*made.tests, *(split_name(entry) for entry in test_on)]
    plain = main.with_overrides({}, "task")
    for number, entry in enumerate(test_on):
        path, name = f"task.test_on[{number}]", split_name(entry)
        if main.with_overrides(entry, path) == plain:
            raise ConfigError(f"{path} is the task as it is, which the split test is of")
        if names.index(name) < len(made.tests) + number:
            raise ConfigError(f"{path} is the split {name}, which there is already")


def split_name(overrides: Mapping[str, Any]) -> str:
    """The name of a test split at other options: ``test_256_pairs_64``."""
    return f"test_{label(overrides)}"
