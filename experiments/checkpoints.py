"""Everything that training needs to go on: parameters, optimizer, random numbers and counters."""

from __future__ import annotations

import io
import pickle
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from experiments.errors import RunnerError
from experiments.files import write_atomic

DAMAGE = (
    *(OSError, RuntimeError, LookupError, TypeError, AttributeError, ValueError, EOFError),
    *(pickle.UnpicklingError, struct.error),
)
"""What reading a file raises that is cut short, or holds something else."""


@dataclass
class TrainState:
    """Counters of a run.

    Attributes:
        step: optimizer steps done.
        validation: the validation metric at the last look.
        best, best_step: the best so far, and the step it was seen at.
        stale: looks at the validation split since then.
        train_seconds, eval_seconds: spent in training steps and on the validation split.
    """

    step: int = 0
    validation: float | None = None
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0


def save_checkpoint(
    paths: list[Path], model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: TrainState
) -> None:
    """Write the same checkpoint to each path, aside first and then renamed."""
    buffer = io.BytesIO()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
        "state": asdict(state),
    }
    torch.save(content, buffer)
    for path in paths:
        write_atomic(path, buffer.getvalue())


def load_checkpoint(
    path: Path, device: torch.device, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> TrainState:
    """Bring model, and with an optimizer all of training, to where the checkpoint was written.

    Raises:
        RunnerError: the file is damaged or belongs to another model.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(content["model"])
        if optimizer is not None:
            optimizer.load_state_dict(content["optimizer"])
            torch.set_rng_state(content["rng"]["cpu"])
            if device.type == "cuda":
                torch.cuda.set_rng_state_all(content["rng"]["cuda"])
        return TrainState(**content["state"])
    except DAMAGE as error:
        said = str(error).partition("\n")[0].partition(". ")[0] or "it is empty"
        raise RunnerError(f"cannot load checkpoint {path}: {type(error).__name__}, {said}. {_remedy(path)}") from error


def _remedy(path: Path) -> str:
    best = path.with_name("best.pt")
    if path != best and best.exists():
        return f"Copy {best.name} over it to go on from there, or delete {path.parent} to start from the beginning"
    return f"Delete {path.parent} to start from the beginning"
