"""The errors of reading a run's folder, and those of others that they stand for."""

from __future__ import annotations

import pickle
import zipfile
import zlib


class CheckpointError(ValueError):
    """A folder that holds no run, or a checkpoint that cannot be read; its text says what is wrong with which."""


MALFORMED = (
    *(RuntimeError, LookupError, ValueError, TypeError, AttributeError, AssertionError, ArithmeticError, EOFError),
    *(MemoryError, pickle.PickleError, zipfile.BadZipFile, zlib.error),
)
"""The errors that torch, NumPy and pickle raise for a file of the wrong content."""
