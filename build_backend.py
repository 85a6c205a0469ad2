"""The build of the package: scikit-build-core's, and where the kernels cannot be compiled the Python package alone.

scikit-build-core can itself build anew what failed (its override ``if.failed``), but a project that uses this gets no
hook for its metadata: ``pip install --dry-run`` and ``pip download`` would compile everything to learn a version.
"""

from __future__ import annotations

from collections.abc import Callable

from scikit_build_core import build
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, list[str] | str]


def build_wheel(folder: str, settings: Settings | None = None, metadata: str | None = None) -> str:
    return _compiled_or_plain(build.build_wheel, folder, settings, metadata)


def build_editable(folder: str, settings: Settings | None = None, metadata: str | None = None) -> str:
    return _compiled_or_plain(build.build_editable, folder, settings, metadata)


def _compiled_or_plain(
    make: Callable[[str, Settings | None, str | None], str],
    folder: str,
    settings: Settings | None,
    metadata: str | None,
) -> str:
    """Build with the kernels or, where CMake or the compiler fails, without: the cpp backends then say that they are
    absent. The metadata that was prepared for the first has the tags of a compiled wheel, and the second makes its own.
    """
    try:
        return make(folder, settings, metadata)
    except SystemExit as failure:
        if failure.code in (None, 0):
            raise
        print("*** seqarch: the kernels were not compiled (above); building the Python package alone", flush=True)
        return make(folder, {**(settings or {}), "wheel.cmake": "false"}, None)
