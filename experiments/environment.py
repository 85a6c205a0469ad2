"""Where a run ran: code, software and hardware, for its record."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from seqarch.ops.common import native

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "einops", "triton", "hydra-core", "omegaconf", "wandb")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
VARIABLES = (*THREADS, "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "SEQARCH_ISA", "TRITON_INTERPRET")
"""Environment variables that change results or speed; no others are recorded, as they may hold secrets."""


def code_version() -> tuple[dict[str, Any], str]:
    """The commit and whether the files differ from it; and how they differ, as a diff."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None, "library": compiled_library()}, ""
    changed = _git("status", "--porcelain") or ""
    diff = (_git("diff", "HEAD") or "") if changed.strip() else ""
    untracked = [line[3:] for line in changed.splitlines() if line.startswith("??")]
    code = {"commit": commit.strip(), "dirty": bool(changed.strip()), "library": compiled_library()}
    return code | ({"untracked": untracked} if untracked else {}), diff


def compiled_library() -> dict[str, str]:
    """The instruction set and the hash of the compiled kernels that run here, or why none do."""
    if (reason := native.unavailable()) is not None:
        return {"absent": reason}
    return {"isa": native.chosen_isa(), "sha256": native.library_hash()}


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
