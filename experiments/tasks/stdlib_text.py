"""Byte-level language modelling of the source files of Python's own standard library, which every machine has.

Files are read in place and split by a hash of their path. A file is the start symbol and then its bytes; a model
predicts each byte from all before it. Training windows of T tokens lie anywhere in a file, some at its beginning.
Validation windows are drawn like those of training, from held-out files, as many at a file's beginning: the two losses
are of the same quantity. Models are tested on other held-out files from the first byte on, far past T if
``eval_length`` says so: only files of at least that many bytes are taken, so that every position is averaged over the
same files.

Left out are tests (half of the bytes, and many distributions strip them), ``encodings`` (a hundred near copies of one
table, which would leak across any split), ``pydoc_data`` (one generated file) and the machine's own build settings.
"""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.tasks.byte_text import ByteText, ByteTextConfig, in_order_of_hash, split_of
from experiments.tasks.task import SPLITS, TaskError

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class StdlibTextConfig(ByteTextConfig):
    """Options of :class:`StdlibText`: those of every such task."""


class StdlibText(ByteText):
    Config = StdlibTextConfig
    name = "stdlib_text"
    title = "Byte-level modelling of Python source"
    config: StdlibTextConfig

    def read(self) -> dict[str, dict[str, bytes]]:
        root = Path(sysconfig.get_path("stdlib"))
        splits: dict[str, dict[str, bytes]] = {split: {} for split in SPLITS}
        for path in in_order_of_hash(_sources(root)):
            splits[split_of(path)][path] = (root / path).read_bytes()
        if not splits["train"]:
            raise TaskError(f"task stdlib_text: no .py files below {root}; it reads Python's own standard library")
        return splits

    def source(self) -> dict[str, Any]:
        return {"source": f"standard library of Python {platform.python_version()}"}


def _sources(root: Path) -> Iterator[str]:
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if LEFT_OUT.isdisjoint(relative.parts) and not relative.name.startswith("_sysconfigdata"):
            yield relative.as_posix()
