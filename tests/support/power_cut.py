"""The files left after a power cut: of a file what was synced last, of a folder the names that it had then.

That is what POSIX promises. A disk often keeps more, and what is right with this little must be right with more, as
long as nothing counts on a file before it is synced.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class PowerCut:
    """Watches what this process syncs below a folder, and makes anew what a power cut would have left of it.

    Args:
        after: called after each sync, which alone changes what would be left.
    """

    def __init__(self, root: Path, after: Callable[[], None] = lambda: None):
        self.root, self._after = root, after
        self._content: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._held: dict[int, int] = {}

    @contextmanager
    def watching(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        fsync = os.fsync

        def watched(descriptor: int) -> None:
            fsync(descriptor)
            self._note(Path(f"/proc/self/fd/{descriptor}"))
            self._after()

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", watched)
            try:
                yield
            finally:
                for descriptor in self._held.values():
                    os.close(descriptor)
                self._held.clear()

    def _note(self, path: Path) -> None:
        number = self._hold(path)
        if path.is_dir():
            self._names[number] = {each.name: self._hold(each) for each in path.iterdir()}
        else:
            self._content[number] = path.read_bytes()

    def _hold(self, path: Path) -> int:
        """The number of a file or folder, which goes to no other one as long as it is open here."""
        number = path.stat().st_ino
        if number not in self._held:
            self._held[number] = os.open(path, os.O_PATH)
        return number

    def leave(self, target: Path) -> None:
        """Write what would be left into a new folder."""
        self._leave(self.root.stat().st_ino, target)

    def _leave(self, number: int, target: Path) -> None:
        target.mkdir()
        for name, inner in self._names.get(number, {}).items():
            if stat.S_ISDIR(os.fstat(self._held[inner]).st_mode):
                self._leave(inner, target / name)
            else:
                (target / name).write_bytes(self._content.get(inner, b""))
