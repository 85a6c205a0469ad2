"""The environment of a run: code, software and hardware, for its record."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch

import seqarch
from experiments.util.paths import INSTALLED, PACKAGE, ROOT
from experiments.util.secrecy import masked_text
from seqarch.ops.native import cpu_library, cuda_library

PUBLIC = 0o666
"""The mode of a new file, less what the umask forbids."""

PACKAGES = ("torch", "numpy", "einops", "triton", "hydra-core", "omegaconf", "wandb")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
VARIABLES = (*THREADS, "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "SEQARCH_ISA", "SEQARCH_AUTOTUNE",
             "TRITON_INTERPRET")  # fmt: skip
"""Environment variables that change results or speed; no others are recorded, as they may hold secrets."""

CODE = ("--", ".", ":(exclude)docs/results")
"""All files but the records and pages of studies, which are written while runs train."""

HASHED_BYTES = 2**28
"""The most that is hashed of untracked files together: a folder of data among them would take minutes."""


def code_version() -> tuple[dict[str, Any], str, int]:
    """The commit and whether the files differ from it; how they differ, as a diff that ``git apply`` takes; and the
    mode that a file with this diff may have.

    Files that git neither tracks nor ignores are part of the code: ``untracked`` has their sizes and hashes by name.
    Their content, which may be large or secret, is nowhere in it. Of a package that is installed from a wheel there is
    its version, the hash of its sources and, if pip took it from a repository, the commit.
    """
    if INSTALLED:  # Whatever repository site-packages lies in is somebody else's.
        return {**installed_version(), "library": compiled_library()}, "", PUBLIC
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None, "library": compiled_library()}, "", PUBLIC
    changed = _git("status", "--porcelain", *CODE) or ""
    diff = (_git("diff", "HEAD", *CODE) or "") if changed.strip() else ""
    code = {"commit": commit.strip(), "dirty": bool(changed.strip()), "library": compiled_library()}
    if untracked := _names("ls-files", "--others", "--exclude-standard", "-z", *CODE):
        code["untracked"] = fingerprints(ROOT, untracked)
    if (shown := masked_text(diff)) != diff:
        code["masked"] = "keys in the diff"
    return code, shown, least_mode(ROOT / name for name in _names("diff", "HEAD", "--name-only", "-z", *CODE))


def installed_version() -> dict[str, Any]:
    """What is known of the code of a package that pip installed; whether its files were changed since is not."""
    try:
        package = distribution("seqarch")
        origin = json.loads(package.read_text("direct_url.json") or "{}")  # PEP 610
        number: str | None = package.version
    except (PackageNotFoundError, ValueError):
        number, origin = seqarch.__version__, {}
    commit = origin.get("vcs_info", {}).get("commit_id")
    sources = _digest(Path(seqarch.__file__).parent, PACKAGE)
    return {"commit": commit, "dirty": None, "version": number, "sources_sha256": sources}


def fingerprints(root: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of some files; of links, and of what is beyond :data:`HASHED_BYTES`, the size alone."""
    found, room = {}, HASHED_BYTES
    for name in names:
        try:
            size = (root / name).lstat().st_size
            found[name] = {"bytes": size}
            if not (root / name).is_symlink() and (root / name).is_file() and size <= room:
                room -= size
                found[name]["sha256"] = hashlib.sha256((root / name).read_bytes()).hexdigest()
        except OSError as error:  # Gone meanwhile, or closed to this user.
            found[name] = {"unread": error.strerror}
    return found


def least_mode(paths: Iterable[Path]) -> int:
    """The access that all of some files give to their group and to others: a copy of them must not give more."""
    mode = PUBLIC
    for path in paths:
        if path.exists():  # What was deleted is in the commit, as open as that is.
            mode &= path.stat().st_mode | 0o600
    return mode


@cache
def sources_digest() -> str:
    """A hash of the Python sources of seqarch, which a compiler's cache outlives."""
    return _digest(Path(seqarch.__file__).parent)


def _digest(*folders: Path) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def compiled_library() -> dict[str, str]:
    """The instruction set and the hash of the compiled kernels that run here, or why none do; of the CUDA ones too."""
    cuda = {} if cuda_library.unavailable() else {"cuda_sha256": cuda_library.library_hash()}
    if (reason := cpu_library.unavailable()) is not None:
        return {"absent": reason} | cuda
    return {"isa": cpu_library.chosen_isa(), "sha256": cpu_library.library_hash()} | cuda


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


def _names(*arguments: str) -> list[str]:
    return [name for name in (_git(*arguments) or "").split("\0") if name]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, errors="replace", timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
