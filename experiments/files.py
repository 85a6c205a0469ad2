"""Reading and writing small files so that none is ever half there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.errors import RunnerError, writing


def write_atomic(path: Path, data: str | bytes, durable: bool = True) -> None:
    """Write aside, then rename: a reader sees the old file or the new one, whole.

    ``durable=False`` leaves it to the system when the bytes reach the disk.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(aside, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            if aside.exists():
                aside.unlink()
            raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, or ``None`` where there is no such file.

    Raises:
        RunnerError: the file is there and holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunnerError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise RunnerError(f"cannot read {path}: expected a JSON object, got {type(value).__name__}")
    return value
