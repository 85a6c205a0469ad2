"""The cases that are held to the laws: a layer with its options, on one backend of one operation that it uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seqarch import ops
from seqarch.layers import ChannelMixer, Layer, Mixer
from seqarch.layers.mixer import build_layer
from seqarch.ops import OPS, Call

D_MODEL = 32
"""The width D at which layers are tried: large enough for heads, small enough for laws that take seconds."""


@dataclass(frozen=True)
class Case:
    """A layer with options, one of whose operations (``""`` if it uses none) is computed by ``backend``.

    Attributes:
        layer: a mixer's or a channel mixer's class.
        op, backend: the operation, and what computes it; all others are computed by their default.
        options: of the layer's ``Config``, without ``d_model``.
        d_model: D.
    """

    layer: type[Layer]
    op: str
    backend: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    d_model: int = D_MODEL

    @property
    def setting(self) -> str:
        """The options, the operation and its backend."""
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"({options})-{self.op}-{self.backend}"

    def __str__(self) -> str:
        return f"{self.layer.__name__}{self.setting}"

    def build(self, dtype: torch.dtype = torch.float64) -> Any:
        """The layer, with the same initial values at every call."""
        return _build(self.layer, self.options, self.d_model).to(dtype)

    def inputs(self, length: int, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
        """Normally distributed ``[batch, length, d_model]``."""
        return inputs(length, batch, dtype, seed, self.d_model)

    def active(self) -> AbstractContextManager[None]:
        """The case's backend for its operation, the default for others."""
        return ops.use_backends(**({self.op: self.backend} if self.op else {}))


def mixer_cases(
    mixer: type[Mixer], *, d_model: int = D_MODEL, options: Iterable[Mapping[str, Any]] = ({},)
) -> list[Case]:
    """A mixer under each of the options, on each backend of each operation that it uses: for ``parametrize``.

    The backends are those that run on a CPU of this machine, where the laws' tensors are.

    Raises:
        ValueError: it is no subclass of Mixer, has no such option, or ``options`` is no sequence of mappings.
    """
    return list(_cases(Mixer, mixer, d_model, options))


def channel_mixer_cases(
    channel: type[ChannelMixer], *, d_model: int = D_MODEL, options: Iterable[Mapping[str, Any]] = ({},)
) -> list[Case]:
    """As :func:`mixer_cases`, of a channel mixer."""
    return list(_cases(ChannelMixer, channel, d_model, options))


def _cases(kind: type[Layer], layer: Any, d_model: int, options: Iterable[Mapping[str, Any]]) -> Iterator[Case]:
    if not isinstance(layer, type) or not issubclass(layer, kind) or layer is kind:
        raise ValueError(f"expected a subclass of {kind.__name__}, the class itself, got {layer!r}")
    options = tuple(options)
    if not options:
        raise ValueError("options: expected at least one mapping, as [{}] for the defaults, got none")
    for chosen in options:
        if not isinstance(chosen, Mapping):
            raise ValueError(f"options: expected mappings, one for each setting to try, got {chosen!r}")
        with ops.record_calls() as calls, torch.no_grad():
            _build(layer, chosen, d_model)(inputs(40, dtype=torch.float32, d_model=d_model))
        used = dict.fromkeys(call.op for call in calls)
        if not used:
            yield Case(layer, "", "", chosen, d_model)
        for op in used:
            own = [call for call in calls if call.op == op]
            for backend in OPS[op].backends:
                if all(_serves(backend, call) for call in own):
                    yield Case(layer, op, backend, chosen, d_model)


def inputs(
    length: int, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 1, d_model: int = D_MODEL
) -> Tensor:
    """Normally distributed ``[batch, length, d_model]``, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, d_model, generator=generator, dtype=torch.float64).to(dtype)


def reference_backends() -> AbstractContextManager[None]:
    """Within it, every operation is computed by its reference."""
    return ops.use_backends(**{name: op.reference for name, op in OPS.items()})


def _build(layer: type[Layer], options: Mapping[str, Any], d_model: int) -> Any:
    kind = "mixer" if issubclass(layer, Mixer) else "channel mixer"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_layer(kind, layer.__name__, layer, {"d_model": d_model, **options})


def _serves(backend: str, call: Call) -> bool:
    return OPS[call.op].backends[backend].unsupported(call.inputs) is None
