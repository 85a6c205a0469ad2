"""What one mixer or channel mixer of a stack weighs: parameters and bytes of state, as functions of its size options.

Both are measured on layers that are built without memory. Between the measured points they are polynomials of degree 2
in each option, which is what state and parameters are; what is chosen by them is built and measured again.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch

from experiments.config.options import REGISTRIES
from experiments.util.errors import ConfigError
from seqarch.layers.mixer import Layer, Mixer, build_config, build_layer

LONG = 2**22
"""A length beyond every window: a state of bounded size has reached its bound."""

NODES = (1, 2, 3)
"""Multiples of an option's given value at which layers are measured."""

_VANDERMONDE = np.linalg.inv(np.vander(NODES, increasing=True))


@dataclass(frozen=True)
class Part:
    """A mixer or channel mixer of a stack.

    Attributes:
        registry: ``mixers`` or ``channels``.
        count: how many of the stack's layers have it; 1 where these differ, and one is all of them together.
        given: its options as the configuration has them.
        occurrences: how many of what is counted as one layer have which options beside those, from the pattern. Sizes
            among them stay.
    """

    registry: str
    name: str
    d_model: int
    count: int
    given: Mapping[str, Any]
    occurrences: tuple[tuple[int, Mapping[str, Any]], ...] = ((1, {}),)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The given value of each size option that has one; of a channel mixer the first alone."""
        return self._sizes(self.given)

    def _sizes(self, options: Mapping[str, Any]) -> dict[str, int]:
        own = [own for _, own in self.occurrences]
        config = self.config({**options, **own[0]} if len(own) == 1 else options)
        free = {option: name for option, name in config.size_options.items() if any(option not in o for o in own)}
        values = {option: getattr(config, name) for option, name in free.items()}
        sizes = {option: value for option, value in values.items() if isinstance(value, int)}
        return sizes if self.registry == "mixers" else dict(list(sizes.items())[:1])

    def config(self, options: Mapping[str, Any]) -> Any:
        """The config of these options.

        Raises:
            ValueError: the layer does not take them.
        """
        layer = REGISTRIES[self.registry][self.name]
        return build_config(self.registry.rstrip("s"), self.name, layer.Config, {"d_model": self.d_model, **options})

    def measured(self, options: Mapping[str, Any], length: int) -> tuple[int, int]:
        """Bytes of the state after ``length`` tokens, 0 for a channel mixer, and parameters, of one of its ``count``.

        Raises:
            ValueError: the layer does not take the options.
        """
        state, parameters = 0, 0
        for count, own in self.occurrences:
            given = json.dumps({"d_model": self.d_model, **options, **own}, sort_keys=True)
            one = _measured(self.registry, self.name, given, length)
            state, parameters = state + count * one[0], parameters + count * one[1]
        return state, parameters

    @property
    def grows(self) -> bool:
        """Whether the state grows with the sequence without end."""
        return self.measured(self.given, LONG)[0] != self.measured(self.given, 2 * LONG)[0]

    @cached_property
    def steps(self) -> list[int]:
        """For each size option, the least divisor of its given value of which the layer takes the multiples."""
        return [
            next(step for step in range(1, value + 1) if value % step == 0 and self._takes(option, step))
            for option, value in self.sizes.items()
        ]

    def _takes(self, option: str, step: int) -> bool:
        try:
            for multiple, (_, own) in itertools.product(NODES, self.occurrences):
                self.config({**self.given, **self.sizes, option: step * multiple, **own})
        except ValueError:
            return step == self.sizes[option]
        return True

    @cached_property
    def polynomials(self) -> tuple[np.ndarray, np.ndarray]:
        """The coefficients of state and parameters in the options over their given values, ``[3, ..., 3]`` each.

        Raises:
            ConfigError: the layer does not take multiples of its options.
        """
        shape = (len(NODES),) * len(self.sizes)
        values = np.empty((2, *shape))
        for index in itertools.product(range(len(NODES)), repeat=len(self.sizes)):
            chosen = {name: value * NODES[i] for (name, value), i in zip(self.sizes.items(), index, strict=True)}
            try:
                values[(slice(None), *index)] = self.measured({**self.given, **chosen}, LONG)
            except ValueError as error:
                raise ConfigError(f"match: the sizes of {self.name} cannot be solved for: {error}") from error
        for axis in range(1, values.ndim):
            values = np.moveaxis(np.tensordot(_VANDERMONDE, values, (1, axis)), 0, axis)
        return values[0], values[1]

    def options(self, chosen: Mapping[str, int]) -> dict[str, Any]:
        """The given options with these sizes; those that follow from the others are left out."""
        options = {**self.given, **chosen}
        for name in chosen:
            fewer = {option: value for option, value in options.items() if option != name}
            if name not in self.given and self._gives(fewer, chosen):
                options = fewer
        return options

    def _gives(self, options: Mapping[str, Any], sizes: Mapping[str, int]) -> bool:
        try:
            return self._sizes(options) == sizes
        except ValueError:
            return False


@cache
def _measured(registry: str, name: str, options: str, length: int) -> tuple[int, int]:
    with torch.device("meta"):
        layer: Layer = build_layer(registry.rstrip("s"), name, REGISTRIES[registry][name], json.loads(options))
    state = layer.state_bytes(length) if isinstance(layer, Mixer) else 0
    return state, sum(parameter.numel() for parameter in layer.parameters())


def powers(values: np.ndarray) -> np.ndarray:
    """``[N, 3]``: 1, x and x^2."""
    return np.stack([values**power for power in range(len(NODES))], axis=1)


def evaluated(polynomial: np.ndarray, points: Sequence[np.ndarray]) -> np.ndarray:
    """A polynomial at points ``[N]``, a column of values for each of its variables."""
    result = np.broadcast_to(polynomial, (len(points[0]), *polynomial.shape))
    for values in points:
        result = np.einsum("np,np...->n...", powers(values), result)
    return result


def root(coefficients: np.ndarray, target: np.ndarray | float) -> np.ndarray:
    """Where ``a + b x + c x^2``, rows of ``[N, 3]`` with b and c at least 0, is the target; at least 0."""
    constant, slope, curve = coefficients.T
    lacking = np.maximum(target - constant, 0.0)
    discriminant = np.sqrt(np.maximum(slope**2 + 4 * curve * lacking, 0.0))
    return 2 * lacking / np.maximum(slope + discriminant, 1e-12)
