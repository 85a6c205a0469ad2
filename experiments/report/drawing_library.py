"""Vega and Vega-Lite as one script for pages without a network: the package vl-convert-python has them.

Joining their modules takes three seconds, so the script is kept in the user's cache.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from experiments.util.errors import RunnerError
from experiments.util.files import make_folder, write_atomic
from experiments.util.paths import user_cache

PACKAGE = "vl-convert-python"
CACHE = "SEQARCH_PAGES"
"""The environment variable that names another folder than ``seqarch/pages`` in the user's cache."""


@cache
def drawing_library() -> str:
    """The script, after which ``vegaEmbed`` is there.

    Raises:
        RunnerError: the package is not installed.
    """
    try:
        file = user_cache("pages", CACHE) / f"vega-{version(PACKAGE)}.js"
    except PackageNotFoundError:
        raise RunnerError(
            f"the explorer needs {PACKAGE}, which is not installed: pip install 'seqarch[experiments]'"
        ) from None
    if (kept := _kept(file)) is not None:
        return kept
    import vl_convert  # Its library is large.

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    try:
        make_folder(file.parent)
        write_atomic(file, f"{_mark(script)}{script}", durable=False)
    except RunnerError:  # A cache that cannot be written costs these seconds again.
        pass
    return script


def _mark(script: str) -> str:
    """The first line of the file in the cache, by which one that is damaged is known."""
    return f"// {hashlib.sha256(script.encode()).hexdigest()}\n"


def _kept(file: Path) -> str | None:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    mark, _, script = text.partition("\n")
    return script if f"{mark}\n" == _mark(script) else None
