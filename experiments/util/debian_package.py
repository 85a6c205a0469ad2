"""Files of Debian packages, without installing any and without being root: by ``apt-get download`` and ``dpkg-deb``."""

from __future__ import annotations

import os
import shlex
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from experiments.util.errors import RunnerError, writing

LAST_LINES = 2
"""How many lines of what a command printed are shown of one that failed."""


def download(package: str, folder: Path, apt: Path) -> Path:
    """Download a package into a folder, by the lists of this machine or, where that fails, by lists of its own.

    Args:
        apt: a folder for these lists and whatever else ``apt-get`` keeps.

    Returns:
        The package's file.

    Raises:
        RunnerError: it could not be had; the text says what was tried.
    """
    own = ["-o", f"Dir::State::Lists={apt}/lists", "-o", f"Dir::Cache={apt}/cache", "-o", "Debug::NoLocking=1"]
    with writing(apt):
        for part in ("lists/partial", "cache/archives/partial"):
            (apt / part).mkdir(parents=True, exist_ok=True)
    tried = []
    for commands in ([["download", package]], [[*own, "update"], [*own, "download", package]]):
        for command in commands:
            if problem := _apt_get(command, folder):
                tried.append(problem)
                break
        if found := sorted(folder.glob(f"{package}_*.deb")):
            return found[-1]
    raise RunnerError(f"cannot download the Debian package {package}. Tried {'; then '.join(tried)}")


def _apt_get(arguments: list[str], folder: Path) -> str | None:
    """Run ``apt-get`` in a folder; the command and its reason where it fails."""
    command = ["apt-get", "-q", "-y", *arguments]
    # The folder of lists is this run's own and says nothing to a reader.
    shown = shlex.join(["apt-get", *(word for word in arguments if word != "-o" and "=" not in word)])
    try:
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, check=False
        )
    except OSError as error:
        return f"`{shown}`: {error.strerror} (apt-get is of Debian and its relatives)"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.startswith("E: ")] or done.stderr.splitlines()
    return f"`{shown}`: exit code {done.returncode}" + "".join(f", {line}" for line in lines[:LAST_LINES])


def fields(package: Path, *names: str) -> dict[str, str]:
    """Fields of a package's description, such as ``Version``.

    Raises:
        RunnerError: it is no package, or ``dpkg-deb`` is not there.
    """
    try:
        done = subprocess.run(["dpkg-deb", "-f", package, *names], capture_output=True, text=True, check=False)
    except OSError as error:
        raise RunnerError(f"cannot run dpkg-deb, which unpacks {package.name}: {error.strerror}") from error
    if done.returncode != 0:
        raise RunnerError(f"dpkg-deb cannot read {package.name}: {done.stderr.strip()}")
    pairs = (line.partition(": ") for line in done.stdout.splitlines())
    return {name: value for name, _, value in pairs}


def files(package: Path, root: str) -> Iterator[tuple[str, bytes]]:
    """The regular files of a package below a folder of it: paths from there, and contents. Links are left out.

    Raises:
        RunnerError: the package cannot be unpacked.
    """
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        if process.stdout is None:
            raise RunnerError(f"dpkg-deb gave nothing of {package.name}")
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    path = member.name.removeprefix("./")
                    content = archive.extractfile(member) if member.isreg() and path.startswith(f"{root}/") else None
                    if content is not None:
                        yield path.removeprefix(f"{root}/"), content.read()
            while process.stdout.read(2**20):  # What follows the last file, so that dpkg-deb can end.
                pass
        except tarfile.TarError as error:
            raise RunnerError(f"cannot unpack {package.name}: {error}") from error
    if process.returncode != 0:
        raise RunnerError(f"cannot unpack {package.name}: dpkg-deb ended with exit code {process.returncode}")
