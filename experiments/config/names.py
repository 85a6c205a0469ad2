"""The names of runs: the experiment that a run belongs to, and the name of its folder, which shows what differs.

``delta_net-lr3e-3-seed1-ab12cd`` is a run of the model ``delta_net`` with one option that is not as in its experiment,
its seed, and the first digits of the hash of its identity. Identity decides which folder is a run's, and the name only
shows it: a folder of another name, such as those of earlier versions, is found by the digits at its end.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.util.errors import ConfigError

DIGITS = 6
"""Of the hash of a run's identity, in its folder's name."""
EARLIER_DIGITS = 10
"""In the names that earlier versions gave: ``attention-seed0-e5cdbf1110``."""
LONGEST = 60
"""Characters of a folder's name, beyond which options are left out of it, the last ones first."""
LONGEST_PART = 24
"""Characters of one option in it."""

NOT_SHOWN = (
    *("seed", "name", "experiment", "runs", "retry", "other_code", "imports", "plugins", "tracker", "machine"),
    *("model.name", "task.name"),
    *("train.keep_last", "train.save_every", "train.log_every", "train.dry_run", "train.device", "train.threads"),
    *("train.start_from", "train.teacher"),
)
"""Options that a name shows otherwise, or that nobody compares runs by."""

PLACE = ("experiment", "earlier", "shown")
"""Keys of a composed configuration by which a run finds its folder."""

EXPERIMENT = re.compile(r"[\w.+-]+(/[\w.+-]+)*")
"""What an experiment can be called: a folder, or one in another."""


def check_experiment(key: str, given: object) -> str:
    """The name of an experiment, which is that of its folder below ``runs``.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(given, str) or not EXPERIMENT.fullmatch(given):
        raise ValueError(f"{key} must be usable as a folder's name, got {given!r}")
    if ".." in given.split("/"):
        raise ValueError(f"{key} must not lead out of the runs folder, got {given!r}")
    return given


def placed(composed: Mapping[str, Any], own_task: object) -> dict[str, Any]:
    """A composed configuration with the experiment that its run belongs to, which is the name of its folder.

    That is ``name`` where it is given. Else it is the experiment's own, but that a run of another task than the
    experiment's belongs to an experiment called as that task: its results are no others' rivals.

    Args:
        own_task: the name of the task that the experiment has by itself.

    Raises:
        ConfigError: ``name`` cannot be the name of a folder.
    """
    found, name = {key: value for key, value in composed.items() if key != "name"}, composed.get("name")
    if name is not None:
        try:
            return found | {"experiment": check_experiment("name", name)}
        except ValueError as error:
            raise ConfigError(str(error)) from error
    task = composed.get("task")
    own = task.get("name") if isinstance(task, Mapping) else None
    if isinstance(own, str) and own != own_task:
        return found | {"experiment": own, "earlier": composed.get("experiment")}
    return found


def folder_name(model: str, seed: int, digest: str, shown: Mapping[str, Any]) -> str:
    """The name of a new folder.

    Args:
        shown: options in which the run differs from its experiment, by path, the most important ones first.
    """
    end = f"-seed{seed}-{digest[:DIGITS]}"
    name = model
    for part in _parts(shown):
        if len(name) + 1 + len(part) + len(end) > LONGEST:
            break
        name += f"-{part}"
    return name + end


def can_be(name: str, model: str, seed: int) -> bool:
    """Whether a folder of that name can be of a run of that model and seed; versions differ in what they hash."""
    digits = f"([0-9a-f]{{{DIGITS}}}|[0-9a-f]{{{EARLIER_DIGITS}}})"
    return re.fullmatch(rf"{re.escape(model)}(-[\w.+-]+)?-seed{seed}-{digits}", name) is not None


def with_digest(names: Sequence[str], model: str, seed: int, digest: str) -> list[str]:
    """Those of some names that end with the digits of a hash, and are of its model and seed."""
    ends = tuple(f"-seed{seed}-{digest[:digits]}" for digits in (DIGITS, EARLIER_DIGITS))
    return sorted(name for name in names if name.endswith(ends) and can_be(name, model, seed))


def is_shown(path: str) -> bool:
    """Whether a name shows the option at that path where it differs."""
    return not f"{path}.".startswith(tuple(f"{each}." for each in NOT_SHOWN))


def _parts(shown: Mapping[str, Any]) -> list[str]:
    last = Counter(path.rpartition(".")[2] for path in shown)
    return [_part(path, value, last[path.rpartition(".")[2]] > 1)[:LONGEST_PART].rstrip("-._")
            for path, value in shown.items()]  # fmt: skip


def _part(path: str, value: Any, shared: bool) -> str:
    """``lr3e-3``, ``schedule_wsd``; with the key above, ``mamba2.d_state16``, where several have that name."""
    if path == "task":
        return _text(value)
    name = ".".join(path.split(".")[-2:] if shared else path.split(".")[-1:])
    return name + ("" if type(value) in (int, float) else "_") + _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return "_".join(f"{key}{_text(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return "_".join(map(_text, value))
    return re.sub(r"[^\w.+-]+", "_", str(value), flags=re.ASCII).strip("_")


def _number(value: float) -> str:
    """The shorter of ``0.003`` and ``3e-3``."""
    plain = f"{value:.6g}"
    mantissa, _, exponent = f"{value:.5e}".partition("e")
    if not exponent:  # No finite number, which the typed configuration refuses.
        return plain
    scientific = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return min(plain, scientific, key=len)
