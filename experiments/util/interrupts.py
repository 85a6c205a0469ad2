"""The signals that stop a training process, SIGTERM and SIGINT, noted from its first line to its last.

Nothing here takes time to import, so that a process can listen before it imports what does.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)

INTERRUPTED = 130
"""The exit code of a command that a signal has stopped: 128 and the number of SIGINT."""


class Preempted(KeyboardInterrupt):
    """Asked to end by SIGTERM, as schedulers do before they take a machine away."""


class Interrupts:
    """The effect of the two signals: they set ``requested``, and within :meth:`at_once` they raise.

    Elsewhere, as where a lock is acquired or a record written, nothing is torn: a signal noted there raises as soon as
    :meth:`at_once` begins. Within :meth:`delayed`, inside of it, SIGTERM is only noted again, and SIGINT raises.

    Attributes:
        requested: whether SIGTERM has asked to stop.
    """

    def __init__(self):
        self.requested = False
        self._interrupted = self._raises = self._delayed = False

    def obey(self) -> None:
        """From here on. A launcher's worker ignores SIGINT, which is inherited, until here."""
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def ignore(self) -> None:
        """From here on the process is at its end: a signal must not change its exit code."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise :class:`Preempted` at SIGTERM and ``KeyboardInterrupt`` at SIGINT; at once for one noted before."""
        self._raises = True
        try:
            self._raise()
            yield
        finally:
            self._raises = False

    @contextmanager
    def delayed(self) -> Iterator[None]:
        """Note SIGTERM and raise it at the end of the block; the code in it checks ``requested``."""
        self._delayed = True
        try:
            yield
        finally:
            self._delayed = False
        if self._raises:
            self._raise()

    def _receive(self, number: int, _: object) -> None:
        if number == signal.SIGTERM:
            self.requested = True
        else:
            self._interrupted = True
        if self._raises:
            self._raise()

    def _raise(self) -> None:
        """Raise what was asked for; only once, as a second signal must not tear what the first one set off."""
        if self._interrupted:
            self._raises = False
            raise KeyboardInterrupt
        if self.requested and not self._delayed:
            self._raises = False
            raise Preempted("stopped by SIGTERM")


INTERRUPTS = Interrupts()
"""The one of this process, as signals are of a process."""
