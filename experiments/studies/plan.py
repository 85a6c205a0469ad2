"""The plan of a study, committed before its runs: what is fixed, in a file that people read and git dates.

``docs/results/NAME/plan.json`` holds the task and the options of training that all arms have but where an arm sets its
own, the procedure of tuning and reporting, and every claim with its margin. The records name the plan by its hash;
where the study's code and the file differ once there are records, nothing is trained and nothing drawn.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.config.schema import flat
from experiments.studies.study import Planned
from experiments.util.errors import RunnerError
from experiments.util.files import read_json, write_atomic
from experiments.util.paths import ROOT

FILE = "plan.json"


def content(version: Planned) -> dict[str, Any]:
    """What is written of a version."""
    return json.loads(json.dumps({"plan": version.plan, **version.fixed}))


def settle(version: Planned, folder: Path, recorded: bool) -> None:
    """Write the plan of a study that has no records yet, or check that it is as it was.

    Args:
        recorded: whether there are records.

    Raises:
        RunnerError: there are, and the plan was edited since.
    """
    if recorded:
        check(version, folder)
    elif read_json(folder / FILE) != content(version):
        write_atomic(folder / FILE, json.dumps(content(version), indent=1, ensure_ascii=False) + "\n")


def check(version: Planned, folder: Path) -> None:
    """Check that the plan that was written is the study's.

    Raises:
        RunnerError: naming the first entry in which they differ.
    """
    kept = read_json(folder / FILE)
    if kept is None:
        raise RunnerError(f"{folder / FILE} is missing, and there are records made by it: restore the file")
    there, here = flat(kept), flat(content(version))
    if different := sorted(
        key for key in there.keys() | here.keys() if there.get(key) != here.get(key) and key != "plan"
    ):
        key = different[0]
        raise RunnerError(
            f"{key} is {there.get(key)!r} in {folder / FILE} and {here.get(key)!r} in the study: a plan stays as it was"
            " before the first run. Restore it, or make another study"
        )


def check_records(version: Planned, plans: Iterable[str], where: Path) -> None:
    """Check that records, which name these plans, are of this one.

    Raises:
        RunnerError: one names another.
    """
    if others := {*plans} - {version.plan}:
        raise RunnerError(f"{where} has records of the plan {min(others)}, and the study's plan is {version.plan}")


def check_committed(folder: Path) -> None:
    """Check that the plan below docs/results is committed, so that its date is on record before the first run.

    Raises:
        RunnerError: it is not, or was changed since.
    """
    path = (folder / FILE).relative_to(ROOT)
    status = subprocess.run(
        ["git", "-C", str(ROOT), "status", "--porcelain", "--ignored", "--", str(path)], capture_output=True, text=True
    )
    if status.returncode or status.stdout.strip():
        raise RunnerError(f"{path} has to be committed before the first run, so that its margins are known to be older")
