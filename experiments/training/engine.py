"""Runs a model on devices: its precision, its memory, and its share of every batch.

One process, or several that torchrun started: FSDP2 then splits parameters, gradients and optimizer state among them,
layer by layer. Losses are divided by the targets of the whole batch, so gradients are the same, up to rounding, in
whatever micro-batches and on however many processes they were made.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from experiments.config.schema import TrainConfig
from experiments.tasks.task import IGNORED, Batch
from experiments.training import processes
from experiments.training.carried import CarriedStates, Texts
from experiments.training.objectives import Objective, Part, Targets, count_read
from experiments.util import environment
from experiments.util.devices import require_device
from experiments.util.errors import RunnerError
from seqarch.layers.channel.router import Router
from seqarch.models import LanguageModel


class Engine:
    """Runs a model as ``config`` says, together with the other processes.

    Attributes:
        objective: what is made small; the loss of the task's targets where nothing else is said.

    Raises:
        RunnerError: there is no such device, or the batch cannot be shared out evenly.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.device = choose_device(config.device)
        if config.batch_size % processes.count():
            raise RunnerError(
                f"train.batch_size is {config.batch_size}, which {processes.count()} processes cannot share evenly"
            )
        if config.threads:
            torch.set_num_threads(config.threads)
        self.share = config.batch_size // processes.count()
        self.objective: Objective = Targets()
        processes.join(self.device)

    def prepare(self, model: LanguageModel) -> LanguageModel:
        """The model on its device, recomputed, compiled and sharded layer by layer as the configuration says."""
        model = model.to(self.device)
        if self.config.compile:
            # torch keeps compiled graphs on disk by the names of custom operators, whatever those return by now.
            torch.compiler.config.cache_key_tag = f"seqarch {environment.sources_digest()}"
        for layer in model.stack.layers:
            # Compiled inside what is recomputed: the other way round the compiler would leave out layers that keep
            # something of their forward pass, as a mixture of experts keeps its routing.
            if self.config.compile:
                layer.forward = torch.compile(layer.forward)
            if self.config.activation_checkpointing:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if processes.count() > 1:
            self._shard(model)
        return model

    def _shard(self, model: LanguageModel) -> None:
        # A layer returns its mixers' states too, some of which are views; nothing here writes to them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(self.device.type, (processes.count(),))
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = mixed if self.config.param_dtype == "bfloat16" else MixedPrecisionPolicy()
        for layer in model.stack.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        for method in ("loss", "loss_and_state", "score_targets"):
            register_fsdp_forward_method(model, method)

    def gradients(
        self,
        model: LanguageModel,
        batch: Batch,
        micro_batch: int | None = None,
        carried: CarriedStates | None = None,
    ) -> Tensor:
        """Set the gradients of the objective on the whole batch, of which ``batch`` is this process's share.

        With ``train.bptt`` each micro-batch is processed in segments: the mixers' states go on from one to the next,
        and no gradient goes back.

        Args:
            micro_batch: sequences at a time, 0 for all; by default ``train.micro_batch``.
            carried: the states that rows begin with, which are then those that they end with.

        Returns:
            The mean over all that the objective counts in the whole batch: a scalar, still on the device.
        """
        tokens, targets, token_mask = to_device(batch, self.device)
        counted = max(processes.total(self.objective.count(batch)), 1)
        read = max(processes.total(count_read(batch)), 1)
        loss = torch.zeros((), device=self.device)
        state, ended, learns = None, [], False
        for part, is_end, is_last in self._parts(tokens.shape[0], tokens.shape[1], micro_batch):
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(is_last)
            if carried is not None and part[1].start == 0:
                state = carried.rows(part[0])
            goes_on = not is_end or carried is not None
            texts = Texts(model, state, None if batch.begins is None else batch.begins[part], goes_on)
            mask = None if token_mask is None else token_mask[part]
            share = count_read(batch, part) / read
            for total, after in self._terms(model, Part(texts, tokens[part], targets[part], mask, goes_on)):
                mean = total / counted
                extra = model.auxiliary_loss() if self.objective.of_model else 0.0
                # FSDP takes the mean over processes, and the sum is wanted.
                whole = (mean + extra * share) * processes.count()
                if whole.requires_grad or self.config.trains_all:  # Of some layers nothing may be trained.
                    whole.backward()
                    learns = True
                loss += mean.detach()
                state = after
            if is_end:
                ended.append(state)
                state = None
        if not learns:
            why = "" if self.config.trains_all else " by train.lora and train.trainable: name more"
            raise RunnerError(f"train.objective: {self.config.objective} depends on nothing that learns{why}")
        if carried is not None:
            carried.keep(ended)
        return processes.add(loss)

    def _terms(self, model: LanguageModel, part: Part) -> Iterator[tuple[Tensor, Any]]:
        """The terms of the objective, computed in ``train.precision``."""
        terms = self.objective.terms(model, part)
        while True:
            with autocast(self.device, self.config.precision):
                found = next(terms, None)
            if found is None:
                return
            yield found

    def _parts(
        self, rows: int, length: int, micro_batch: int | None
    ) -> Iterator[tuple[tuple[slice, slice], bool, bool]]:
        """The rows and tokens of a batch that are processed at a time; whether a row ends there, and all rows do."""
        size = (self.config.micro_batch if micro_batch is None else micro_batch) or rows
        segment = self.config.bptt or length
        for start in range(0, rows, size):
            for begin in range(0, length, segment):
                is_end = begin + segment >= length
                part = slice(start, start + size), slice(begin, begin + segment)
                yield part, is_end, is_end and start + size >= rows

    def clip(self, model: LanguageModel) -> Tensor:
        """Bound the norm of all processes' gradients together; the norm before, a scalar on the device."""
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.config.grad_clip or math.inf)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def update_routers(self, model: LanguageModel, bad: Tensor) -> None:
        """Move the biases of routers that learn by the loads of all processes, not by those of a bad step."""
        routers = [module for module in model.modules() if isinstance(module, Router)]
        for router in {id(each.load): each for each in routers}.values():  # of layers that share their experts, one
            learns = any(parameter.requires_grad for parameter in router.parameters())
            processes.add(router.load.mul_((1 - bad.long()) * learns))
        model.update_routers()

    @torch.no_grad()
    def evaluate_batch(self, model: LanguageModel, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """The loss of each target of a batch and whether it was the likeliest token, both ``[B, T]``; 0 where none is.

        Each process does some of the rows; where they do not come out even, some rows are done twice.
        """
        total, parts = len(batch.tokens), processes.count()
        rows = np.arange(processes.rank(), -(-total // parts) * parts, parts) % total
        tokens, targets, token_mask = to_device(batch.rows(rows), self.device)
        with autocast(self.device, self.config.precision):
            losses, hits = model.score_targets(tokens, targets, token_mask=token_mask, ignore_index=IGNORED)
        own = losses.cpu().numpy(), hits.cpu().numpy()
        dealt = [np.stack(arrays, axis=1) for arrays in zip(*processes.gather(own), strict=True)]
        loss, hits = (array.reshape(-1, array.shape[-1])[:total] for array in dealt)
        return loss, hits


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Compute in ``precision``; parameters, their gradients and the optimizer stay float32."""
    dtype = getattr(torch, precision)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens and mask on the device; the targets stay, as the model brings over those that count."""
    tokens, targets = (torch.from_numpy(np.ascontiguousarray(part)) for part in batch[:2])
    mask = None if batch.token_mask is None else torch.from_numpy(batch.token_mask).to(device)
    return tokens.to(device), targets, mask


def choose_device(name: str) -> torch.device:
    require_device(name)
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device
