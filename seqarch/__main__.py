"""``python -m seqarch``: versions, devices, and which backend of which operation runs here, or why it does not.

``python -m seqarch tuning`` shows in which configurations the Triton kernels run here, and what these were chosen from;
``python -m seqarch families`` the families of ``transformers`` that are read and written, and what was checked;
``python -m seqarch gguf FOLDER FILE`` writes a model as a file that llama.cpp reads.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata

import torch

import seqarch
from seqarch.ops import OPS
from seqarch.ops.native import cpu_library, cuda_library
from seqarch.ops.triton import autotune


def table(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Lines with the columns aligned; the last column may be of any width."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        yield "  ".join([*cells, row[-1]]).rstrip()


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_library_line() -> str:
    """The compiled library, or why it is absent."""
    if (reason := cpu_library.unavailable()) is not None:
        return f"absent: {reason}"
    openmp = f"OpenMP {cpu_library.openmp_version()}" if cpu_library.openmp_version() else "no OpenMP"
    isas = f"{cpu_library.chosen_isa()} of {', '.join(cpu_library.supported_isas())}"
    return f"{isas}; {openmp}; sha256 {cpu_library.library_hash()[:12]}"


def cuda_library_line() -> str:
    """The CUDA library, or why it is absent."""
    return cuda_library.unavailable() or f"sha256 {cuda_library.library_hash()[:12]}"


def versions() -> Iterator[tuple[str, str]]:
    yield "seqarch", seqarch.__version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", torch.__version__
    for package in ("triton", "mamba-ssm", "causal-conv1d", "flash-attn"):
        yield package, version(package)
    yield "library", cpu_library_line()
    yield "CUDA library", cuda_library_line()


def devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{os.cpu_count()} processors, torch uses {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        yield "mps", "Apple GPU"


def backends() -> Iterator[tuple[str, str, str]]:
    for name, op in OPS.items():
        for backend in op.backends.values():
            mark = " (reference)" if backend.name == op.reference else ""
            yield name, backend.name + mark, backend.unavailable() or "available"


def main(arguments: Sequence[str] = ()) -> int:
    if arguments[:1] == ["gguf"]:
        from seqarch.pretrained import gguf_command

        return gguf_command.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m seqarch", description=(__doc__ or "").splitlines()[0])
    about = "the choices of the Triton kernels, or the families of models that are read and written, instead"
    parser.add_argument("about", nargs="?", choices=["tuning", "families"], help=about)
    asked = parser.parse_args(arguments).about
    if asked == "tuning":
        print(*autotune.report(), sep="\n")
        return 0
    if asked == "families":
        from seqarch.pretrained import families

        print(*table(families.rows()), "", families.explanation(), sep="\n")
        return 0
    for title, rows in (("versions", versions()), ("devices", devices()), ("operations", backends())):
        print(title)
        print(*(f"  {line}" for line in table(rows)), sep="\n", end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
