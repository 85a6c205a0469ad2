"""The output of commands and their ends: an exit code, and one line per error, even where the output is full."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import IO, Any

from rich.console import Console

from experiments.util.errors import RunnerError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
"""The errors of a stream that takes no more; those of files come with their path, as a ``StorageError``."""


class Outlet:
    """A stream that takes text also when it cannot pass it on: a sweep does not end because nobody can read of it.

    Args:
        stream: ``None`` where a process was started without one.

    Attributes:
        open: whether it can pass on what comes.
        problem: why it cannot, once that is so; a reader that has left, as ``| head`` does, is none.
    """

    def __init__(self, stream: IO[str] | None):
        self._stream, self.open = stream, stream is not None
        self.problem: str | None = None

    def write(self, text: str) -> int:
        self._try(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def _try(self, action: Callable[[IO[str]], object]) -> None:
        try:
            if self.open and self._stream is not None:
                action(self._stream)
        except OSError as error:  # A full disk, a terminal that is closed.
            self.open = False
            self.problem = None if error.errno == errno.EPIPE else error.strerror or str(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def print_error(reason: str) -> None:
    """Print an error, where there is anything to print to."""
    with contextlib.suppress(OSError):
        print(f"error: {reason}", file=sys.stderr, flush=True)


def drop_output() -> None:
    """Drop what is still to be printed: Python would try once more as it ends, and print a traceback."""
    with contextlib.suppress(AttributeError, OSError):  # A stream of Python's own has no number.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def flush_output() -> bool:
    """Whether all that was printed could be written; what could not is dropped."""
    outlet = Outlet(sys.stdout)
    outlet.flush()
    if sys.stdout is not None and not outlet.open:
        drop_output()
    if outlet.problem is not None:
        print_error(f"cannot write the standard output: {outlet.problem}")
    return outlet.problem is None


class PlainConsole(Console):
    """A console to which text is text: what runs hold is no markup, "[some/library.so]" is a path.

    What is no terminal gets no escape codes, whatever FORCE_COLOR and TTY_COMPATIBLE ask for: there is no colour in the
    tables, and a file cannot draw a bar again.

    Args:
        file: in place of the standard output.
        soft_wrap: leave lines as long as they are.
    """

    def __init__(self, width: int | None = None, file: IO[str] | None = None, soft_wrap: bool = False):
        force = None if is_terminal(file or sys.stdout) else False
        options: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": soft_wrap}
        super().__init__(file=file, width=width, force_terminal=force, **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # Rich would end the process, with an exit code of its own.


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether a stream is a terminal; one that is not there or closed is none."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # It is closed.
        return False


def console(width: int) -> Console:
    """The terminal, or something else that is so many columns wide."""
    plain = PlainConsole()
    return plain if plain.is_terminal else PlainConsole(width)


def exit_code(command: Callable[[], int]) -> int:
    """The exit code of a command, once all that it printed is written; 1 after an error that a person can mend.

    A reader who leaves early, as ``| head`` does, is no error.
    """
    code, unexpected = 1, None
    try:
        code = command()
    except RunnerError as error:
        print_error(str(error))
    except BrokenPipeError:
        drop_output()
        code = 0
    except OSError as error:
        unexpected = error
    if not flush_output():
        return 1
    if unexpected is not None:
        stream = "cannot write the standard output" if unexpected.errno in FULL else "the system refused"
        print_error(f"{unexpected.filename or stream}: {unexpected.strerror or unexpected}")
    return code
