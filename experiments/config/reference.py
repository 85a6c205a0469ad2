"""Every key of a run's configuration, described: the help of ``seqarch run``, and what a shell completes.

Names, types, defaults and texts are those of the dataclasses; the language model's are read from its source, since
importing it imports torch, which takes seconds.
"""

from __future__ import annotations

import ast
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from experiments.config.schema import MachineConfig, ModelConfig, OtherCode, RunConfig, TrackerConfig
from experiments.config.targets import MatchConfig
from experiments.config.tasks import TaskConfig, TrainOn
from experiments.config.training import LoraConfig, TrainConfig
from experiments.tasks import TASKS
from experiments.trackers import TRACKERS
from experiments.util.docstrings import attributes, options_text
from experiments.util.paths import CONFIGS

LANGUAGE_MODEL = (("config.py", "StackConfig"), ("config.py", "LMConfig"))
"""Where the options of the language model are: the files below ``seqarch/models`` and their classes."""

BESIDE = ("name", "options", "overrides")
"""Fields that no configuration gives as they are: a part's own options stand beside its name, or below ``options``."""


@dataclass(frozen=True)
class Key:
    """A key of a configuration.

    Attributes:
        name: its dotted path.
        kind: its type, for people.
        choices: its values, where there are few.
        default: as it is written; ``None`` where a value has to be given.
        text: what it means.
    """

    name: str
    kind: str
    choices: tuple[str, ...]
    default: str | None
    text: str


def sections() -> dict[str, list[Key]]:
    """Every key of every run by section; the options of tasks, trackers and layers come by :func:`task_keys`,
    :func:`tracker_keys` and :func:`layer_keys`."""
    retry = Key("retry", "int", (), "0", "how often a run that fails is tried again; no part of the run's identity.")
    text = (
        "what is done with a run that was trained with other code: keep counts it, rerun moves it aside and trains it"
        " anew where sources of plug-ins differ, rerun_any where any do; no part of the run's identity."
    )
    other = Key("other_code", "text", typing.get_args(OtherCode), "refuse", text)
    name = Key("name", "text", (), None, "the experiment's name, and so its folder below runs; default: its own.")
    task = Key("task.name", "text", tuple(TASKS), None, "which task; task=NAME chooses its default options, too.")
    model = Key("model.name", "text", (), None, options_text(ModelConfig)["name"])
    tracker = Key("tracker.name", "text", tuple(TRACKERS), TrackerConfig.name, "which tracker, as tracker=NAME.")
    return {
        "the run": [name, *(key for key in keys(RunConfig) if key.name != "shown"), retry, other],
        "the model": [model, *_language_model()],
        "any task": [task, *keys(TaskConfig, "task."), *keys(TrainOn, "task.train_on[].")],
        "training": [*keys(TrainConfig, "train."), *keys(LoraConfig, "train.lora.")],
        "the machine": keys(MachineConfig, "machine."),
        "matched sizes": keys(MatchConfig, "match."),
        "the tracker": [tracker],
    }


def task_keys(name: str) -> list[Key]:
    return keys(TASKS[name].Config, "task.")


def tracker_keys(name: str) -> list[Key]:
    return keys(TRACKERS[name].Config, "tracker.options.")


def layer_keys(key: str, name: str) -> list[Key]:
    """The options of a mixer (``mixers``) or a channel mixer (``channels``) by its name."""
    from experiments.config.options import REGISTRIES  # Imports torch.

    found = keys(REGISTRIES[key][name].Config, f"model.{key}.{name}.")
    return [each for each in found if not each.name.endswith(".d_model")]  # The stack's.


@cache
def groups() -> dict[str, list[str]]:
    """The groups of the runner's configurations, and what can be chosen of each."""
    folders = sorted(path for path in CONFIGS.iterdir() if path.is_dir())
    found = {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}
    return {name: choices for name, choices in found.items() if choices}


DESCRIBED = {"model": ("seqarch", "layers"), "task": ("experiments", "tasks"), "experiment": None}
"""The groups whose choices have a line each, and the folder of a package where a module of the choice's name may be."""


def choice_texts(group: str) -> dict[str, str]:
    """A sentence on each choice of a group of :data:`DESCRIBED`: the comment that its file begins with, or else the
    first line of the module of that name, which is not imported.
    """
    place = DESCRIBED[group]
    modules = {} if place is None else {path.stem: path for path in _folder(*place).rglob("*.py")}
    found = {}
    for name in groups()[group]:
        text = _comment((CONFIGS / group / f"{name}.yaml").read_text(encoding="utf-8"))
        if name in modules and (group == "task" or not text):
            text = modules[name].read_text(encoding="utf-8").partition('"""')[2].partition("\n")[0].removesuffix('"""')
        found[name] = _plain(text)
    return found


def _comment(text: str) -> str:
    """The first sentence of the comment at the head of a YAML file."""
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#") or (lines and lines[-1].endswith(":")):
            break
        if not line.startswith("# @"):
            lines.append(line.removeprefix("#").strip())
    sentence = re.match(r".*?[.](?= |$)", whole := " ".join(lines))
    return sentence.group() if sentence else re.sub(r":$", ".", whole)


def keys(config: Any, prefix: str = "") -> list[Key]:
    """The options of a dataclass; those that are dataclasses themselves are sections of their own."""
    hints, told = typing.get_type_hints(config), options_text(config)
    return [
        Key(
            prefix + field.name,
            _kind(hints[field.name]),
            _choices(hints[field.name]),
            _default(field.default if field.default_factory is MISSING else field.default_factory()),
            _plain(told.get(field.name, "")),
        )
        for field in fields(config)
        if field.init and field.name not in BESIDE and not is_dataclass(hints[field.name])
    ]


def _language_model() -> list[Key]:
    folder = _folder("seqarch", "models")
    return [key for file, name in LANGUAGE_MODEL for key in _keys_of_source(folder / file, name, "model.")]


def _folder(package: str, inner: str) -> Path:
    """A folder of a package that is not imported."""
    found = find_spec(package)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / inner


def _keys_of_source(file: Path, name: str, prefix: str) -> Iterator[Key]:
    """The options of a dataclass in a file that is not imported."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    told = attributes(ast.get_docstring(found) or "")
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id != "vocab_size":
            option, hint = node.target.id, _hint_of_source(node.annotation)
            default = None if node.value is None else _default_of_source(node.value)
            yield Key(prefix + option, _kind(hint), _choices(hint), default, _plain(told.get(option, "")))


def _hint_of_source(annotation: ast.expr) -> Any:
    return eval(ast.unparse(annotation), {"Any": Any, "Literal": Literal})  # This project's own source.


def _default_of_source(value: ast.expr) -> str | None:
    try:
        return _default(ast.literal_eval(value))
    except ValueError:  # field(default_factory=dict)
        return "{}"


def _kind(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_kind(each) for each in arguments)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is list:
        return "{...}, ..." if is_dataclass(arguments[0]) else f"[{_kind(arguments[0])}, ...]"
    if origin is dict or is_dataclass(hint):
        return "{...}"
    names = {str: "text", bool: "true|false", type(None): "null", Any: "value"}
    return names.get(hint) or getattr(hint, "__name__", str(hint))


def _choices(hint: Any) -> tuple[str, ...]:
    if hint is bool:
        return "true", "false"
    return tuple(map(str, typing.get_args(hint))) if typing.get_origin(hint) is Literal else ()


def _default(value: Any) -> str | None:
    return None if value is MISSING else written(value)


def written(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(written, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"


def _plain(text: str) -> str:
    text = re.sub(r"\bNone\b", "null", text)
    return " ".join(text.replace("``", "").replace(":class:", "").replace(":mod:", "").replace("`", "").split())
