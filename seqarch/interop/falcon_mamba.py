"""Falcon Mamba: ``FalconMambaForCausalLM``, Mamba whose dt, B and C pass norms without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import mamba
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(mamba.Settings):
    """Fields of ``FalconMambaConfig``."""

    model_type = "falcon_mamba"
    options: ClassVar = {"mamba": {"norm_eps": "mixer_rms_eps"}}

    mixer_rms_eps: float = 1e-6


def lm_config(settings: Settings) -> LMConfig:
    return mamba.model_of(settings, {"dt_bc_norm": "rms_without_weights"})


weights = mamba.weights
