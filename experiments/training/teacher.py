"""Models of other runs' checkpoints: what a run starts from where that has other mixers, and its teacher."""

from __future__ import annotations

from pathlib import Path

import torch

from experiments.config.start import options_of
from experiments.training.checkpoints import load_named
from seqarch.models import LanguageModel


def model_of(key: str, checkpoint: str, digest: str | None) -> LanguageModel:
    """The model of a checkpoint, on the CPU, in eval mode and without gradients.

    Args:
        key: the option that names it, for errors.

    Raises:
        RunnerError: it is damaged, gone, or another one than when the run was made.
    """
    with torch.random.fork_rng(devices=[]):  # A run draws the same numbers whatever it is made with.
        model = LanguageModel(options_of(key, Path(checkpoint)))
    load_named(key, Path(checkpoint), digest, {"model": model.state_dict()})
    return model.eval().requires_grad_(False)
