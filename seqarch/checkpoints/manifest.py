"""The form of a run's checkpoints: a folder each, ``checkpoints/step-000100``, with a manifest of its files.

``manifest.json`` holds the size and SHA-256 of each other file and, as ``sha256``, the hash of itself, by which a
checkpoint is known.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seqarch.checkpoints.errors import CheckpointError

FORMAT = 2
"""The version of what is kept of a run: raised when a key, a metric or a file gets another name or meaning."""

MANIFEST = "manifest.json"


def checkpoint_name(step: int) -> str:
    """The name of the folder of that step's checkpoint."""
    return f"step-{step:06d}"


def checkpoints_by_step(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder, the newest first; what else lies there is none."""
    names = ((path, path.name.removeprefix("step-")) for path in folder.glob("step-*"))
    steps = {int(digits): path for path, digits in names if digits.isdecimal()}
    return {step: steps[step] for step in sorted(steps, reverse=True)}


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, or ``None`` where there is no such file.

    Raises:
        CheckpointError: the file is there and holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"cannot read {path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's manifest without its own hash; ``None`` where it is not what was written."""
    try:
        manifest = read_json(folder / MANIFEST) or {}
    except CheckpointError:
        return None
    if manifest.pop("sha256", None) != manifest_digest(manifest) or not isinstance(manifest.get("state"), dict):
        return None
    files = manifest.get("files")
    listed = isinstance(files, dict) and all(isinstance(each, dict) and "bytes" in each for each in files.values())
    return manifest if listed else None


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """The hash of a manifest's content."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path, synced: bool = False) -> dict[str, Any]:
    """The size and SHA-256 of a file, with ``synced`` once it is on the disk."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if synced:
            os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest}


def sync(folder: Path) -> None:
    """Make sure that the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(manifest: Mapping[str, Any] | None, found: Mapping[str, Any]) -> str | None:
    """What is wrong with a checkpoint whose files have these digests by name; ``None`` where nothing is."""
    if manifest is None:
        return f"{MANIFEST} is missing or not what was written"
    for name, written in manifest["files"].items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != written:
            size, expected = found[name]["bytes"], written["bytes"]
            more = ": its SHA-256 is another" if size == expected else ""
            return f"{name} is not what was written ({size} bytes of {expected}){more}"
    return None
