"""A folder that is written beside its place and takes it once it is whole."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from seqarch.checkpoints.manifest import MANIFEST, file_digest, sync
from seqarch.pretrained.form import model_manifest


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A new folder beside ``path``, which takes its name when the block ends, and is removed if that fails.

    What lies at ``path`` is replaced only if it is an empty folder, or one of a model that was saved here, holds
    nothing else and has the hashes of its manifest. Processes that save to one place take turns. Between two renamings
    neither is there: a process that is killed then leaves the former model beside, as ``.NAME.xxxx.former``.

    Raises:
        ValueError: something else lies there.
        OSError: it cannot be written.
    """
    check_place(path)
    made = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made.mkdir()
    except OSError as error:
        raise OSError(f"cannot save to {path}: no folder can be made in {path.parent}: {error.strerror}") from error
    try:
        yield made
        _take_place(made, path)
    except BaseException:
        _remove(made, {each.name for each in made.iterdir()} if made.is_dir() else set())
        raise


def check_place(path: Path, hashed: bool = False) -> None:
    """Raise unless a model's folder may be written at a path.

    Args:
        hashed: compare the hashes of the files there, and not only their sizes.

    Raises:
        ValueError: something lies there that is not a model's folder which was saved here, or not only that, or has
            changed since.
    """
    if not path.name:
        raise ValueError(f"cannot save to {path}: expected the path of a folder of its own")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"cannot save to {path}: it is a {'link' if path.is_symlink() else 'file'}; expected a folder")
    if not path.is_dir():
        return
    if path.samefile(Path.cwd()):
        raise ValueError(f"cannot save to {path}: it is the working folder; expected one in it, or elsewhere")
    strangers = sorted({each.name for each in path.iterdir()} - _own_files(path, hashed))
    if strangers:
        raise ValueError(
            f"cannot save to {path}: it holds {', '.join(strangers[:3])}, which no saved model has put there as it is"
            " now; move it away, or save elsewhere"
        )


def _own_files(path: Path, hashed: bool) -> set[str]:
    """The names of the files in a folder that saving a model has written, as far as their sizes or hashes tell."""
    written = (model_manifest(path) or {}).get("files")
    if written is None:
        return set()
    own = {MANIFEST} if not (path / MANIFEST).is_symlink() else set()
    for each in path.iterdir():
        if each.name in written and each.is_file() and not each.is_symlink():
            size = {**written[each.name], "bytes": each.stat().st_size}
            if (file_digest(each) if hashed else size) == written[each.name]:
                own.add(each.name)
    return own


def _take_place(made: Path, path: Path) -> None:
    with _locked(path.parent):
        check_place(path, hashed=True)
        if not path.is_dir() or not any(path.iterdir()):
            made.rename(path)
            return
        former = path.parent / f"{made.name.removesuffix('.tmp')}.former"
        path.rename(former)
        try:
            check_place(former)  # again, of what has come since
            made.rename(path)
        except BaseException:
            former.rename(path)
            raise
    sync(path.parent)
    _remove(former, _own_files(former, hashed=False))


def _remove(folder: Path, names: set[str]) -> None:
    """Remove files of these names in a folder, and the folder if nothing else is in it."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Within the block, no other process is in one of the same folder; where the file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
