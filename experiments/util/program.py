"""How a command was called: ``seqarch NAME`` by the installed command, ``python -m experiments.NAME`` without it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

INSTALLED_NAME = "seqarch"
COMMAND = "SEQARCH_COMMAND"
"""The environment variable with the whole command line, for the records of the runs that it starts."""


def call_as(name: str, arguments: Sequence[str]) -> None:
    """Go on as if this process had been started as that command of ``seqarch`` with these arguments."""
    sys.argv = [f"{INSTALLED_NAME} {name}", *arguments]


def program(name: str) -> str:
    """A command as a person types it, without its arguments: in the way in which this process was started."""
    by_name = sys.argv[0].startswith(f"{INSTALLED_NAME} ")
    return f"{INSTALLED_NAME} {name}" if by_name else f"python -m experiments.{name}"


def record_command(name: str) -> None:
    """Keep the command line for the records of runs."""
    os.environ[COMMAND] = " ".join([program(name), *([shlex.join(sys.argv[1:])] if sys.argv[1:] else [])])
