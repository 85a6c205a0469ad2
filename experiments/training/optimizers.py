"""Optimizers: AdamW, or Muon for the layers' linear maps with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from experiments.config.schema import TrainConfig
from seqarch.models import LanguageModel, parameter_groups

BETAS = (0.9, 0.95)


def adamw(model: LanguageModel, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Loshchilov and Hutter 2019; norms, biases, decays and what else a paper exempts take no weight decay."""
    return [_adamw(parameter_groups(model, config.weight_decay), config)]


def muon(model: LanguageModel, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Jordan et al. 2024 for the weights of linear maps inside the layers; AdamW for embedding, head and the rest.

    Its updates are scaled to the root mean square that AdamW's have (Liu et al. 2025, "Muon is scalable for LLM
    training", section 2.2), so both share one rate and one weight decay.
    """
    hidden = {module.weight for module in model.stack.modules() if isinstance(module, nn.Linear)}
    groups = parameter_groups(model, config.weight_decay)
    rest = [{**group, "params": [p for p in group["params"] if p not in hidden]} for group in groups]
    # an update of orthogonal columns has a spectral norm of the root of the width, one of AdamW of the width
    # (Yang, Simon and Bernstein 2023, "A Spectral Condition for Feature Learning", section 4)
    matrices = [
        {**group, "params": [p for p in group["params"] if p in hidden], "lr_scale": group["lr_scale"] ** 0.5}
        for group in groups
    ]
    matrices = [group for group in matrices if group["params"]]
    if not matrices:
        return [_adamw(rest, config)]
    return [torch.optim.Muon(matrices, lr=config.lr, adjust_lr_fn="match_rms_adamw"), _adamw(rest, config)]


def _adamw(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    # Fused, since it alone can leave a step out on the device's word, without the host.
    return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, fused=True)


OPTIMIZERS: dict[str, Callable[[LanguageModel, TrainConfig], list[torch.optim.Optimizer]]] = {
    "adamw": adamw,
    "muon": muon,
}


class Optimizers:
    """The optimizers of a model as one, and their state as plain tensors by name."""

    def __init__(self, model: LanguageModel, config: TrainConfig):
        self.config, self.lr = config, config.lr
        self.parts = OPTIMIZERS[config.optimizer](model, config)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self._allocate()

    def step(self, lr: float, bad: Tensor) -> None:
        """One update at a learning rate, and no gradients after it.

        Where ``train.bad_step`` is ``skip`` and ``bad``, a scalar on the device, is 1, parameters and state stay as
        they are. AdamW learns that on the device; for Muon the host has to wait for it.
        """
        skips, self.lr = self.config.bad_step == "skip", lr
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * group["lr_scale"]
            if getattr(part, "_step_supports_amp_scaling", False):
                part.found_inf = bad if skips else None  # type: ignore[attr-defined] # As torch.amp.GradScaler does.
                part.step()
            elif not (skips and bad):
                part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state by ``parameter/entry``: what a checkpoint holds, and what loading one writes into."""
        named = ((self._names[parameter], entries) for part in self.parts for parameter, entries in part.state.items())
        return {f"{name}/{entry}": value for name, entries in named for entry, value in entries.items()}

    def _allocate(self) -> None:
        """Make the state before the first step, also of parameters that may never get a gradient; none moves.

        torch's optimizers make it as they go, and then there is nothing that a checkpoint could be loaded into.
        """
        for parameter in self._parameters():
            parameter.grad = torch.zeros_like(parameter)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = 0.0
            part.step()
            part.zero_grad(set_to_none=True)
        for tensor in self.tensors().values():
            tensor.zero_()

    def _parameters(self) -> Iterable[nn.Parameter]:
        return chain.from_iterable(group["params"] for part in self.parts for group in part.param_groups)
