"""The errors that a person caused or can mend: shown as one message, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from seqarch.checkpoints.errors import MALFORMED as MALFORMED


class RunnerError(Exception):
    """Something that the person who started the run can put right; its text says what and how."""


class ConfigError(RunnerError):
    """A configuration that names or holds something wrong."""


class StorageError(RunnerError):
    """A file or folder that cannot be written."""


def choices_hint(given: object, choices: Iterable[str]) -> str:
    """``expected one of a, b, c. Did you mean 'b'?``"""
    names = sorted(choices)
    near = difflib.get_close_matches(str(given), names, n=1)
    return f"expected one of {', '.join(names)}." + (f" Did you mean {near[0]!r}?" if near else "")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating-system error of the block into one that names the path being written."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
