"""Lists of files by their checksums: a line for each, its SHA-256, its bytes and its path; and how two lists differ."""

from __future__ import annotations


def listed_changes(before: str, after: str) -> list[str]:
    """How a later list of files differs from an earlier one, a few words for each file."""
    was, now = (dict(map(_entry, lines.splitlines())) for lines in (before, after))
    both = [path for path in was if path in now]
    changed = [f"{path} changed ({was[path][1]} bytes, now {now[path][1]})" for path in both if now[path] != was[path]]
    gone = [f"{path} is gone" for path in was if path not in now]
    return changed + gone + [f"{path} is new" for path in now if path not in was]


def _entry(line: str) -> tuple[str, tuple[str, str]]:
    """The path of a listed file; its SHA-256 and its bytes."""
    sha256, size, path = [*line.split(" ", 2), "", ""][:3]
    return path, (sha256, size)
