"""The lock of a run: a file that only one process can create, and that outlives nobody.

The file names the process, where its number means something and when it started, and is renewed every few seconds. A
lock whose process is gone is dead, and the next process takes it over. Of a process on another machine or in another
container nobody here can know; its lock is dead when it was not renewed for a minute. No clock of another machine is
trusted in that: whoever wants the lock watches it for a minute, or compares two times of the same file system.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from experiments.util.errors import RunnerError, writing
from experiments.util.files import read_json
from experiments.util.process_identity import is_alive, is_here, is_same, mark, process_identity

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
TAKEOVER_ATTEMPTS = 5
POLL_SECONDS = 0.5


class LockLost(RunnerError):
    """Another process took the lock over."""


class RunLock:
    """The lock in a file; nothing is written before :meth:`acquire`."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Become the one process that works here.

        Args:
            hurry: whether there is no time to find out if a process elsewhere still lives.

        Raises:
            RunnerError: another live process does; of one on another machine that shows within a minute.
            StorageError: the file cannot be written.
        """
        for _ in range(TAKEOVER_ATTEMPTS):
            if self._create():
                return
            holder, lives = self._settled(hurry)
            if holder is not None and lives:
                raise RunnerError(
                    f"{self.path.parent} is being trained by process {holder.get('pid')} on {holder.get('host')}; "
                    f"wait for it, or end it and start again"
                )
            self._remove_dead(holder)
        raise RunnerError(f"{self.path} belongs to a dead process and others keep taking it over; try again")

    def is_held(self) -> bool:
        """Whether it seems to be held just now, by the clock of this machine for a holder elsewhere."""
        holder = _read(self.path)
        if holder is None or not is_alive(holder):
            return False
        return is_here(holder) or abs(time.time() - self._renewed()) < STALE_SECONDS

    def stays_held(self, hurry: Callable[[], bool]) -> bool:
        """Whether it is held, by a sign of life of a holder elsewhere, unless there is ``hurry``."""
        return self._settled(hurry)[1]

    def _settled(self, hurry: Callable[[], bool]) -> tuple[dict[str, Any] | None, bool]:
        """The holder of the lock, and whether that process lives: it renews the lock within seconds, or never again."""
        seen, began, waiting = self._renewed(), time.monotonic(), False
        while (holder := _read(self.path)) is not None:
            if not is_alive(holder) or is_here(holder):
                return holder, is_alive(holder)
            if self._renewed() != seen or hurry():
                return holder, True
            if time.monotonic() - began >= STALE_SECONDS or (not waiting and self._is_old()):
                return holder, False
            if not waiting:
                waiting = True
                who = f"process {holder.get('pid')} on {holder.get('host')}"
                wait = f"waiting up to {STALE_SECONDS:g} s for a sign of life of {who}"
                print(f"{wait}, which holds the lock of {self.path.parent}", file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS)
        return None, False

    def _renewed(self) -> float:
        """The time of the last renewal, in seconds since 1970; 0 where there is none."""
        try:
            return self.path.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _is_old(self) -> bool:
        """Whether the lock was not renewed for a minute by the clock of its file system, which stamped both times."""
        with writing(self.path), self._aside("tmp") as aside:
            aside.touch()
            return aside.stat().st_mtime - self._renewed() >= STALE_SECONDS

    def renew(self) -> None:
        """Show that this process still works here.

        Raises:
            LockLost: another process does by now.
            StorageError: the file cannot be written.
        """
        self.check()
        with writing(self.path):
            os.utime(self.path)

    def check(self) -> None:
        """Raise ``LockLost`` if another process took over."""
        holder = _read(self.path)
        if holder and not is_same(holder, process_identity(os.getpid())):
            raise LockLost(f"{self.path.parent} was taken over by process {holder.get('pid')} on {holder.get('host')}")

    def is_own(self) -> bool:
        """Whether this process holds the lock."""
        return is_same(_read(self.path) or {}, process_identity(os.getpid()))

    def release(self) -> None:
        """Release the lock; that of another process stays."""
        if self.is_own():
            self.path.unlink(missing_ok=True)

    @contextmanager
    def _aside(self, kind: str) -> Iterator[Path]:
        """A path beside the lock that no other process and no other thread takes; nothing is left there in the end."""
        aside = self.path.with_name(f".claim.{uuid.uuid4().hex}.{mark()}.{kind}")
        try:
            yield aside
        finally:
            aside.unlink(missing_ok=True)

    def _create(self) -> bool:
        # Linking a whole file into place is as exclusive as O_EXCL, and no reader ever meets a lock without content.
        with writing(self.path), self._aside("tmp") as aside:
            aside.write_text(json.dumps(process_identity(os.getpid())))
            try:
                os.link(aside, self.path)
            except FileExistsError:
                return False
            return True

    def _remove_dead(self, holder: dict[str, Any] | None) -> None:
        """Remove a dead lock. One of several takers succeeds; one who got hold of a fresh lock puts it back.

        Where yet another process has acquired the lock meanwhile, it keeps it, and the holder of the fresh one learns
        of its loss by :meth:`renew`.
        """
        with writing(self.path), self._aside("dead") as aside:
            try:
                os.rename(self.path, aside)
            except FileNotFoundError:
                return
            if _read(aside) != holder:
                with suppress(FileExistsError):
                    os.link(aside, self.path)


def _read(path: Path) -> dict[str, Any] | None:
    """The holder of a lock; ``{}`` where the file holds nothing that can be read."""
    try:
        return read_json(path)
    except RunnerError:
        return {}
