"""The source files of a package, each by a hash of what it does: comments, docstrings and layout do not count."""

from __future__ import annotations

import ast
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

SUFFIXES = (".py", ".pyx", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp")
"""The files that are sources; data and what a compiler made of sources are none."""

PARSED_BYTES = 2**16
"""The size up to which the files of a package are parsed, which takes a second or two a megabyte; in a larger package
comments count, too."""


def package_sources(name: str) -> dict[str, str]:
    """The sources of an imported top-level package or module: the hash of each file by its path in it.

    Tests that lie in it are left out, and files that cannot be read are there without a hash.
    """
    module = sys.modules.get(name)
    files = {} if module is None else dict(_files(name, module))
    small = sum(_size(path) for path in files.values()) <= PARSED_BYTES
    return {label: _hash_of(path, small and path.suffix == ".py") for label, path in files.items()}


def package_folder(name: str) -> Path | None:
    """The folder of an imported top-level package, or a module's file; ``None`` where it has none."""
    module = sys.modules.get(name)
    folders = list(getattr(module, "__path__", []))
    file = getattr(module, "__file__", None)
    if folders:
        return Path(folders[0]).resolve()
    return None if file is None else Path(file).resolve()


def _files(name: str, module: ModuleType) -> Iterator[tuple[str, Path]]:
    folders = sorted({Path(each) for each in getattr(module, "__path__", [])})
    if not folders and (file := getattr(module, "__file__", None)):
        yield Path(file).name, Path(file)
    for folder in folders:
        for path in sorted(_below(folder)):
            yield f"{name}/{path.relative_to(folder).as_posix()}", path


def _below(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith((".", "__pycache__")) and each != "tests"]
        for file in files:
            if file.endswith(SUFFIXES) and not file.startswith(("test_", "conftest.", ".")):
                yield Path(place) / file


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _hash_of(path: Path, parsed: bool) -> str:
    try:
        status = path.stat()
        return _hash(path, parsed, (status.st_mtime_ns, status.st_size))
    except OSError as error:
        return f"unread: {error.strerror}"


@lru_cache(maxsize=4096)
def _hash(path: Path, parsed: bool, _version: tuple[int, int]) -> str:
    """16 hexadecimal digits, once for each version of a file, known by its time of change and its size."""
    content = path.read_bytes()
    if parsed:
        with suppress(SyntaxError, ValueError, RecursionError):  # A file of another Python, or one that nobody imports.
            content = repr(_plain(ast.parse(content))).encode(errors="surrogatepass")
    return hashlib.sha256(content).hexdigest()[:16]


def _plain(node: Any) -> Any:
    """A syntax tree as nested tuples, the same in every version of Python: what is empty is left out."""
    if isinstance(node, list):
        return tuple(map(_plain, node))
    if not isinstance(node, ast.AST):
        return node
    parts = [
        (key, _plain(_without_docstring(node, value) if key == "body" else value))
        for key, value in ast.iter_fields(node)
        if key != "kind" and value is not None and not (isinstance(value, list) and not value)
    ]
    return (type(node).__name__, *parts)


def _without_docstring(node: ast.AST, body: Any) -> Any:
    first = body[0] if isinstance(body, list) else None
    documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    text = first.value.value if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) else None
    return body[1:] if documented and isinstance(text, str) else body
