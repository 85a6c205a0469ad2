"""Tasks and trackers of one's own, entered in the registries under a checked name."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, is_dataclass
from typing import Any

from experiments.tasks import TASKS, Metric, Task
from experiments.tasks.byte_text import ByteText
from experiments.tasks.generated import GeneratedTask
from experiments.trackers import TRACKERS, Tracker

NAME = re.compile(r"[A-Za-z]\w*")
METHODS = {
    Task: ("__init__", "train_batch", "evaluation", "score", "item_scores", "chance", "manifest"),
    GeneratedTask: ("generate",),
    ByteText: ("read", "source"),
}
"""The methods that whoever derives from one of these owes."""
ATTRIBUTES = {"name": str, "title": str, "reading": str, "metric": Metric, "test_options": tuple}
"""The class attributes of every task, and their types."""


def register_task(name: str, task: type[Task]) -> None:
    """Make a task a choice of ``task.name``; once more with the same class changes nothing.

    Args:
        name: that of the class attribute ``name`` too, which results are shown under.

    Raises:
        TypeError: it is no class of :class:`Task`.
        ValueError: it lacks what a task owes, the name is none, or is another task's.
    """
    _check_class("task", Task, name, task)
    check_task(name, task)
    if task.name != name:
        raise ValueError(f"task {name!r}: {_path(task)} has the name {task.name!r}; both have to be the same")
    _enter("task", TASKS, name, task)


def register_tracker(name: str, tracker: type[Tracker]) -> None:
    """Make a tracker a choice of ``tracker.name``; once more with the same class changes nothing.

    Raises:
        TypeError: it is no class of :class:`Tracker`.
        ValueError: its ``Config`` is no dataclass, the name is none, or is another tracker's.
    """
    _check_class("tracker", Tracker, name, tracker)
    check_tracker(name, tracker)
    _enter("tracker", TRACKERS, name, tracker)


def check_task(name: str, task: type[Task]) -> None:
    """Raise ``ValueError`` unless a task has what its base classes ask for."""
    _check_config("task", name, task)
    if lacking := [*_lacking_methods(task), *_lacking_attributes(task)]:
        raise ValueError(f"task {name!r}: {_path(task)} has to define {', '.join(lacking)}")
    if unknown := sorted(set(task.test_options) - {each.name for each in fields(task.Config)}):
        raise ValueError(f"task {name!r}: its test_options name {unknown[0]!r}, which is no option of its Config")


def _lacking_methods(task: type[Task]) -> list[str]:
    owed = [(base, method) for base, methods in METHODS.items() if issubclass(task, base) for method in methods]
    if issubclass(task, GeneratedTask) and task.chance is GeneratedTask.chance:
        owed.append((GeneratedTask, "guess"))
    return [method for base, method in owed if getattr(task, method) is getattr(base, method)]


def _lacking_attributes(task: type[Task]) -> list[str]:
    wanted = ATTRIBUTES | ({"guesses": str} if "guess" in vars(task) else {})
    return [key for key, kind in wanted.items() if not isinstance(getattr(task, key, None), kind)]


def check_tracker(name: str, tracker: type[Tracker]) -> None:
    """Raise ``ValueError`` unless a tracker's options are a dataclass, and it is made of what the runner gives it."""
    _check_config("tracker", name, tracker)
    try:
        inspect.signature(tracker).bind(None, None, None)
    except TypeError as error:
        raise ValueError(
            f"tracker {name!r}: {_path(tracker)} has to be made of (options, folder, config): {error}"
        ) from error


def _check_class(kind: str, base: type, name: object, given: object) -> None:
    if not (isinstance(given, type) and issubclass(given, base) and given is not base):
        raise TypeError(f"{kind} {name!r}: expected a subclass of {_path(base)}, got {given!r}")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"{kind} {name!r}: expected a name of letters, digits and _, which a letter begins")


def _check_config(kind: str, name: str, given: Any) -> None:
    config = getattr(given, "Config", None)
    if not (isinstance(config, type) and is_dataclass(config)):
        raise ValueError(f"{kind} {name!r}: {_path(given)}.Config has to be a dataclass of its options, got {config!r}")


def _enter(kind: str, registry: dict[str, Any], name: str, given: type) -> None:
    held = registry.setdefault(name, given)
    if held is not given:
        raise ValueError(f"{kind} {name!r} is {_path(held)} already, and {_path(given)} was to have that name too")


def _path(given: type) -> str:
    return f"{given.__module__}.{given.__qualname__}"
