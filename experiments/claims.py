"""Who is at work in a folder: a file that only one process can create, and that outlives nobody.

The file names the process, its machine and when it started, and is renewed every few seconds. A claim whose process is
gone (same machine) or that was not renewed for a minute (another machine) is dead, and the next process takes it over.
A job that a scheduler starts again elsewhere comes sooner than that, so whoever wants to work waits for a sign of life.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments.errors import RunnerError, writing
from experiments.files import read_json

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
TAKEOVER_ATTEMPTS = 5
POLL_SECONDS = 0.5


class ClaimLost(RunnerError):
    """Another process took the claim over."""


class Claim:
    """The claim in a file; nothing is written before :meth:`take`."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> None:
        """Become the one process that works here.

        Raises:
            RunnerError: another live process does; of one on another machine that shows within a minute.
            StorageError: the file cannot be written.
        """
        for _ in range(TAKEOVER_ATTEMPTS):
            if self._create():
                return
            holder, lives = self._settled(lambda: False)
            if holder is not None and lives:
                raise RunnerError(
                    f"{self.path.parent} is being trained by process {holder.get('pid')} on {holder.get('host')}; "
                    f"wait for it, or end it and start again"
                )
            self._remove_dead(holder)
        raise RunnerError(f"{self.path} belongs to a dead process and others keep taking it over; try again")

    def is_held(self) -> bool:
        holder = _read(self.path)
        return holder is not None and self._is_live(holder)

    def stays_held(self, hurry: Callable[[], bool]) -> bool:
        """As :meth:`is_held`, and by a sign of life of a holder on another machine, unless there is ``hurry``."""
        return self._settled(hurry)[1]

    def _settled(self, hurry: Callable[[], bool]) -> tuple[dict[str, Any] | None, bool]:
        """Who holds the claim, and whether that process lives: it renews the claim within seconds, or never more."""
        seen = self._renewed()
        while (holder := _read(self.path)) and self._is_live(holder):
            if holder.get("host") == socket.gethostname() or self._renewed() != seen or hurry():
                return holder, True
            time.sleep(POLL_SECONDS)
        return holder, False

    def _renewed(self) -> float:
        """When the claim was last renewed, in seconds since 1970; 0 where there is none."""
        try:
            return self.path.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def renew(self) -> None:
        """Show that this process still works here.

        Raises:
            ClaimLost: another process does by now.
            StorageError: the file cannot be written.
        """
        self.check()
        with writing(self.path):
            os.utime(self.path)

    def check(self) -> None:
        """Raise ``ClaimLost`` if another process took over."""
        holder = _read(self.path)
        if holder and holder != process_identity(os.getpid()):
            raise ClaimLost(f"{self.path.parent} was taken over by process {holder.get('pid')} on {holder.get('host')}")

    def is_own(self) -> bool:
        """Whether this process holds the claim."""
        return _read(self.path) == process_identity(os.getpid())

    def release(self) -> None:
        """Give the claim up; that of another process stays."""
        if self.is_own():
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        # Linking a whole file into place is as exclusive as O_EXCL, and no reader ever meets a claim without content.
        aside = self.path.with_name(f".claim.{uuid.uuid4().hex}.tmp")
        try:
            with writing(self.path):
                aside.write_text(json.dumps(process_identity(os.getpid())))
                try:
                    os.link(aside, self.path)
                except FileExistsError:
                    return False
            return True
        finally:
            aside.unlink(missing_ok=True)

    def _remove_dead(self, holder: dict[str, Any] | None) -> None:
        """Take a dead claim away. One of several takers succeeds; one who got hold of a fresh claim puts it back.

        Where yet another process has claimed the folder meanwhile, its claim stands, and the holder of the fresh one
        learns of its loss by :meth:`renew`.
        """
        aside = self.path.with_name(f".claim.{uuid.uuid4().hex}.dead")
        with writing(self.path):
            try:
                os.rename(self.path, aside)
            except FileNotFoundError:
                return
            try:
                if _read(aside) != holder:
                    with suppress(FileExistsError):
                        os.link(aside, self.path)
            finally:
                aside.unlink()

    def _is_live(self, holder: Mapping[str, Any]) -> bool:
        if not is_alive(holder):
            return False
        if holder.get("host") == socket.gethostname():
            return True
        return time.time() - self._renewed() < STALE_SECONDS


def process_identity(pid: int) -> dict[str, Any]:
    """A process, told apart from a later one with the same number and from those of other machines."""
    return {"pid": pid, "host": socket.gethostname(), "started": _start_of(pid)}


def is_alive(identity: Mapping[str, Any]) -> bool:
    """Whether a process of :func:`process_identity` still runs; on another machine nobody can tell, so yes.

    What is no process at all, such as a damaged file says, does not run.
    """
    pid = identity.get("pid")
    if type(pid) is not int or pid <= 0:  # 0 and below would address whole groups of processes
        return False
    if identity.get("host") != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return identity.get("started") == _start_of(pid)


def _start_of(pid: int) -> str | None:
    """When a process started, in ticks since boot; ``None`` where the system does not say, or it has ended and its
    parent has not asked how.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else rest[18]
    except (OSError, IndexError):
        return None


def _read(path: Path) -> dict[str, Any] | None:
    """Who holds a claim; ``{}`` where the file says nothing that can be read."""
    try:
        return read_json(path)
    except RunnerError:
        return {}
