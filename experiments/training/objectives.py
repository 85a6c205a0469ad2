"""What training makes small: the loss of the task's targets, or how far a model is from its teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.config.schema import TrainConfig
from experiments.config.start import TEACHER
from experiments.tasks.task import IGNORED, Batch
from experiments.training import processes
from experiments.training.carried import Texts
from experiments.training.teacher import model_of
from experiments.util.errors import RunnerError
from seqarch.convert import layer_by_layer, of_logits, of_matrices, of_outputs
from seqarch.layers import detach_state
from seqarch.models import LanguageModel


class Part(NamedTuple):
    """Some rows and tokens of a batch, processed at a time.

    Attributes:
        texts: the state that they go on from.
        tokens, targets, token_mask: ``[B, T]``; the mask may be ``None``.
        goes_on: whether the state after them is wanted.
    """

    texts: Texts
    tokens: Tensor
    targets: Tensor
    token_mask: Tensor | None
    goes_on: bool


class Objective(ABC):
    """What is made small.

    Attributes:
        of_model: whether a pass through the whole model is part of it, with the terms that layers add to a loss.
    """

    of_model: ClassVar[bool] = True

    @abstractmethod
    def count(self, batch: Batch, part: Any = ...) -> int:
        """How many of a batch's tokens, or of a part of it, it is a mean over."""

    @abstractmethod
    def terms(self, model: LanguageModel, part: Part) -> Iterator[tuple[Tensor, Any]]:
        """Its terms, summed over these tokens, each to be differentiated before the next is asked for; and the state
        after them, where it is wanted.
        """


class Targets(Objective):
    """The cross entropy of the task's targets."""

    def count(self, batch: Batch, part: Any = ...) -> int:
        return int((batch.targets[part] != IGNORED).sum())

    def terms(self, model: LanguageModel, part: Part) -> Iterator[tuple[Tensor, Any]]:
        texts = part.texts
        mask = None if part.token_mask is None else texts.laid_out(part.token_mask)
        given = texts.laid_out(part.tokens), texts.laid_out(part.targets), texts.state, texts.cu_seqlens
        options: dict[str, Any] = {"token_mask": mask, "ignore_index": IGNORED, "reduction": "sum"}
        if not part.goes_on:
            yield model.loss(*given, **options), None
        else:
            total, state = model.loss_and_state(*given, **options)
            yield total, detach_state(texts.last(state))


class MixersOfTeacher(Objective):
    """How far mixers are from the teacher's at its inputs, layer by layer; all else gets no gradient."""

    of_model = False

    def __init__(self, teacher: LanguageModel, discrepancy: Any):
        self.teacher, self.discrepancy = teacher, discrepancy

    def count(self, batch: Batch, part: Any = ...) -> int:
        return count_read(batch, part)

    def terms(self, model: LanguageModel, part: Part) -> Iterator[tuple[Tensor, Any]]:
        read = part.tokens.numel() if part.token_mask is None else int(part.token_mask.sum())
        losses = layer_by_layer(self.teacher, model, part.tokens, self.discrepancy, part.token_mask)
        try:
            for loss in losses:
                yield read * loss, None
        except ValueError as error:
            raise RunnerError(f"train.objective: {error}") from error


class LogitsOfTeacher(Targets):
    """How far logits are from the teacher's where there are targets, and a share of the targets' own loss."""

    def __init__(self, teacher: LanguageModel, temperature: float, target_weight: float):
        self.teacher, self.temperature, self.target_weight = teacher, temperature, target_weight

    def terms(self, model: LanguageModel, part: Part) -> Iterator[tuple[Tensor, Any]]:
        counted = part.targets != IGNORED
        with torch.no_grad():
            wanted = _logits(self.teacher, part, counted)
        found = _logits(model, part, counted)
        loss, weight = of_logits(found, wanted, self.temperature), self.target_weight
        if weight:
            targets = part.targets[counted].to(found.device)
            loss = (1 - weight) * loss + weight * F.cross_entropy(found.float(), targets, reduction="sum")
        yield loss, None


def _logits(model: LanguageModel, part: Part, counted: Tensor) -> Tensor:
    """The logits where something is asked, ``[M, vocab_size]``."""
    features, _ = model.features(part.tokens, token_mask=part.token_mask)
    return model.logits(features[counted.to(features.device)])


def count_read(batch: Batch, part: Any = ...) -> int:
    """The number of tokens of a batch, or of a part of it, that are no padding."""
    return int(np.size(batch.tokens[part]) if batch.token_mask is None else batch.token_mask[part].sum())


def make_objective(config: TrainConfig, device: torch.device) -> Objective:
    """The objective of a run, its teacher on the run's device.

    Raises:
        RunnerError: the teacher is damaged or gone, or several processes would share it.
    """
    if config.teacher is None:
        return Targets()
    if processes.count() > 1:
        raise RunnerError(f"train.objective: {config.objective} trains on one process, here are {processes.count()}")
    teacher = model_of(TEACHER, config.teacher, config.teacher_sha256).to(device)
    if config.objective == "logits":
        return LogitsOfTeacher(teacher, config.temperature, config.target_weight)
    return MixersOfTeacher(teacher, {"mixer_outputs": of_outputs, "mixer_matrices": of_matrices}[config.objective])
