"""The exact command of a recorded run: ``seqarch run`` with all that its configuration has and the defaults do not."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from functools import cache
from typing import Any

from experiments.config import options
from experiments.config.overrides import compose
from experiments.config.reference import groups
from experiments.config.schema import flat, run_config, without
from experiments.config.training import TrainConfig
from experiments.util.errors import RunnerError
from experiments.util.plot_style import pattern_channels, pattern_mixers

NEEDED = ("plugins", "train.start_from", "train.teacher", "task.tokenizer")
"""Keys that a run cannot do without, where they are set, and that are no part of its identity."""

ON_A_MACHINE = ("device", "threads")
"""Options of training that say where a run trains."""

PLAIN_TEXT = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_][\w./-]*", re.IGNORECASE)
"""Text that Hydra's grammar takes as it is and reads back as text."""


def run_command(config: Mapping[str, Any]) -> str:
    """``seqarch run experiment=mqar model=mamba2 seed=1 train.lr=0.003``: trains the run of that configuration anew.

    Args:
        config: of a run's folder or of a study's records. What this version does not know of it is given as it stands.
    """
    chosen = _choices(config)
    typed, base = _typed(config), _defaults(tuple(chosen.items()))
    own = typed or _as_it_stands(config)
    differing = {path: value for path, value in own.items() if path not in base or value != base[path]}
    if typed:
        differing |= {path: _default(path) for path in base if _is_set_back(path, own, base)}
    for name in ON_A_MACHINE:
        if name not in config["train"]:  # As in the records of studies.
            differing.pop(f"train.{name}", None)
    if differing.pop("experiment", None) is not None:
        chosen["name"] = config["experiment"]
    given = [*(f"{key}={value}" for key, value in chosen.items()),
             *(f"{path}={hydra_text(value)}" for path, value in sorted(differing.items()))]  # fmt: skip
    plain = flat(config)
    given += [f"{path}={hydra_text(plain[path])}" for path in NEEDED if plain.get(path)]
    return f"seqarch run {shlex.join(given)}"


def _choices(config: Mapping[str, Any]) -> dict[str, str]:
    """The files of configurations that a run is nearest to, by group."""
    wanted = {"experiment": str(config["experiment"]).rpartition("/")[2], "task": config["task"].get("name"),
              "model": config["model"].get("name")}  # fmt: skip
    return {group: name for group, name in wanted.items() if name in groups().get(group, [])}


def _typed(config: Mapping[str, Any]) -> dict[str, Any]:
    """All that makes the run, by path; nothing of a configuration of another version, or of absent plug-ins."""
    own = {"seed": config["seed"], "train.lr": float(config["train"]["lr"])}
    shared = _typed_but(json.dumps(without(config, ("format", *own))))
    return {**shared, **own} if shared else {}


@cache
def _typed_but(text: str) -> dict[str, Any]:
    """Of a configuration as JSON without seed and learning rate, in which many runs of a sweep are alike."""
    config = json.loads(text)
    try:
        return _without_empty(
            flat(run_config({**config, "seed": 0, "train": {**config["train"], "lr": 1.0}}).identity())
        )
    except RunnerError:
        return {}


def _as_it_stands(config: Mapping[str, Any]) -> dict[str, Any]:
    parts = {key: config[key] for key in ("experiment", "seed", "model", "task", "train") if key in config}
    return _without_empty(flat(parts))


@cache
def _defaults(chosen: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """The identity of the run that these choices alone would make."""
    composed = compose([f"{group}={name}" for group, name in chosen])
    known = {key: value for key, value in composed.items() if key not in ("retry", "other_code", "earlier", "shown")}
    return _without_empty(flat(run_config(known).identity()))


def _without_empty(paths: Mapping[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in paths.items() if value != {}}


def _is_set_back(path: str, own: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Whether a run has an option at its default that the chosen files set; of layers that it has."""
    match path.split("."):
        case ["model", "mixers" | "channels", name, _]:
            pattern = own["model.pattern"]
            has = {own["model.channel"], *pattern_mixers(pattern), *pattern_channels(pattern)}
            if name not in has:
                return False
    return path not in own and base[path] != _default(path)


def _default(path: str) -> Any:
    """The default of an option that a run leaves out."""
    part, _, name = path.partition(".")
    return getattr(TrainConfig, name, None) if part == "train" else options.default(path)


def hydra_text(value: Any) -> str:
    """A value in the grammar of Hydra's overrides, so that it is read back as it is."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{hydra_text(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(hydra_text, value)) + "]"
    if not isinstance(value, str):
        return repr(value)
    if PLAIN_TEXT.fullmatch(value):
        return value
    # Before a quote, the closing one included, a backslash stands for itself only where it is doubled.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{escaped}'"
