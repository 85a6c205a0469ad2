"""Widths that give a run's model the parameters and the state that its ``match`` asks for.

The size options of the mixers and channel mixers in the pattern are solved for (``size_options`` of their configs); the
width of the stack, its depth and all else stay. Of all that come within the tolerance the one nearest to the given
configuration is taken: the least sum of the way in octaves (the root of the sum of squares over all options), one for
each option of a mixer that is changed, and the errors as shares of the tolerance. With several mixers of a bounded
state each is brought to the same multiple of its given state; what grows, as attention's cache, stays.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from experiments.config.part_sizes import LONG, Part, evaluated, powers, root
from experiments.config.targets import MatchConfig
from experiments.util.errors import ConfigError
from seqarch.models import LanguageModel, LMConfig
from seqarch.models.pattern import tile_pattern

DENSE, RATIO, MOST_STEPS = 48, 1.05, 2**13
"""Values of an option that are tried: all multiples of its step up to ``DENSE`` of them, then at this ratio."""

KEPT = 64
"""Candidates of each mixer that are combined, where there are several mixers."""

CLOSE = 0.1
"""Of the tolerance: channel mixers whose given sizes bring the parameters so near stay as they are."""

TRIED = 32
"""Combinations that are built and measured before none is found."""


@dataclass(frozen=True)
class Candidates:
    """Sizes of one mixer, a row each.

    Attributes:
        values: ``[N, options]``.
        state, parameters: of one layer, ``[N]``.
    """

    part: Part
    values: np.ndarray
    state: np.ndarray
    parameters: np.ndarray

    @property
    def octaves(self) -> np.ndarray:
        """The sum over the options of the squared way from the given value, in octaves."""
        return (np.log2(self.values / _given(self.part)) ** 2).sum(1)

    @property
    def changed(self) -> np.ndarray:
        """How many options are not as given."""
        return (self.values != _given(self.part)).sum(1)

    def sizes(self, row: int) -> dict[str, int]:
        return {name: int(value) for name, value in zip(self.part.sizes, self.values[row], strict=True)}


@dataclass(frozen=True)
class Goal:
    """What is wanted, as far as it is: by name, ``state`` (bytes) and ``parameters``."""

    wanted: Mapping[str, int]
    tolerance: float

    def errors(self, totals: Mapping[str, Any]) -> list[Any]:
        """How far totals are from what is wanted, in tolerances and by logarithms; numbers or arrays ``[N]``."""
        allowed = math.log1p(self.tolerance) * (1 + 1e-9)
        return [np.abs(np.log(np.maximum(totals[name], 1) / number)) / allowed for name, number in self.wanted.items()]


class NothingClose(ConfigError):
    """No sizes bring what is wanted; ``totals`` has what the closest bring, ``None`` where none could be tried."""

    def __init__(self, message: str, totals: Mapping[str, int] | None = None):
        super().__init__(message)
        self.totals = totals


def sizes(options: LMConfig) -> dict[str, dict[str, int]]:
    """The size options of each mixer and channel mixer of a language model, and what they come to."""
    return {part.name: part.sizes for parts in _parts(options) for part in parts if part.sizes}


def shown(sizes: Mapping[str, int]) -> str:
    """``d_state=12, d_inner=64``."""
    return ", ".join(f"{name}={value}" for name, value in sizes.items())


def matched(options: LMConfig, match: MatchConfig, length: int) -> LMConfig:
    """The options of the language model with the sizes that ``match`` asks for.

    Args:
        length: the task's training length, at which the state is measured where ``match`` says nothing else.

    Raises:
        NothingClose: none are found within the tolerance, or the state grows with the sequence.
    """
    asked = {"state": match.wanted_state, "parameters": match.wanted_parameters}
    wanted = {name: number for name, number in asked.items() if number is not None}
    if not wanted:
        return options
    return _Search(options, match, Goal(wanted, match.share), match.state_length or length).result()


class _Search:
    """One search: the mixers and channel mixers that are free, and what all the rest has."""

    def __init__(self, options: LMConfig, match: MatchConfig, goal: Goal, length: int):
        self.options, self.match, self.goal, self.length = options, match, goal, length
        if "parameters" in goal.wanted and any(
            own
            for layer in tile_pattern(options.pattern, options.depth)
            for own in (*layer.sharing, layer.channel_sharing)
        ):
            raise NothingClose("match.parameters: layers share parameters (share), whose sizes are not solved for")
        mixers, channels = _parts(options)
        self.channels = [part for part in channels if part.sizes and "parameters" in goal.wanted]
        # a mixer is sized by its state; by its parameters only where nothing else can bring them
        self.by = "state" if "state" in goal.wanted else "parameters"
        self.mixers = [part for part in mixers if part.sizes and (self.by == "state" or not self.channels)]
        if self.by == "state":
            self.mixers = [part for part in self.mixers if not part.grows]
            if not self.mixers:
                raise _no_bounded_state(mixers)
        self.fixed = self._given()
        for part in (*self.mixers, *self.channels):
            for name, number in zip(("state", "parameters"), part.measured(part.given, length), strict=True):
                self.fixed[name] -= part.count * number

    def _given(self) -> dict[str, int]:
        with torch.device("meta"):
            model = LanguageModel(self.options)
        counted = model if self.match.count == "all" else model.stack
        parameters = sum(parameter.numel() for parameter in counted.parameters())
        return {"state": model.state_bytes(self.length), "parameters": parameters}

    def result(self) -> LMConfig:
        closest: tuple[float, dict[str, int], list[str]] | None = None
        for sizes in self._combinations():
            try:
                totals, chosen = self._measured(sizes)
            except ValueError:
                continue
            error = float(max(self.goal.errors(totals)))
            if error <= 1:
                return _with(self.options, chosen)
            if closest is None or error < closest[0]:
                closest = error, totals, [f"{part.name} with {shown(own)}" for part, own in chosen]
        raise self._nothing_close(closest)

    def _combinations(self) -> Iterator[list[dict[str, int]]]:
        """Sizes of the free mixers: first what is within the tolerance, nearest first; then what is closest to it."""
        found = [self._candidates(part) for part in self.mixers]
        index = [each.ravel() for each in np.indices([len(each.state) for each in found])] if found else []
        rows = len(index[0]) if found else 1
        totals = {name: np.full(rows, float(number)) for name, number in self.fixed.items()}
        octaves, changed = np.zeros(rows), np.zeros(rows)
        for each, own in zip(found, index, strict=True):
            totals["state"] += each.part.count * each.state[own]
            totals["parameters"] += each.part.count * each.parameters[own]
            octaves += each.octaves[own]
            changed += each.changed[own]
        for part, hidden in self._channel_sizes(totals["parameters"]):
            ratio = hidden / _given(part)
            totals["parameters"] = totals["parameters"] + part.count * evaluated(part.polynomials[1], [ratio])
            octaves += np.log2(ratio) ** 2
        errors = self.goal.errors(totals)
        # rounded, so that equals are equal on every machine: the smaller sizes come first
        cost = np.round(np.sqrt(octaves) + changed + np.sum(errors, axis=0), 6)
        for row in np.lexsort((cost, np.maximum(np.round(np.max(errors, axis=0), 6), 1)))[:TRIED]:
            yield [each.sizes(own[row]) for each, own in zip(found, index, strict=True)]

    def _candidates(self, part: Part) -> Candidates:
        """The given sizes, and for each option the values that serve the target best beside any of the others."""
        place = ("state", "parameters").index(self.by)
        # every mixer to the same multiple of what it has
        whole = sum(each.count * each.measured(each.given, LONG)[place] for each in self.mixers)
        target = (self.goal.wanted[self.by] - self.fixed[self.by]) * part.measured(part.given, LONG)[place] / whole
        given, own = _given(part), part.polynomials[place]
        found = [(given[None], evaluated(own, list(np.ones((len(given), 1)))))]
        for last in range(len(given)):
            found += _solutions(part, last, own, target)
        values, served = (np.concatenate(columns) for columns in zip(*found, strict=True))
        distance = self._distance(served, target)
        near = distance <= 2
        near[np.argpartition(distance, min(KEPT, len(distance) - 1))[:KEPT]] = True
        candidates = np.unique(values[near], axis=0)
        state, parameters = (evaluated(each, list((candidates / given).T)) for each in part.polynomials)
        every = Candidates(part, candidates, state, parameters)
        if len(self.mixers) == 1:
            return every
        cost = np.sqrt(every.octaves) + every.changed + self._distance((state, parameters)[place], target)
        best = np.argsort(cost, kind="stable")[:KEPT]
        return Candidates(part, candidates[best], state[best], parameters[best])

    def _distance(self, served: np.ndarray, target: float) -> np.ndarray:
        return Goal({self.by: max(round(target), 1)}, self.goal.tolerance).errors({self.by: served})[0]

    def _channel_sizes(self, parameters: Any) -> list[tuple[Part, Any]]:
        """Each free channel mixer and its size beside so many other parameters ``[N]``.

        All come to one multiple of the given sizes, which stay where they bring almost what is wanted.
        """
        if not self.channels:
            return []
        joined = np.atleast_2d(np.sum([part.count * part.polynomials[1] for part in self.channels], axis=0))
        wanted = self.goal.wanted["parameters"]
        ratio = root(joined, wanted - parameters)
        error = Goal({"parameters": wanted}, self.goal.tolerance).errors({"parameters": parameters + joined.sum()})[0]
        ratio = np.where(error <= CLOSE, 1.0, ratio)
        return [(part, np.maximum(1, np.rint(ratio * _given(part)))) for part in self.channels]

    def _measured(self, sizes: Sequence[dict[str, int]]) -> tuple[dict[str, int], list[tuple[Part, dict[str, int]]]]:
        """State and parameters of a model whose free mixers have these sizes, and the sizes of all that is free.

        Raises:
            ValueError: a layer does not take them.
        """
        totals, chosen = dict(self.fixed), list(zip(self.mixers, sizes, strict=True))
        self._add(totals, chosen)
        hidden = self._channel_sizes(np.array([float(totals["parameters"])]))
        channels = [(part, {name: int(values[0]) for name in part.sizes}) for part, values in hidden]
        self._add(totals, channels)
        return totals, [*chosen, *channels]

    def _add(self, totals: dict[str, int], chosen: Sequence[tuple[Part, dict[str, int]]]) -> None:
        for part, sizes in chosen:
            state, parameters = part.measured(part.options(sizes), self.length)
            totals["state"] += part.count * state
            totals["parameters"] += part.count * parameters

    def _nothing_close(self, closest: tuple[float, dict[str, int], list[str]] | None) -> NothingClose:
        free = ", ".join(dict.fromkeys(part.name for part in (*self.mixers, *self.channels))) or "this model"
        asked, found = self._told(self.goal.wanted), "none could be built"
        if closest is not None:
            found = f"the closest is {'; '.join(closest[2]) or 'as given'}: {self._told(closest[1])}"
        return NothingClose(
            f"match: no sizes of {free} come within {100 * self.match.share:g}% of {asked}; {found}. Ask for other"
            " numbers, a larger match.tolerance or another model.d_model, or set one of them to null",
            closest[1] if closest else None,
        )

    def _told(self, totals: Mapping[str, int]) -> str:
        """What totals have of that which is wanted, in words."""
        parameters = f"{totals.get('parameters', 0):,} parameters" + " in the layers" * (self.match.count == "layers")
        state, unit = totals.get("state", 0), "bytes"
        if state >= 1024:
            state, unit = state / 1024, "KiB"
        words = {"state": f"{state:.4g} {unit} of state after {self.length} tokens", "parameters": parameters}
        return " and ".join(words[name] for name in self.goal.wanted)


def _parts(options: LMConfig) -> tuple[list[Part], list[Part]]:
    """The mixers and the channel mixers of a stack, each with how many layers have it."""
    layers = tile_pattern(options.pattern, options.depth)
    mixers = [each for layer in layers for each in zip(layer.mixers, layer.options, strict=True)]
    channels = [(options.channel_of(layer), layer.channel_options) for layer in layers]
    return (
        _of_each("mixers", options, mixers),
        _of_each("channels", options, [each for each in channels if each[0] != "none"]),
    )


def _of_each(registry: str, options: LMConfig, used: list[tuple[str, dict[str, Any]]]) -> list[Part]:
    """A part for each name, of all layers that have it with whichever options of their own."""
    parts = []
    for name in dict.fromkeys(name for name, _ in used):
        texts = Counter(json.dumps(own, sort_keys=True) for used_name, own in used if used_name == name)
        occurrences = tuple((count, json.loads(text)) for text, count in texts.items())
        count = 1
        if len(occurrences) == 1:
            count, occurrences = occurrences[0][0], ((1, occurrences[0][1]),)
        given = getattr(options, registry).get(name, {})
        parts.append(Part(registry, name, options.d_model, count, given, occurrences))
    return parts


def _given(part: Part) -> np.ndarray:
    return np.array(list(part.sizes.values()), dtype=float)


def _solutions(part: Part, last: int, polynomial: np.ndarray, target: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Sizes ``[N, options]`` in which one option brings the target beside a grid of the others, and what they have.

    The option is rounded down and up.
    """
    given, steps = _given(part), part.steps
    others = [axis for axis in range(len(given)) if axis != last]
    grids = [_grid(steps[axis], given[axis]) for axis in others]
    left = polynomial.transpose(*others, last)
    for place, (axis, grid) in enumerate(zip(others, grids, strict=True)):
        left = np.moveaxis(np.tensordot(powers(grid / given[axis]), left, (1, place)), 0, place)
    left = left.reshape(-1, left.shape[-1])
    mesh = np.meshgrid(*grids, indexing="ij")
    columns = {axis: values.ravel() for axis, values in zip(others, mesh, strict=True)}
    exact = root(left, target) * given[last] / steps[last]
    found = []
    for rounded in (np.floor(exact), np.ceil(exact)):
        columns[last] = np.maximum(rounded, 1) * steps[last]
        served = (left * powers(columns[last] / given[last])).sum(1)
        found.append((np.stack([columns[axis] for axis in range(len(given))], axis=1), served))
    return found


def _grid(step: int, given: float) -> np.ndarray:
    """Multiples of a step, the given value among them."""
    sparse = DENSE * RATIO ** np.arange(1, math.log(MOST_STEPS / DENSE, RATIO))
    multiples = np.concatenate([np.arange(1, DENSE + 1), np.rint(sparse), [round(given / step)]])
    return np.unique(multiples) * step


def _with(options: LMConfig, chosen: Sequence[tuple[Part, dict[str, int]]]) -> LMConfig:
    given = {"mixers": dict(options.mixers), "channels": dict(options.channels)}
    for part, sizes in chosen:
        if own := part.options(sizes):
            given[part.registry][part.name] = own
    return replace(options, **given)


def _no_bounded_state(mixers: Sequence[Part]) -> NothingClose:
    growing = [part.name for part in mixers if part.grows]
    if not growing:
        names = " and ".join(part.name for part in mixers)
        return NothingClose(
            f"match.state_bytes: the state of {names} has no size_options in its config; set match.state_bytes=null"
        )
    return NothingClose(
        f"match.state_bytes: the state of {' and '.join(growing)} grows with the sequence, so no size of it holds at"
        " every length. Set match.state_bytes=null for this model, or give it a state that is bounded: a window"
        " (sliding_window) or layers of a recurrent mixer. num_kv_heads and mla make smaller what it keeps of a token"
    )
