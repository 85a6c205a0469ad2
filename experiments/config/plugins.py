"""The user's own code in a run: modules that register mixers, tasks and trackers, and classes named by their path.

Every process of a run makes the typed configuration first, which imports what ``plugins`` names and what installed
packages offer as entry points of the group ``seqarch.plugins``; so names are known wherever they are looked up.
"""

from __future__ import annotations

import importlib
import os
import re
import site
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

from experiments.config.registration import check_task, check_tracker
from experiments.tasks import TASKS, Task
from experiments.trackers import TRACKERS, Tracker
from experiments.util.errors import ConfigError, RunnerError
from experiments.util.patterns import without_options
from experiments.util.sources import package_folder

GROUP = "seqarch.plugins"
"""The group of entry points by which an installed package offers a plug-in."""
KEYS = ("plugins", "imports")
"""The keys that list modules: ``imports`` is the former name, still read."""
PATH = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
"""``package.module:Class``, in place of a registered name."""

_packages: dict[str, str | None] = {}
"""The top-level packages of the plug-ins in this process, each with the installed distribution that offers it."""


def import_plugins(names: Iterable[str], key: str = KEYS[0]) -> None:
    """Import the plug-ins of installed packages and then these modules; what is imported already stays as it is.

    Raises:
        ConfigError: a name is none of a module, or a module is missing or raises.
    """
    _import_installed()
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"{key}: expected names of modules, as in package.module, got {name!r}")
        _import(name, key)
        _packages.setdefault(name.partition(".")[0], None)


@cache
def _import_installed() -> None:
    for point in entry_points(group=GROUP):
        source = point.dist.name if point.dist else None
        _import(point.module, f"the plug-in {point.name!r} of the installed package {source}")
        _packages[point.module.partition(".")[0]] = source


def _import(name: str, where: str) -> Any:
    _look_here()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{where}: cannot import {name!r}: {error}; is its folder in PYTHONPATH?") from error
    except RunnerError as error:
        raise ConfigError(f"{where}: importing {name!r}: {error}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where}: importing {name!r} raises {type(error).__name__}: {error}") from error


def _look_here() -> None:
    """Find modules in the folder where the command began, too, as ``python -m`` does and an installed command not."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def register_path(key: str, name: object) -> None:
    """Register the class that ``package.module:Class`` names, under that path; other names are left alone.

    Args:
        key: that of the configuration which holds the name: it says what the class has to be.

    Raises:
        ConfigError: there is no such module or class, or it is none for this key.
    """
    if not isinstance(name, str) or not (match := PATH.fullmatch(name)):
        return
    base, registry = _kind(key)
    module = _import(match[1], f"{key}: {name}")
    if not hasattr(module, match[2]):
        raise ConfigError(f"{key}: {name}: {match[1]} has no class {match[2]}")
    found = getattr(module, match[2])
    if not (isinstance(found, type) and issubclass(found, base) and found is not base):
        raise ConfigError(f"{key}: {name} has to be a subclass of {base.__module__}.{base.__name__}, and is {found!r}")
    try:
        if base is Task:
            check_task(name, found)
        elif base is Tracker:
            check_tracker(name, found)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error
    registry[name] = found
    _packages.setdefault(name.partition(":")[0].partition(".")[0], None)


def _kind(key: str) -> tuple[type, dict[str, Any]]:
    """What a key's names stand for: the base class and the registry."""
    if key == "task.name":
        return Task, TASKS
    if key == "tracker.name":
        return Tracker, TRACKERS
    from seqarch import layers  # Imports torch, which a wrong key need not wait for.

    if key == "model.mixers":
        return layers.Mixer, layers.MIXERS
    return layers.ChannelMixer, layers.CHANNEL_MIXERS


def register_model_paths(model: Mapping[str, Any]) -> None:
    """:func:`register_path` for each path in a model's pattern, in its default channel mixer and among its options.

    Raises:
        ConfigError: as there.
    """
    pattern = without_options(given) if isinstance(given := model.get("pattern"), str) else ""
    for match in PATH.finditer(pattern):
        after_slash = pattern[: match.start()].rstrip().endswith("/")
        register_path("model.channels" if after_slash else "model.mixers", match[0])
    register_path("model.channels", model.get("channel"))
    for key in ("mixers", "channels"):
        for name in given if isinstance(given := model.get(key), Mapping) else ():
            register_path(f"model.{key}", name)


def plugin_packages() -> dict[str, str | None]:
    """The version of each plug-in's top-level package in this process, ``None`` where it has none."""
    return {name: _version(name, source) for name, source in _packages.items()}


def package_version(name: str) -> str | None:
    """The version of a top-level package, as it is installed or as it says itself; ``None`` where neither does."""
    return _version(name, _packages.get(name))


def _version(name: str, source: str | None) -> str | None:
    try:
        return version(source or name)
    except (PackageNotFoundError, ValueError):
        found = getattr(sys.modules.get(name), "__version__", None)
        return found if isinstance(found, str) else None


def plugin_folders() -> list[str]:
    """The folders that the plug-ins are imported from, for a process that is started: those that Python knows of its
    own are left out.
    """
    found = (package_folder(name) for name in _packages)
    own = {*site.getsitepackages(), site.getusersitepackages()}
    return list(dict.fromkeys(str(path.parent) for path in found if path is not None and str(path.parent) not in own))
