"""What routers of mixtures of experts do once per optimizer step, under a ``Trainer``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from seqarch.models import LanguageModel


class RouterUpdates(TrainerCallback):
    """Moves the routers' biases after each step of the optimizer: ``Trainer(..., callbacks=[RouterUpdates()])``.

    For models with ``moe`` and its ``expert_bias``, which is no parameter; to others it does nothing.
    """

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        for module in others["model"].modules():
            if isinstance(module, LanguageModel):
                module.update_routers()
