"""Where the runner is: in a checkout, or installed from a wheel, which has the configurations inside the package."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
"""Of the checkout, with ``docs`` and ``tests``; of an installed runner the folder that packages are installed in."""

INSTALLED = (PACKAGE / "configs").is_dir()
"""Whether this is a runner from a wheel, which has no git repository, no ``docs`` and no ``tests``."""

CONFIGS = (PACKAGE if INSTALLED else ROOT) / "configs"


def python_environment() -> dict[str, str]:
    """The environment in which ``python -m experiments.NAME`` is this runner, whatever the working directory holds.

    A folder ``experiments`` of somebody's is no rare thing, and ``-m`` looks into the working directory first.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if not INSTALLED:
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return environment


PLUGIN_PATH = "SEQARCH_PLUGIN_PATH"
"""The environment variable in which a training process is told the folders of plug-ins."""


def add_working_directory() -> None:
    """Let modules in the working directory be imported, as ``python -m`` does, and those in the folders of plug-ins of
    whoever started this process; but after all others: none is hidden.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    others = filter(None, os.environ.get(PLUGIN_PATH, "").split(os.pathsep))
    sys.path.extend(folder for folder in others if folder not in sys.path)


def user_cache(name: str, variable: str, given: str = "") -> Path:
    """Where what can be made again is kept: ``given``, what the environment's variable names, or ``seqarch/NAME`` in
    the user's cache.
    """
    if chosen := given or os.environ.get(variable):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqarch" / name
