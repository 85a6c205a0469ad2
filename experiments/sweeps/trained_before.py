"""A run that was trained before, to its end or to a checkpoint: whether it counts, by the code it was trained with."""

from __future__ import annotations

from experiments.config.schema import RunConfig
from experiments.runs.folder import RunFolder
from experiments.runs.former import move_aside
from experiments.runs.other_code import difference, has_begun, own_difference, refusal


def settle(folder: RunFolder, config: RunConfig, other_code: str) -> tuple[str, str | None] | None:
    """The status of a run that is not to be trained, and what is to be said of its code; ``None`` of one that is.

    One that is to be trained anew is moved aside first.

    Raises:
        RunnerError: its record cannot be read, it is in training, or it cannot be moved.
    """
    if other_code == "refuse" and (reason := refusal(folder, config)):
        return "other_code" if folder.status() == "finished" else "begun_with_other_code", reason
    if _is_to_be_rerun(folder, config, other_code):
        folder.lock.acquire()
        if _is_to_be_rerun(folder, config, other_code):  # Still, now that nobody else can do it.
            move_aside(folder)
            return None
        folder.lock.release()
    if folder.status() != "finished":
        return None
    own = own_difference(folder.record())
    return "kept", None if own is None else f"since then {own}"


def _is_to_be_rerun(folder: RunFolder, config: RunConfig, other_code: str) -> bool:
    if other_code not in ("rerun", "rerun_any") or not has_begun(folder):
        return False
    record = folder.record()
    own = own_difference(record) if other_code == "rerun_any" else None
    return own is not None or difference(config, record) is not None
