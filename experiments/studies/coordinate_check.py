"""Coordinate checks: how large what layers give is after some steps, by width, with and without muP.

Yang et al. 2022, "Tensor Programs V" (arXiv 2203.03466), appendix D.1: in a right parametrisation the typical size of
a coordinate, after some steps of training, does not grow with the width. A line of ``records.jsonl`` is one model of
one width, one parametrisation and one seed; what is on record is not measured again.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.studies.records import FILE, read_lines
from experiments.util.environment import code_version
from experiments.util.errors import RunnerError
from experiments.util.files import append_line
from seqarch import LanguageModel, LMConfig
from seqarch.layers import mixer_class
from seqarch.layers.mixer import ChannelMixer, Mixer
from seqarch.models import parameter_groups, parse_pattern

RECORDS = FILE
KINDS = ("standard", "mup")
"""Parametrisations: the library's starts with one rate for all, and ``mup_base_width``."""

BATCH, LENGTH, VOCABULARY, DEPTH = 8, 64, 64, 2
OUTPUTS = "logits"


@dataclass(frozen=True)
class Line:
    """What was measured of one model.

    Attributes:
        model: its pattern.
        kind: of :data:`KINDS`.
        width: of the residual stream.
        base: the narrowest width, whose starts and rates are the same in both parametrisations.
        rate: the learning rate of AdamW.
        sizes: by ``mixer``, ``channel mixer`` and ``logits``, before training and after each step: the mean absolute
            change of what they give, over tokens and channels and layers.
        commit: of the code.
    """

    model: str
    kind: str
    width: int
    base: int
    seed: int
    rate: float
    sizes: dict[str, list[float]]
    commit: str

    @property
    def key(self) -> tuple[Any, ...]:
        return self.model, self.kind, self.width, self.base, self.seed, self.rate, len(self.sizes[OUTPUTS])


def read_records(folder: Path) -> list[Line]:
    """The lines on record; errors as in :func:`experiments.studies.records.read_lines`."""
    return read_lines(folder, Line, "a coordinate check")


def measure(
    models: Iterable[str], widths: Sequence[int], seeds: Iterable[int], steps: int, rate: float, folder: Path
) -> Iterator[tuple[Line, bool]]:
    """Each model at each width in both parametrisations, as a line and whether it is new: new ones are recorded.

    Raises:
        RunnerError: there is no such model of such a width.
    """
    known = {line.key: line for line in read_records(folder)}
    commit, base = str(code_version()[0].get("commit", "unknown")), min(widths)
    wanted = [(case, _checked(configuration(*case, base))) for case in product(models, KINDS, widths)]
    for ((model, kind, width), config), seed in product(wanted, seeds):
        key = (model, kind, width, base, seed, rate, steps + 1)
        if key in known:
            yield known[key], False
            continue
        sizes = coordinate_sizes(config, seed, steps, rate)
        line = Line(model, kind, width, base, seed, rate, sizes, commit)
        append_line(folder / RECORDS, json.dumps(asdict(line)))
        yield line, True


def _checked(config: LMConfig) -> LMConfig:
    """Itself, where there is such a model: nothing is measured before that is known of all."""
    try:
        with torch.device("meta"):
            LanguageModel(config)
    except ValueError as error:
        raise RunnerError(f"{config.pattern!r} of width {config.d_model}: {error}") from error
    return config


def configuration(model: str, kind: str, width: int, base: int) -> LMConfig:
    """Of a pattern at a width: heads keep the size that they have at the base width.

    Raises:
        RunnerError: there is no such model.
    """
    try:
        mixers: dict[str, Any] = {}
        layers = parse_pattern(model)
        for name in {name for layer in layers for name in layer.mixers}:
            at_base: Any = mixer_class(name).Config(d_model=base)
            if hasattr(at_base, "num_heads"):
                mixers[name] = {"num_heads": (at_base.num_heads or at_base.heads) * width // base}
        depth = max(len(layers), DEPTH // len(layers) * len(layers))
        base_width = base if kind == "mup" else None
        return LMConfig(vocab_size=VOCABULARY, d_model=width, pattern=model, depth=depth, mixers=mixers,
                        mup_base_width=base_width)  # fmt: skip
    except ValueError as error:
        raise RunnerError(f"{model!r} of width {width}: {error}") from error


def coordinate_sizes(config: LMConfig, seed: int, steps: int, rate: float) -> dict[str, list[float]]:
    """As :attr:`Line.sizes`, of a model that is trained on one batch of random tokens."""
    torch.manual_seed(seed)
    model = LanguageModel(config)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0, rate))
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    outputs, found = Outputs(model), defaultdict[str, list[float]](list)
    first: dict[str, list[Tensor]] = {}
    for step in range(steps + 1):
        with outputs:
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        with torch.no_grad():
            outputs.tensors[OUTPUTS] = [model(tokens[:, :-1])[0]]
        first = first or outputs.tensors
        for name, own in outputs.tensors.items():
            changes = [float((x - before).abs().mean()) for x, before in zip(own, first[name], strict=True)]
            found[name].append(sum(changes) / len(changes))
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: [round(each, 7) for each in values] for name, values in found.items()}


class Outputs:
    """Keeps what a model's mixers and channel mixers give while it is entered.

    Attributes:
        tensors: of the last pass, by kind, in the order of the layers.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._hooks: list[Any] = []
        self.tensors: dict[str, list[Tensor]] = {}

    def __enter__(self) -> None:
        self.tensors = {}
        for module in self._model.modules():
            for kind, name in ((Mixer, "mixer"), (ChannelMixer, "channel mixer")):
                if isinstance(module, kind):
                    self._hooks.append(module.register_forward_hook(lambda *given, name=name: self._keep(name, given)))

    def _keep(self, name: str, given: tuple[Any, ...]) -> None:
        y = given[-1]
        self.tensors.setdefault(name, []).append((y[0] if isinstance(y, tuple) else y).detach())

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()


def exponents(lines: Iterable[Line]) -> dict[tuple[str, str, str], float]:
    """By model, parametrisation and output: p where, after the last step, changes grow as the width to the power p.

    The slope of a line through the logarithms of the medians over seeds; only where there are three widths.
    """
    sizes: dict[tuple[str, str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        for name, values in line.sizes.items():
            sizes[line.model, line.kind, name][line.width].append(values[-1])
    found = {}
    for key, by_width in sizes.items():
        if len(by_width) > 2:
            medians = [float(np.median(values)) for values in by_width.values()]
            found[key] = float(np.polyfit(np.log2([*by_width]), np.log2(medians), 1)[0])
    return found
