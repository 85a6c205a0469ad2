"""What commands print to, and their end: an exit code, and one line for what a person can mend, also when the output is
full.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from rich.console import Console

from experiments.errors import RunnerError
from experiments.monitor import complain, flush_output

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
"""What a stream answers that takes no more; errors of files come with their path, as a ``StorageError``."""


class Plain(Console):
    """A console to which text is text: what runs hold is no markup, "[some/library.so]" is a path."""

    def __init__(self, width: int | None = None):
        super().__init__(highlight=False, markup=False, width=width)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # Rich would end the process, with an exit code of its own.


def console(width: int) -> Console:
    """The terminal, or something else that is so many columns wide."""
    plain = Plain()
    return plain if plain.is_terminal else Plain(width)


def exit_code(command: Callable[[], int]) -> int:
    """What a command returns, once all that it printed is written; 1 where it meets an error that a person can mend.

    A reader who leaves early, as ``| head`` does, is no error.
    """
    code, unexpected = 1, None
    try:
        code = command()
    except RunnerError as error:
        complain(str(error))
    except BrokenPipeError:
        # Or Python would try to write the rest as it ends, and tell of it in its own way.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        unexpected = error
    if not flush_output():
        return 1
    if unexpected is not None:
        stream = "cannot write the standard output" if unexpected.errno in FULL else "the system refused"
        complain(f"{unexpected.filename or stream}: {unexpected.strerror or unexpected}")
    return code
