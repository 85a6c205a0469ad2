"""csrc/cuda, built for this machine's processor: each CUDA thread is a fiber (``cuda_runtime.h``), the C interface the
same."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

from tests.support.paths import ROOT

FOLDER = ROOT / "build" / "emulation"
LIBRARY = FOLDER / "libseqarch_cuda.so"
HEADER = ROOT / "csrc" / "include" / "seqarch.h"
SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), Path(__file__).parent / "emulation.cpp"]
HEADERS = [path for folder in ("csrc/cuda", "csrc/include", "tests/emulation") for path in ROOT.glob(f"{folder}/*.*h")]
OPTIONS = ["-std=c++17", "-O1", "-g1", "-Wno-unknown-pragmas", "-fPIC", "-fvisibility=hidden",
           "-fsanitize=undefined", "-fno-sanitize-recover=all",
           f"-I{ROOT / 'csrc' / 'include'}", f"-I{Path(__file__).parent}"]  # fmt: skip
"""Of the sanitizers only the one that asks nothing of the process that loads it; ``make sanitize`` has both."""


def compiler() -> str | None:
    """A C++ compiler that works, or ``None``."""
    found = shutil.which(os.environ.get("CXX", "c++"))
    works = found and subprocess.run([found, "--version"], capture_output=True).returncode == 0
    return found if works else None


def build() -> Path:
    """The library, built again if a source is newer; one process at a time.

    Raises:
        CalledProcessError: the sources do not compile.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(path.stat().st_mtime for path in (*SOURCES, *HEADERS, Path(__file__)))
        if not LIBRARY.exists() or LIBRARY.stat().st_mtime < newest:
            _compile()
    return LIBRARY


def _compile() -> None:
    objects = [FOLDER / f"{path.stem}.shared.o" for path in SOURCES]
    compilations = [
        subprocess.Popen([str(compiler()), *OPTIONS, "-x", "c++", "-c", str(path), "-o", str(target)])
        for path, target in zip(SOURCES, objects, strict=True)
    ]
    for process in compilations:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)
    link = [str(compiler()), "-shared", "-fsanitize=undefined", *map(str, objects), "-o", str(LIBRARY)]
    subprocess.run(link, check=True)
    shutil.copyfile(HEADER, FOLDER / HEADER.name)
