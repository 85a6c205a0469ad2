"""The weights of a run's model: which of them learn, what they begin with, and how checkpoints hold them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from experiments.config.build import restrict
from experiments.config.schema import TrainConfig
from experiments.config.start import KEY as START
from experiments.training import processes
from experiments.training.checkpoints import Content, load_named
from experiments.training.teacher import model_of
from experiments.util.errors import RunnerError
from seqarch.convert import carry_over
from seqarch.models import LanguageModel


class Weights:
    """The weights of a model, with the adapters of ``train.lora``; only what ``train.trainable`` names learns beside.

    In a checkpoint ``model`` is the model without adapters that computes the same, which is all that anyone else reads.
    Training resumes from ``lora``: the matrices as they were, and what is added to them.

    Raises:
        RunnerError: only some weights are to learn, on several processes.
    """

    def __init__(self, model: LanguageModel, config: TrainConfig):
        if processes.count() > 1 and not config.trains_all:
            raise RunnerError(f"train.{config.restriction}: such a run has one process, here are {processes.count()}")
        self._model, self._config = model, config
        self._adapters = restrict(model, config)

    @property
    def count(self) -> int:
        """The parameters of the model without adapters."""
        return self._model.num_parameters() - (self._adapters.num_parameters if self._adapters else 0)

    @property
    def trained(self) -> int:
        """The parameters that learn, those of adapters among them."""
        return sum(parameter.numel() for parameter in self._model.parameters() if parameter.requires_grad)

    def content(self) -> Content:
        """What a checkpoint holds of them."""
        if self._adapters is None:
            return {"model": self._model.state_dict()}
        return {"model": self._adapters.merged(), "lora": self._adapters.tensors()}

    def to_fill(self) -> Content:
        """What loading a checkpoint of this run writes into."""
        if self._adapters is None:
            return {"model": self._model.state_dict()}
        return {"model": self._adapters.unchanged(), "lora": self._adapters.tensors()}

    def start(self, say: Callable[[str], None]) -> None:
        """Take the weights that ``train.start_from`` names, if any; adapters stay as they are.

        Args:
            say: gets a line for people on what was converted.
        """
        config = self._config
        if config.start_from is None:
            return
        if config.convert is None:
            content = {"model": self._adapters.plain() if self._adapters else self._model.state_dict()}
            load_named(START, Path(config.start_from), config.start_sha256, content)
            return
        source = model_of(START, config.start_from, config.start_sha256)
        with self._adapters.taken_off() if self._adapters else nullcontext():
            report = carry_over(source, self._model, partial=config.convert == "partial")
        say(f"converted {config.start_from}:\n{report}")
