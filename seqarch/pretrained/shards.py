"""Tensors into safetensors files of at most a given size, with an index where there are several."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from seqarch.ops.dispatch.checks import show
from seqarch.pretrained.tensor_files import INDEX, SINGLE

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_in_bytes(size: int | str) -> int:
    """A number of bytes, as 5000000 or ``"5GB"``.

    Raises:
        ValueError: it is neither, or 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size), re.IGNORECASE)
    number = 0.0 if found is None or isinstance(size, bool) else float(found[1]) * UNITS.get(found[2].upper(), 0)
    if not 1 <= number < math.inf:
        raise ValueError(f"max_shard_size is {show(size)}, expected a number of bytes, as 500000000, '500MB' or '5GB'")
    return int(number)


class Shards:
    """Files in a folder, each written when it is full. A tensor is never split, so that one alone may be larger."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        self.waiting: dict[str, Tensor] = {}
        self.waiting_bytes = self.total_bytes = 0
        self.files: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor, and write those before it if there is no room for it beside them."""
        size = tensor.numel() * tensor.element_size()
        if self.waiting and self.waiting_bytes + size > self.max_bytes:
            self._write()
        self.waiting[name] = _alone(tensor)
        self.waiting_bytes += size
        self.total_bytes += size

    def close(self) -> None:
        """Write what waits, and give the files their names, which tell how many there are."""
        self._write()
        count, index = len(self.files), {}
        for number, (part, names) in enumerate(self.files, 1):
            file = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            part.rename(self.folder / file)
            index.update(dict.fromkeys(names, file))
        if count > 1:
            content = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(index.items()))}
            (self.folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _write(self) -> None:
        part = self.folder / f"part-{len(self.files)}"
        try:
            save_file(self.waiting, part, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {self.waiting_bytes} bytes of tensors to {self.folder}: {error}") from error
        self.files.append((part, list(self.waiting)))
        self.waiting, self.waiting_bytes = {}, 0


def _alone(tensor: Tensor) -> Tensor:
    """A tensor on the CPU that is all of its memory, as the format wants it."""
    tensor = tensor.detach().to("cpu").contiguous()
    size = tensor.numel() * tensor.element_size()
    return tensor if tensor.untyped_storage().nbytes() == size else tensor.clone(memory_format=torch.contiguous_format)
