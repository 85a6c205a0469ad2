"""An estimate of what a run would take, without running it: ``python -m experiments.run ... train.dry_run=true``

The model is built, and one micro-batch passes through it, on tensors that have shapes and no memory.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments.config.build import build_model, restrict
from experiments.config.data import Data, Source, build_data
from experiments.config.matching import shown, sizes
from experiments.config.schema import RunConfig
from experiments.training.engine import autocast, choose_device
from experiments.training.optimizers import Optimizers
from seqarch.models import LanguageModel


@dataclass(frozen=True)
class Plan:
    """The size, memory and work of a run that was not run.

    Attributes:
        parameters: their number, shared ones counted once; ``layers``: those of them inside the layers;
            ``trained``: those that learn, of adapters among them.
        parameter_bytes, gradient_bytes, optimizer_bytes: of all processes together, which share them.
        activation_bytes: kept for the backward pass of one micro-batch, on one process, where every target
            counts; less where few do, as in recall. Beside it, the passes need room to work in.
        micro_batch, length: sequences in it, and their tokens: of the source of the data that takes most.
        state_bytes: of the recurrent state of one sequence in generation, after ``state_length`` tokens.
        tokens, flops: of a step, forward and backward, counted as in the record, on the source that takes most.
        steps: optimizer steps.
        sizes: of each mixer and channel mixer, the options that a match solves for.
        all_tokens, all_flops: of all steps; of a mixture the expectation, of a curriculum the most.
    """

    parameters: int
    layers: int
    trained: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    micro_batch: int
    length: int
    state_bytes: int
    state_length: int
    tokens: int
    flops: int
    steps: int
    sizes: dict[str, dict[str, int]]
    all_tokens: int
    all_flops: int

    def __str__(self) -> str:
        model = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes
        rows = {
            "parameters": f"{self.parameters:,}, {self.layers:,} of them in the layers{self._trained}",
            "sizes": "; ".join(f"{name} {shown(own)}" for name, own in self.sizes.items()),
            "model": f"{in_bytes(model)}: parameters {in_bytes(self.parameter_bytes)}, gradients"
            f" {in_bytes(self.gradient_bytes)}, optimizer {in_bytes(self.optimizer_bytes)}",
            "activations": f"{in_bytes(self.activation_bytes)} for the backward pass of {self.micro_batch} sequences"
            f" of {self.length:,} tokens",
            "state": f"{in_bytes(self.state_bytes)} per sequence of {self.state_length:,} tokens",
            "per step": f"{self.tokens:,} tokens, {in_flops(self.flops)}",
            "in all": f"{self.all_tokens:,} tokens, {in_flops(self.all_flops)}",
        }
        return "\n".join(f"    {name:<12}{text}" for name, text in rows.items())

    @property
    def _trained(self) -> str:
        return "" if self.trained == self.parameters else f"; {self.trained:,} learn"


def plan(config: RunConfig) -> Plan:
    """The plan of a configuration's run on this machine. Nothing of the model's size is allocated."""
    train, data = config.train, build_data(config)
    shapes = list(dict.fromkeys(_at_a_time(source, config) for source in data.sources))
    with warnings.catch_warnings(), FakeTensorMode(), torch.device(choose_device(train.device)):
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        model = build_model(config)
        numbers = model.num_parameters(), sum(parameter.numel() for parameter in model.stack.parameters())
        restrict(model, train)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizers = Optimizers(model, train)
        activations, rows, length = max((_activation_bytes(model, config, *shape), *shape) for shape in shapes)
        work = [3 * model.flops(source.task.length, source.batch_size) for source in data.sources]
        largest = max(range(len(work)), key=work.__getitem__)
        return Plan(
            parameters=numbers[0],
            layers=numbers[1],
            trained=sum(parameter.numel() for parameter in learning),
            parameter_bytes=_bytes(model.parameters()),
            gradient_bytes=_bytes(learning),
            optimizer_bytes=_bytes(optimizers.tensors().values()),
            activation_bytes=activations,
            micro_batch=rows,
            length=length,
            state_bytes=model.state_bytes(data.longest),
            state_length=data.longest,
            tokens=data.sources[largest].tokens,
            flops=work[largest],
            steps=train.steps,
            sizes=sizes(config.model.options),
            **_in_all(data, work, train.steps),
        )


def _at_a_time(source: Source, config: RunConfig) -> tuple[int, int]:
    """The sequences of a source that one process takes at a time, and their tokens."""
    share = math.ceil(source.batch_size / max(config.machine.processes, 1))
    return min(source.micro_batch or share, share), source.task.length


def _in_all(data: Data, work: Sequence[int], steps: int) -> dict[str, int]:
    """The tokens and FLOPs of all steps, from the FLOPs of a step on each source."""
    tokens = [source.tokens for source in data.sources]
    if data.is_curriculum:
        return {"all_tokens": steps * max(tokens), "all_flops": steps * max(work)}
    whole = sum(source.share for source in data.sources)
    shares = [source.share / whole for source in data.sources]
    means = (sum(share * each for share, each in zip(shares, values, strict=True)) for values in (tokens, work))
    return dict(zip(("all_tokens", "all_flops"), (round(steps * mean) for mean in means), strict=True))


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
    tokens, state = torch.zeros(rows, length, dtype=torch.int64), None
    if segment := min(config.train.bptt, length):  # The last whole one has the longest state before it.
        before = (length // segment - 1) * segment
        if before:
            with torch.no_grad(), autocast(tokens.device, config.train.precision):
                state = model(tokens[:, :before])[1]
        tokens = tokens[:, :segment]
    counting = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor)
    with counting, autocast(tokens.device, config.train.precision):
        model.loss(tokens, tokens, state, reduction="sum")
        model.auxiliary_loss()
    if not config.train.activation_checkpointing:
        return saved.total
    stream = rows * tokens.shape[1] * config.model.options.d_model * 4
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
