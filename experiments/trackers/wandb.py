"""Weights & Biases."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments.trackers.tracker import Tracker


@dataclass(frozen=True)
class WandbOptions:
    """
    Attributes:
        project: the name of the project there.
        mode: ``offline`` or ``online``.
        entity: the user or team whose project it is; ``None`` for the default of the account.
        tags: of the run, to find it by.
    """

    project: str = "seqarch"
    mode: Literal["offline", "online"] = "offline"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


class WandbTracker(Tracker):
    """Weights & Biases; offline by default, with its files in the run's folder under ``wandb/``.

    All attempts at a run are one run there, under an id that the first one makes and keeps beside those files: the hash
    in the folder's name, with random digits, so that the same run trained anew from an empty folder is another one.
    Steps that an attempt repeats are not sent again; they are the same to the bit.
    """

    Config, package = WandbOptions, "wandb"

    def __init__(self, options: WandbOptions, folder: Path, config: Mapping[str, Any]):
        import wandb

        self._file = folder / "wandb" / "sent.json"
        sent = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._id = sent.get("id") or f"{folder.name.rpartition('-')[2]}-{secrets.token_hex(4)}"
        self._file.parent.mkdir(exist_ok=True)
        self._keep(sent.get("step", 0))
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            tags=options.tags,
            mode=options.mode,
            dir=folder,
            id=self._id,
            resume="allow",
            name=folder.name,
            group=config["experiment"],
            config=dict(config),
            allow_val_change=True,  # In what makes no other run of it, such as its tracker's options.
            settings=wandb.Settings(console="off", silent=True, disable_git=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step > self._step:
            self._keep(step)
            self._run.log(dict(values), step=step)

    def finish(self, status: str, results: Mapping[str, Any]) -> None:
        self._run.summary.update({"status": status, **{k: v for k, v in results.items() if isinstance(v, float)}})
        self._run.finish(exit_code=0 if status == "finished" else 1)

    def _keep(self, step: int) -> None:
        """Keep the last step that was sent, in a file that is never half there."""
        self._step = step
        aside = self._file.with_suffix(".tmp")
        aside.unlink(missing_ok=True)
        with open(aside, "x", encoding="utf-8") as file:  # Never through a link that somebody left there.
            json.dump({"id": self._id, "step": step}, file)
        os.replace(aside, self._file)
