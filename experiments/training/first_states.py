"""States that sequences begin with in training though they follow nothing, so that a model meets more states than
those that its training length leads to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.config.carrying import carries, passes
from experiments.config.schema import RunConfig
from experiments.tasks import Task
from experiments.training import processes
from experiments.training.carried import CarriedStates
from seqarch.layers import state_rows
from seqarch.layers.rows import row_count
from seqarch.models import LanguageModel

Kind = Literal["passed", "noise", "fitted_noise"]


def make_carried(config: RunConfig, task: Task, model: LanguageModel, share: int) -> CarriedStates | None:
    """The states that the rows of this process's share of a batch begin with; ``None`` for the initial one."""
    options, own = config.train, (model, processes.rank() * share, share)
    if options.first_state != "initial":
        return FirstStates(*own, options.first_state, options.first_state_std, config.seed)
    return CarriedStates(*own) if carries(config, task) else None


class FirstStates(CarriedStates):
    """What the sequences of a step begin with, without gradients (Buitrago Ruiz and Gu 2025, section 4.1).

    - ``passed``: what the sequences of the step before ended with, which are others.
    - ``noise``: normal numbers of mean 0 and one standard deviation, as recurrent states.
    - ``fitted_noise``: normal numbers with the mean and the standard deviation that the states had at the end of the
      step before, over all its sequences, by themselves for each head, or channel, of each tensor.

    Mixers whose state grows with every token, or counts no more than so many, begin as ever; with noise also those that
    divide by what they hold (:attr:`seqarch.layers.Mixer.takes_any_state`). So do all in the first step, but with
    ``noise``. Numbers follow from the seed and the step alone: the same in whatever
    micro-batches and on however many processes.
    """

    def __init__(self, model: LanguageModel, first: int, count: int, kind: Kind, std: float, seed: int):
        super().__init__(model, first, count)
        self.kind, self.std, self.seed = kind, std, seed
        self._step, self._given, self._is_made = 0, None, False

    def begin(self, step: int) -> None:
        self._step, self._given, self._is_made = step, None, False

    def rows(self, part: slice) -> Any:
        if not self._is_made:
            self._given, self._is_made = self._made(), True
        return None if self._given is None else state_rows(self._given, range(self._count)[part])

    def keep(self, states: Sequence[Any]) -> None:
        if self.kind != "noise":
            super().keep([self._of_fixed_size(state) for state in states])

    def _of_fixed_size(self, state: Any) -> Any:
        """The state with the initial one of each mixer whose own would grow, or count too far."""
        rows = row_count(state)
        return self._each(lambda mixer, fresh, own: own if passes(mixer) else fresh, rows, state)

    def _made(self) -> Any:
        if self.kind == "passed" or (self.kind == "fitted_noise" and self._state is None):
            return self._state
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._step)

        def drawn(mixer: Any, fresh: Any, last: Any) -> Any:
            if not passes(mixer) or not mixer.takes_any_state:
                return fresh
            return fresh._replace(recurrent=self._drawn(generator, fresh.recurrent, last.recurrent))

        initial = self._model.init_state(self._count, max_length=1)
        return self._each(drawn, self._count, initial if self._state is None else self._state)

    def _drawn(self, generator: torch.Generator, fresh: Tensor, last: Tensor) -> Tensor:
        """Numbers for a recurrent state ``[B, ...]``, this process's rows of those of all."""
        shape = self._count * processes.count(), *fresh.shape[1:]
        numbers = torch.randn(shape, generator=generator)[self._first : self._first + self._count]
        numbers = numbers.to(fresh.device, torch.float64)
        if self.kind == "noise":
            return (self.std * numbers).to(fresh.dtype)
        mean, std = moments(last)
        return (mean + std * numbers).to(fresh.dtype)

    def _each(self, make: Callable[[Any, Any, Any], Any], rows: int, state: Any) -> Any:
        """A state, of each mixer what ``make`` gives for it, its initial state and its own."""
        fresh = self._model.init_state(rows, max_length=1)
        layers = self._model.stack._layers()
        return tuple(
            tuple(make(*each) for each in zip(layer.mixers, new, own, strict=True))
            for layer, new, own in zip(layers, fresh, state, strict=True)
        )


def moments(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over all rows ``[B, H, ...]`` of all processes and over all but ``H``, in float64."""
    wide = tensor.detach().double()
    dims = [dim for dim in range(wide.ndim) if dim != 1]
    count = processes.total(wide.numel() // max(1, wide.shape[1]))
    mean = processes.add(wide.sum(dims, keepdim=True)) / max(1, count)
    squares = processes.add(((wide - mean) ** 2).sum(dims, keepdim=True)) / max(1, count)
    return mean, squares.sqrt()
