"""Where a run ran: code, software and hardware, for its record."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import seqarch
from seqarch.ops.common import library_cuda, native

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "einops", "triton", "hydra-core", "omegaconf", "wandb")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
VARIABLES = (*THREADS, "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "SEQARCH_ISA", "SEQARCH_AUTOTUNE",
             "TRITON_INTERPRET")  # fmt: skip
"""Environment variables that change results or speed; no others are recorded, as they may hold secrets."""

SOURCES = (".py", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".yaml", ".yml", ".toml", ".sh")
"""Endings of the untracked files whose content a diff holds: other files may be large, or hold secrets."""

DIFF_BYTES = 2**20
"""Of untracked files together."""


def code_version() -> tuple[dict[str, Any], str]:
    """The commit and whether the files differ from it; and how they differ, as a diff that ``git apply`` takes.

    Files that git neither tracks nor ignores are part of the code: ``untracked`` names them, the diff adds those that
    are sources, and ``left_out`` names those that it does not hold.
    """
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None, "library": compiled_library()}, ""
    changed = _git("status", "--porcelain") or ""
    diff = (_git("diff", "HEAD") or "") if changed.strip() else ""
    untracked = [name for name in (_git("ls-files", "--others", "--exclude-standard", "-z") or "").split("\0") if name]
    added, left_out = untracked_diff(ROOT, untracked)
    code = {"commit": commit.strip(), "dirty": bool(changed.strip()), "library": compiled_library()}
    lists = {"untracked": untracked, "left_out": left_out}
    return code | {name: files for name, files in lists.items() if files}, diff + added


def untracked_diff(root: Path, names: Sequence[str]) -> tuple[str, list[str]]:
    """A diff that adds the sources among some files, as far as :data:`DIFF_BYTES` allow; and the names of the rest."""
    parts, left_out, room = [], [], DIFF_BYTES
    for name in names:
        text = _source_text(root / name, room)
        if text is None:
            left_out.append(name)
            continue
        room -= len(text.encode())
        parts.append(_addition(name, text))
    return "".join(parts), left_out


def _source_text(path: Path, room: int) -> str | None:
    """The text of a source of at most so many bytes; ``None`` for any other file."""
    try:
        if path.suffix not in SOURCES or path.is_symlink() or not path.is_file() or path.stat().st_size > room:
            return None
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None


def _addition(name: str, text: str) -> str:
    header = f"diff --git a/{name} b/{name}\nnew file mode 100644\n"
    if not text:
        return header
    lines = text.removesuffix("\n").split("\n")
    body = "".join(f"+{line}\n" for line in lines)
    open_end = "" if text.endswith("\n") else "\\ No newline at end of file\n"
    return f"{header}--- /dev/null\n+++ b/{name}\n@@ -0,0 +1,{len(lines)} @@\n{body}{open_end}"


@cache
def sources_digest() -> str:
    """Of the Python sources of seqarch, which a compiler's cache outlives."""
    digest = hashlib.sha256()
    for path in sorted(Path(seqarch.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def compiled_library() -> dict[str, str]:
    """The instruction set and the hash of the compiled kernels that run here, or why none do; of the CUDA ones too."""
    cuda = {} if library_cuda.unavailable() else {"cuda_sha256": library_cuda.library_hash()}
    if (reason := native.unavailable()) is not None:
        return {"absent": reason} | cuda
    return {"isa": native.chosen_isa(), "sha256": native.library_hash()} | cuda


def software() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "cuda": torch.version.cuda,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def hardware(device: torch.device) -> dict[str, Any]:
    found = {
        "host": socket.gethostname(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, errors="replace", timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
