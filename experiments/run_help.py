"""The help of ``seqarch run``: models, tasks and experiments with a line each, and every key of a run, with its type,
its meaning and the value that a run would have.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.config.overrides import compose
from experiments.config.reference import (
    DESCRIBED,
    Key,
    choice_texts,
    groups,
    layer_keys,
    sections,
    task_keys,
    tracker_keys,
    written,
)
from experiments.tasks import TASKS
from experiments.trackers import TRACKERS
from experiments.util.program import program

ASKED = ("--help", "-h")
MOST_COLUMNS = 120
MOST_OF_VALUE = 60
"""Columns of a value; what ``--cfg job`` shows is whole."""

FLAGS = {
    "--multirun, -m": "run every combination of the choices that commas separate, a process each",
    "--config-dir FOLDER": "choices of one's own besides those below: FOLDER/model/mine.yaml for model=mine",
    "--cfg job": "show the whole configuration, and run nothing",
    "--open": "once all runs have ended, write the report on their experiment and open its explorer in a browser",
    "--help, -h": "this text; with GROUP=NAME before it, the options and defaults of that choice",
}
EXAMPLES = (
    "experiment=mqar model=attention seed=0",
    "--multirun experiment=mqar model=attention,mamba2,hybrid seed=0,1,2 launcher=joblib",
    "experiment=mqar train.lr=1e-3 train.steps=500 model.d_model=128 train.dry_run=true",
    "task=needle --help",
    "model=mamba2 --help",
)


def run_help(arguments: Sequence[str]) -> str:
    """The help on the choices among some arguments; the other arguments count for nothing.

    Raises:
        ConfigError: the choices do not go together.
    """
    chosen = {name: choice for name, _, choice in (each.partition("=") for each in arguments)
              if choice in groups().get(name, [])}  # fmt: skip
    composed = compose([f"{name}={choice}" for name, choice in chosen.items()])
    task, tracker = composed["task"]["name"], composed["tracker"].get("name", "none")
    parts = sections()
    parts[f"task={task}"] = task_keys(task)
    for name in TRACKERS:
        if (found := tracker_keys(name)) and (tracker in (name, "none")):
            parts[f"tracker={name}"] = found
    if "model" in chosen:
        parts |= _layers(composed["model"])
    name = program("run")
    text = [
        f"usage: {name} [--multirun] [GROUP=CHOICE ...] [KEY=VALUE ...]",
        "Trains the run of a configuration, or those of a sweep, to the end. The same command again does only what is"
        " missing. Exit codes: 0 every run is finished, 1 one is not, 130 stopped by a signal.",
        "\n".join(["examples:", *(f"  {name} {each}" for each in EXAMPLES)]),
        "\n".join(["flags:", *_entries(FLAGS)]),
        *("\n".join([f"{group}s ({group}=NAME):", *_lines(choice_texts(group))]) for group in DESCRIBED),
        "\n".join(["other choices (GROUP=NAME):", *_entries(_other_choices())]),
        "keys (KEY=VALUE), with the value that a run has where none is given"
        + (f" ({' '.join(f'{key}={value}' for key, value in chosen.items())}):" if chosen else ":"),
        *("\n".join([title, *described(found, composed)]) for title, found in parts.items()),
        "\n".join(["keys of the other tasks (task=NAME --help describes them)", *_entries(_other_tasks(task))]),
        "model.mixers.NAME.KEY, model.channels.NAME.KEY: the options of mixers and channel mixers; model=NAME --help"
        " describes those of a model.",
        "hydra.launcher.KEY: the launcher's; of launcher=joblib, n_jobs is the number of runs at a time.",
    ]
    return "\n\n".join(_wrapped(each) for each in text)


def _other_choices() -> dict[str, str]:
    return {group: ", ".join(names) for group, names in groups().items() if group not in DESCRIBED}


def _layers(model: Mapping[str, Any]) -> dict[str, list[Key]]:
    """The options of the mixers and channel mixers that a model's pattern uses."""
    from seqarch.models import parse_pattern  # Imports torch.

    layers = parse_pattern(model["pattern"])
    mixers = dict.fromkeys(name for layer in layers for name in layer.mixers)
    channels = dict.fromkeys(layer.channel or model.get("channel", "swiglu") for layer in layers)
    named = [("mixers", name) for name in mixers] + [("channels", name) for name in channels if name != "none"]
    return {f"{key.rstrip('s')} {name}": layer_keys(key, name) for key, name in named}


def _other_tasks(chosen: str) -> dict[str, str]:
    return {
        name: ", ".join(key.name.removeprefix("task.") for key in task_keys(name)) for name in TASKS if name != chosen
    }


def described(keys: Iterable[Key], composed: Mapping[str, Any] | None = None) -> list[str]:
    """The lines on some keys, with the values that a composed configuration has or else their defaults."""
    lines = []
    for key in keys:
        value = _value(composed or {}, key)
        if value is not None and len(value) > MOST_OF_VALUE:
            value = f"{value[:MOST_OF_VALUE]} ..."
        shown = key.name if value is None else f"{key.name}={value}"
        lines += [f"  {shown}  ({key.kind})", *_indented(key.text, 6)]
    return lines


def _value(composed: Mapping[str, Any], key: Key) -> str | None:
    """What a run has, of the configuration or else of the key's own default."""
    found: Any = composed
    for part in key.name.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return key.default
        found = found[part]
    return written(found)


def _entries(texts: Mapping[str, str]) -> list[str]:
    width = max(map(len, texts)) + 4
    return [line for name, text in texts.items() for line in _indented(f"  {name}".ljust(width) + text, 0, width)]


def _lines(texts: Mapping[str, str]) -> list[str]:
    """A line on each of some names, cut where it is too long."""
    width = max(map(len, texts)) + 4
    return [f"  {name}".ljust(width) + textwrap.shorten(text, _columns() - width, placeholder=" ...")
            for name, text in texts.items()]  # fmt: skip


def _columns() -> int:
    return min(MOST_COLUMNS, shutil.get_terminal_size((MOST_COLUMNS, 24)).columns)


def _indented(text: str, first: int, rest: int | None = None) -> list[str]:
    indents = " " * first, " " * (first if rest is None else rest)
    return textwrap.wrap(text, _columns(), initial_indent=indents[0], subsequent_indent=indents[1],
                         break_long_words=False, break_on_hyphens=False, drop_whitespace=True)  # fmt: skip


def _wrapped(text: str) -> str:
    """A paragraph in lines; what has lines already, indented, stays."""
    return text if "\n" in text else "\n".join(_indented(text, 0))
