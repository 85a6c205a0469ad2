"""The environment of a run: code, software and hardware, for its record."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch

import seqarch
from experiments.util.paths import INSTALLED, ROOT
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
    code, diff, mode = repository_version(ROOT, CODE)
    return {"commit": code.pop("commit"), "dirty": code.pop("dirty"), "library": compiled_library(), **code}, diff, mode


def repository_version(
    root: Path, tracked: Sequence[str], others: Sequence[str] = ()
) -> tuple[dict[str, Any], str, int]:
    """Commit, changes and diff of a checkout, as :func:`code_version` says.

    Args:
        root: its folder.
        tracked: which of its tracked files count, as ``git diff`` takes them.
        others: which of those that git does not track, by default the same.
    """
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None}, "", PUBLIC
    untracked = _names(root, "ls-files", "--others", "--exclude-standard", "-z", *(others or tracked))
    changed = (_git(root, "status", "--porcelain", "--untracked-files=no", *tracked) or "").strip()
    diff = (_git(root, "diff", "HEAD", *tracked) or "") if changed else ""
    code: dict[str, Any] = {"commit": commit.strip(), "dirty": bool(changed or untracked)}
    if untracked:
        code["untracked"] = fingerprints(root, untracked)
    if (shown := masked_text(diff)) != diff:
        code["masked"] = "keys in the diff"
    names = _names(root, "diff", "HEAD", "--name-only", "-z", *tracked) if changed else []
    return code, shown, least_mode(root / name for name in names)


def installed_version() -> dict[str, Any]:
    """What is known of the code of a package that pip installed; whether its files were changed since is not."""
    try:
        package = distribution("seqarch")
        origin = json.loads(package.read_text("direct_url.json") or "{}")  # PEP 610
        number: str | None = package.version
    except (PackageNotFoundError, ValueError):
        number, origin = seqarch.__version__, {}
    commit = origin.get("vcs_info", {}).get("commit_id")
    sources = files_digest(ROOT, ("experiments", "seqarch"))
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
    return files_digest(Path(seqarch.__file__).parent, (".",))


@cache
def files_digest(root: Path, folders: tuple[str, ...]) -> str:
    """A hash of the Python sources in some folders below a root."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
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


def repository_root(path: Path) -> Path | None:
    """The checkout that a file or folder is a part of; ``None`` where it is in none, or ignored by it."""
    folder = path if path.is_dir() else path.parent
    root = _git(folder, "rev-parse", "--show-toplevel")
    if root is None or _git(folder, "check-ignore", "--quiet", str(path)) is not None:
        return None
    return Path(root.rstrip("\n"))


def _names(root: Path, *arguments: str) -> list[str]:
    return [name for name in (_git(root, *arguments) or "").split("\0") if name]


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, errors="replace", timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
