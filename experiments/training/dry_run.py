"""An estimate of what a run would take, without running it: ``python -m experiments.run ... train.dry_run=true``

The model is built, and one micro-batch passes through it, on tensors that have shapes and no memory.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments.config.build import build_model, build_task
from experiments.config.matching import shown, sizes
from experiments.config.schema import RunConfig
from experiments.training.engine import autocast, choose_device
from experiments.training.optimizers import Optimizers
from seqarch.models import LanguageModel


@dataclass(frozen=True)
class Plan:
    """The size, memory and work of a run that was not run.

    Attributes:
        parameters: their number, shared ones counted once; ``layers``: those of them inside the layers.
        parameter_bytes, gradient_bytes, optimizer_bytes: of all processes together, which share them.
        activation_bytes: kept for the backward pass of one micro-batch, on one process; beside it, the passes need
            room to work in.
        micro_batch: sequences in it.
        state_bytes: of the recurrent state of one sequence in generation, after ``state_length`` tokens.
        tokens, flops: of a step, forward and backward, counted as in the record.
        steps: optimizer steps.
        sizes: of each mixer and channel mixer, the options that a match solves for.
    """

    parameters: int
    layers: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    micro_batch: int
    state_bytes: int
    state_length: int
    tokens: int
    flops: int
    steps: int
    sizes: dict[str, dict[str, int]]

    def __str__(self) -> str:
        model = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes
        rows = {
            "parameters": f"{self.parameters:,}, {self.layers:,} of them in the layers",
            "sizes": "; ".join(f"{name} {shown(own)}" for name, own in self.sizes.items()),
            "model": f"{in_bytes(model)}: parameters {in_bytes(self.parameter_bytes)}, gradients"
            f" {in_bytes(self.gradient_bytes)}, optimizer {in_bytes(self.optimizer_bytes)}",
            "activations": f"{in_bytes(self.activation_bytes)} for the backward pass of {self.micro_batch} sequences",
            "state": f"{in_bytes(self.state_bytes)} per sequence of {self.state_length:,} tokens",
            "per step": f"{self.tokens:,} tokens, {in_flops(self.flops)}",
            "in all": f"{self.tokens * self.steps:,} tokens, {in_flops(self.flops * self.steps)}",
        }
        return "\n".join(f"    {name:<12}{text}" for name, text in rows.items())


def plan(config: RunConfig) -> Plan:
    """The plan of a configuration's run on this machine. Nothing of the model's size is allocated."""
    train, task = config.train, build_task(config)
    share = math.ceil(train.batch_size / max(config.machine.processes, 1))
    rows = min(train.micro_batch or share, share)
    with warnings.catch_warnings(), FakeTensorMode(), torch.device(choose_device(train.device)):
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        model = build_model(config)
        optimizers = Optimizers(model, train)
        activations = _activation_bytes(model, config, rows, task.length)
        return Plan(
            parameters=model.num_parameters(),
            layers=sum(parameter.numel() for parameter in model.stack.parameters()),
            parameter_bytes=_bytes(model.parameters()),
            gradient_bytes=_bytes(model.parameters()),
            optimizer_bytes=_bytes(optimizers.tensors().values()),
            activation_bytes=activations,
            micro_batch=rows,
            state_bytes=model.state_bytes(task.longest),
            state_length=task.longest,
            tokens=train.batch_size * task.length,
            flops=3 * model.flops(task.length, train.batch_size),
            steps=train.steps,
            sizes=sizes(config.model.options),
        )


class SavedBytes:
    """Counts the bytes that autograd saves for the backward pass, each storage once, and in each layer."""

    def __init__(self, model: LanguageModel):
        self._counted = {
            id(parameter.untyped_storage()): parameter.untyped_storage() for parameter in model.parameters()
        }
        self.total, self.layers, self._before = 0, [], 0
        for layer in model.stack.layers:
            layer.register_forward_pre_hook(self._begin)
            layer.register_forward_hook(self._end)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self._counted:
            self._counted[id(storage)] = storage  # Held, so that no other storage gets its number.
            self.total += storage.nbytes()
        return tensor

    def _begin(self, *_: object) -> None:
        self._before = self.total

    def _end(self, *_: object) -> None:
        self.layers.append(self.total - self._before)


def _activation_bytes(model: LanguageModel, config: RunConfig, rows: int, length: int) -> int:
    """The bytes that autograd keeps of a micro-batch; checkpointed, the layers' inputs and the largest one's own."""
    saved = SavedBytes(model)
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    counting = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor)
    with counting, autocast(tokens.device, config.train.precision):
        model.loss(tokens, tokens, reduction="sum")
        model.auxiliary_loss()
    if not config.train.activation_checkpointing:
        return saved.total
    stream = rows * length * config.model.options.d_model * 4
    return saved.total - sum(saved.layers) + len(saved.layers) * stream + max(saved.layers)


def _bytes(tensors: object) -> int:
    distinct = {id(tensor): tensor for tensor in tensors}.values()  # type: ignore[attr-defined]
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct)


def in_bytes(number: float) -> str:
    return _scaled(number, 1024, ("bytes", "KiB", "MiB", "GiB", "TiB"))


def in_flops(number: float) -> str:
    return _scaled(number, 1000, ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs"))


def _scaled(number: float, base: int, units: tuple[str, ...]) -> str:
    power = min(int(math.log(max(number, 1), base)), len(units) - 1)
    return f"{number / base**power:.4g} {units[power]}"
