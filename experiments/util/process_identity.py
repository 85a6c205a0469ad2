"""The identity of a process among all others: on other machines, in other containers, and later ones here.

A process number means something only to processes that see the same numbers: those of one boot of one machine and of
one process namespace, as two containers on a machine have one each under perhaps the same host name.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

BOOT, NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
MARK = re.compile(r"\.(\d+)-(\w+)-([0-9a-f]{8})\.\w+$")


def place() -> dict[str, str]:
    """The place in which the numbers of processes mean the same as here."""
    try:
        return {"boot": BOOT.read_text().strip(), "namespace": os.readlink(NAMESPACE)}
    except OSError:  # No Linux: its name is what is known of the machine.
        return {"boot": socket.gethostname(), "namespace": ""}


def process_identity(pid: int) -> dict[str, Any]:
    """A process here, distinct from a later one with the same number and from those of other places."""
    return {"pid": pid, "host": socket.gethostname(), "started": start_of(pid), **place()}


def is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether both are one process; its machine may have got another name meanwhile."""
    keys = ("pid", "started", "boot", "namespace")
    return all(one.get(key) == other.get(key) for key in keys)


def is_here(identity: Mapping[str, Any]) -> bool:
    """Whether this system knows if a process of :func:`process_identity` runs."""
    return all(identity.get(key) == value for key, value in place().items())


def is_alive(identity: Mapping[str, Any]) -> bool:
    """Whether a process of :func:`process_identity` still runs; in another place nobody can know, so yes.

    What is no process at all, such as a damaged file says, does not run.
    """
    pid = identity.get("pid")
    if type(pid) is not int or pid <= 0:  # 0 and below would address whole groups of processes
        return False
    if not is_here(identity):
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return identity.get("started") == start_of(pid)


def mark() -> str:
    """This process, for the end of a file's name: ``12-3456-89abcdef``."""
    pid = os.getpid()
    return f"{pid}-{start_of(pid)}-{_place_mark()}"


def is_of_the_dead(path: Path) -> bool | None:
    """Whether the process that :func:`mark` put into a file's name is gone; ``None`` where nobody can know."""
    found = MARK.search(path.name)
    if found is None or found[3] != _place_mark():
        return None
    return start_of(int(found[1])) != found[2]


@cache
def _place_mark() -> str:
    return hashlib.sha256("\0".join(place().values()).encode()).hexdigest()[:8]


def start_of(pid: int) -> str | None:
    """The start of a process, in ticks since boot; ``None`` where the system does not say, or it has ended and its
    parent has not asked how.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else rest[18]
    except (OSError, IndexError):
        return None
