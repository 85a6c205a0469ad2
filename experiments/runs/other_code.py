"""The code that a run was trained with, beside the code that is here now: recorded, compared, and what follows.

A run counts as finished while the sources of the plug-ins that it uses are the same: those of the packages that its
mixers, channel mixers and task come from, and of plug-ins that register nothing, which may change anything. The sources
of seqarch and of the runner are recorded and reported, and decide nothing unless that is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.config.plugins import package_version, plugin_packages
from experiments.config.schema import RunConfig
from experiments.runs.folder import RunFolder
from experiments.tasks import TASKS
from experiments.trackers import TRACKERS
from experiments.util import environment
from experiments.util.paths import ROOT
from experiments.util.sources import package_folder, package_sources
from seqarch.layers import CHANNEL_MIXERS, MIXERS
from seqarch.models import parse_pattern

OWN = {"seqarch": ("seqarch",), "experiments": ("experiments/config", "experiments/tasks", "experiments/training")}
"""By name, the folders of this checkout whose code makes a run's results."""
NOT_OUTSIDE = {"seqarch", "experiments", "torch", *sys.stdlib_module_names}
SHOWN = 3


def used_packages(config: RunConfig) -> list[str]:
    """The top-level packages outside of this checkout that a run's results depend on."""
    options = config.model.options
    layers = parse_pattern(options.pattern)
    classes: set[type] = {TASKS[config.task.name]}
    classes |= {MIXERS[name] for layer in layers for name in layer.mixers}
    channels = {layer.channel or options.channel for layer in layers} & CHANNEL_MIXERS.keys()
    classes |= {CHANNEL_MIXERS[name] for name in channels}
    silent = plugin_packages().keys() - {name for each in _registered() for name in _packages_of(each)}
    return sorted({name for each in classes for name in _packages_of(each)} | (silent - NOT_OUTSIDE))


def _registered() -> Iterator[type]:
    for registry in (MIXERS, CHANNEL_MIXERS, TASKS, TRACKERS):
        yield from registry.values()


def _packages_of(given: type) -> set[str]:
    """The packages outside of this checkout that define a class or what it derives from."""
    return {base.__module__.partition(".")[0] for base in given.__mro__} - NOT_OUTSIDE


def plugin_records(config: RunConfig) -> Iterator[tuple[str, dict[str, Any], str, int]]:
    """Of each plug-in in this process its name, its entry in the record, its diff and the mode of a file with that.

    The entry has the version, the file or folder, the commit and whether files differ from it, as for the runner's own
    code; and of those that the run uses the hash of each source file.
    """
    used = used_packages(config)
    for name in sorted({*plugin_packages(), *used} - NOT_OUTSIDE):
        path = package_folder(name)
        root = None if path is None else environment.repository_root(path)
        code, diff, mode = {"commit": None, "dirty": None}, "", environment.PUBLIC
        if root is not None and path is not None:
            here = ("--", path.relative_to(root).as_posix())
            code, diff, mode = environment.repository_version(root, here if root == ROOT else ("--", "."), here)
        sources = {"sources": package_sources(name)} if name in used else {}
        yield name, {"version": package_version(name), "path": str(path), **code, **sources}, diff, mode


def own_sources() -> dict[str, str]:
    """A hash of the sources of seqarch, and one of those parts of the runner that make a run's results."""
    return {name: environment.files_digest(ROOT, folders) for name, folders in OWN.items()}


def difference(config: RunConfig, record: Mapping[str, Any]) -> str | None:
    """The files of plug-ins in which the code of a recorded run and the code here differ, in words.

    ``None`` where they do not, or the record is of a version of the runner that kept no sources.
    """
    if not isinstance(recorded := record.get("plugins"), Mapping):
        return None
    then = {name: entry["sources"] for name, entry in recorded.items() if "sources" in entry}
    now = {name: package_sources(name) for name in used_packages(config)}
    found: list[str] = []
    for name in sorted(then.keys() | now.keys()):
        if name not in then or name not in now:
            found.append(f"{name} is {'used now' if name in now else 'not used any more'}")
            continue
        differing = sorted(file for file in {**then[name], **now[name]} if then[name].get(file) != now[name].get(file))
        words = [f"{file} {_change(file, then[name], now[name])}" for file in differing[:SHOWN]]
        more = [f"{len(differing) - SHOWN} files more"] if len(differing) > SHOWN else []
        commit = recorded[name].get("commit")
        found += [", ".join(words + more) + (f" (it was of commit {commit[:10]})" if commit else "")] if words else []
    return "; ".join(found) or None


def _change(file: str, then: Mapping[str, str], now: Mapping[str, str]) -> str:
    return "changed" if file in then and file in now else "is new" if file in now else "is gone"


def own_difference(record: Mapping[str, Any]) -> str | None:
    """What of seqarch and the runner differs from what a recorded run was trained with; ``None`` as above."""
    code = record.get("code") or {}
    if not isinstance(then := code.get("sources"), Mapping):
        return None
    names = [name for name, digest in own_sources().items() if then.get(name) != digest]
    commit = f" (it was of commit {str(code['commit'])[:10]})" if code.get("commit") else ""
    return f"{' and '.join(names)} changed{commit}" if names else None


def has_begun(folder: RunFolder) -> bool:
    """Whether something of the run would be lost, or continued, by training: it is finished, or has a checkpoint."""
    return folder.status() == "finished" or any(folder.checkpoints.glob("step-*"))


def refusal(folder: RunFolder, config: RunConfig) -> str | None:
    """What differs, of a run that has begun with other sources of its plug-ins, and what to do; ``None`` where none do.

    Raises:
        RunnerError: the record cannot be read.
    """
    found = difference(config, folder.record()) if has_begun(folder) else None
    return None if found is None else f"{found}. {CHOICES}"


CHOICES = "Nothing was touched: other_code=rerun moves it aside and trains it anew, other_code=keep takes it as it is"
