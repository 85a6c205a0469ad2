"""Where a model is from, and what lay beside its tensors there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seqarch.checkpoints.errors import CheckpointError

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")

CARRIED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
"""The files of a model's folder that go along when it is saved again."""


@dataclass(frozen=True)
class Origin:
    """The folder that a model was read from.

    Attributes:
        folder: its path.
        family: ``"seqarch"``, ``"run"``, or the ``model_type`` of another library's.
        revision: the commit of the hub's repository, or the step of a run's checkpoint, where that is known.
        files: size and, where known, SHA-256 of each file that was read, by its name.
        settings: the configuration of another library's model.
        plugins: modules that register the model's own layers.
        carried: the content of files such as ``generation_config.json`` and the tokenizer's, by their names.
    """

    folder: str
    family: str
    revision: str | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = None
    plugins: tuple[str, ...] = ()
    carried: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def record(self) -> dict[str, Any]:
        """What a folder that the model is saved to says of it."""
        files = {name: dict(entry) for name, entry in self.files.items()}
        return {"folder": self.folder, "family": self.family, "revision": self.revision, "files": files}


def carried_files(folder: Path) -> dict[str, bytes]:
    """Those of the files in a folder that go along.

    Raises:
        CheckpointError: one cannot be read.
    """
    try:
        return {name: (folder / name).read_bytes() for name in CARRIED if (folder / name).is_file()}
    except OSError as error:
        raise CheckpointError(f"cannot read a file that goes along with the model of {folder}: {error}") from error


def hub_revision(folder: Path) -> str | None:
    """The commit of a folder that ``huggingface_hub`` downloaded, into its cache or to a place of one's own."""
    if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name):
        return folder.name
    try:
        noted = (folder / ".cache" / "huggingface" / "download" / "config.json.metadata").read_text().split()
    except (OSError, ValueError):
        return None
    return noted[0] if noted and COMMIT.fullmatch(noted[0]) else None


def file_entry(path: Path) -> dict[str, Any]:
    """The size of a file, and its SHA-256 where the cache of ``huggingface_hub`` has named it by that."""
    entry: dict[str, Any] = {"bytes": path.stat().st_size}
    name = path.resolve().name
    return {**entry, "sha256": name} if path.is_symlink() and SHA256.fullmatch(name) else entry
