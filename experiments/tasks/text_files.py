"""Which files a source of text is: one file, a folder, a pattern of paths, or a data set that ``datasets`` saved."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from experiments.tasks.task import TaskError

ROWS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
"""The kinds of files with many documents, by how their names end; any other file is one document, its text."""
EXTENSIONS = [".txt", ".md", ".jsonl", ".parquet", ".arrow"]
"""How the names of the files end that are read of a folder, where nothing else is asked for."""
SAVED = "state.json"
"""In the folder of a data set that ``datasets`` saved, which lists its files."""


class TextFile(NamedTuple):
    """A file of a source: where it is, and its path below the source's folder, by which it is known."""

    path: Path
    name: str

    @property
    def kind(self) -> str:
        """``text``, ``jsonl``, ``parquet`` or ``arrow``."""
        return ROWS.get(self.path.suffix.lower(), "text")


def source_files(path: str, extensions: Sequence[str]) -> list[TextFile]:
    """The files of a source, in the order of their names; hidden ones and those in hidden folders are left out.

    Args:
        path: of a file, of a folder, or a pattern as ``notes/**/*.md``, where ``**`` is any number of folders.
        extensions: how the names of a folder's files end; a pattern and a file's own path ask for what they name.

    Raises:
        TaskError: there is no such file or folder, nothing in it is asked for, or it cannot be looked into.
    """
    if os.path.isfile(path):
        return [TextFile(Path(path), Path(path).name)]
    if os.path.isdir(path):
        found = [TextFile(Path(path) / name, name) for name in paths_below(Path(path), "*", "task text")]
        wanted = _without_unlisted([file for file in found if file.path.suffix.lower() in extensions])
        if wanted:
            return wanted
        endings = Counter(file.path.suffix.lower() or "no extension" for file in found)
        there = ", ".join(f"{count} of {ending}" for ending, count in endings.most_common(4)) or "there is none"
        raise TaskError(
            f"task text: no file of {path} ends with {', '.join(extensions)} ({there}); choose others with"
            " task.extensions=[.py,.c], or by a pattern as PATH/**/*.py"
        )
    if re.search(r"[*?\[]", path):
        parts = Path(path).parts
        first = next(number for number, part in enumerate(parts) if re.search(r"[*?\[]", part))
        folder, pattern = Path(*parts[:first]), "/".join(parts[first:])
        if folder.is_dir():
            names = paths_below(folder, pattern if "/" in pattern else f"./{pattern}", "task text")
            if files := [TextFile(folder / name, name) for name in names]:
                return files
        raise TaskError(f"task text: no file matches {path}")
    raise TaskError(f"task text: {path}: there is no such file or folder")


def _without_unlisted(files: list[TextFile]) -> list[TextFile]:
    """The files without those arrow files beside a data set's ``state.json`` that it does not list, such as caches."""
    listed: dict[Path, set[str] | None] = {}
    kept = []
    for file in files:
        folder = file.path.parent
        if folder not in listed:
            listed[folder] = _listed(folder)
        names = listed[folder]
        if file.kind != "arrow" or names is None or file.path.name in names:
            kept.append(file)
    return kept


def _listed(folder: Path) -> set[str] | None:
    try:
        state = json.loads((folder / SAVED).read_text(encoding="utf-8"))
        return {str(entry["filename"]) for entry in state["_data_files"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TaskError(f"task text: {folder / SAVED} does not list the files of a data set: {error}") from error


def paths_below(folder: Path, pattern: str, who: str) -> Iterator[str]:
    """The paths of regular files below a folder that a pattern matches, sorted; folders that are links are not entered.

    Args:
        pattern: ``**`` in it is any number of folders; one without a ``/`` is of names in any folder below, and one
            that begins with ``./`` of names in this folder alone.
        who: begins errors.

    Raises:
        TaskError: a folder cannot be looked into.
    """
    parts = [part for part in pattern.strip("/").split("/") if part != "."]
    wanted = parts if "/" in pattern.strip("/") else ["**", *parts]

    def refuse(error: OSError) -> None:
        raise TaskError(f"{who}: cannot look into {error.filename}: {error.strerror}") from error

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(place).relative_to(folder)
        for name in sorted(names):
            path = below / name
            if not name.startswith(".") and _matches(path.parts, wanted) and (folder / path).is_file():
                yield path.as_posix()


def _matches(parts: tuple[str, ...], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def why_unusable(content: bytes) -> str:
    """Why a document is no text, ``""`` where it is: it is empty, or holds a zero byte."""
    return "is empty" if not content else "is no text: it holds a zero byte" if b"\0" in content else ""
