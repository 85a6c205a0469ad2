"""The folder for temporary files, named before anybody asks."""

from __future__ import annotations

import os
import tempfile


def name_temporary_folder() -> None:
    """Have ``tempfile`` name a folder where it finds none that can be written to, as on a full disk.

    Packages that are imported ask for one (``dill``, which torch imports where it is installed) and would end the
    process with an error of theirs. Whoever then writes there gets the disk's own.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = os.environ.get("TMPDIR", "/tmp")
