"""Stack: layers of mixers and channel mixers on a residual stream, for any ``[B, T, D]``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from seqarch.layers import (
    CHANNEL_MIXERS,
    MIXERS,
    ChannelMixer,
    build_channel_mixer,
    build_mixer,
    channel_mixer_class,
    mixer_class,
)
from seqarch.layers.mixer import CuSeqlens, State, check_factors, check_features, check_mask, check_options
from seqarch.layers.modules.configured import Configured, from_options
from seqarch.layers.modules.norms import RMSNorm
from seqarch.models.one_token import OneToken, explain
from seqarch.models.pattern import LayerPattern, tile_pattern
from seqarch.ops.dispatch.checks import show, unknown_name
from seqarch.ops.dispatch.eager import is_plain

StackState = tuple[tuple[State, ...], ...]
"""For each layer, the state of each of its mixers."""


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of layers.

    Attributes:
        d_model: width D of the residual stream.
        pattern: the layers' mixers, in the language of :mod:`seqarch.models.pattern`.
        depth: number of layers; a multiple of the pattern's length.
        channel: channel mixer of the layers for which the pattern names none; ``"none"`` leaves it out.
        mixers: options by mixer name, as ``{"mamba2": {"d_state": 64}}``.
        channels: options by channel mixer name.
        norm_eps: added to the mean square in the norms of the residual stream.
        branch_norm: an RMS norm of each branch, without weights, before branches side by side are summed.
        branch_weights: whether branches side by side are summed with learnt weights, or as they are.
        input_factors: constants by the name of a mixer or channel mixer: its normalised input is multiplied by it.
        output_factors: likewise of its output, before it is added to the residual stream.
        zero_centred_norms: the norms of the residual stream multiply by ``1 + weight``, with weights of 0 at first.
    """

    d_model: int
    pattern: str
    depth: int
    channel: str = "swiglu"
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)
    channels: dict[str, dict[str, Any]] = field(default_factory=dict)
    norm_eps: float = 1e-5
    branch_norm: bool = False
    branch_weights: bool = True
    input_factors: dict[str, float] = field(default_factory=dict)
    output_factors: dict[str, float] = field(default_factory=dict)
    zero_centred_norms: bool = False

    def __post_init__(self):
        check_options(self)
        if self.norm_eps >= 1:
            raise ValueError(f"norm_eps must be a small positive number, got {self.norm_eps}")
        layers = tile_pattern(self.pattern, self.depth)
        for name in (*self.mixers, *(name for layer in layers for name in layer.mixers)):
            mixer_class(name)
        for name in (*self.channels, *(layer.channel or self.channel for layer in layers)):
            if name != "none":
                channel_mixer_class(name)
        known = {*MIXERS, *CHANNEL_MIXERS, self.channel, *(name for layer in layers for name in layer.mixers)}
        for option, factors in (("input_factors", self.input_factors), ("output_factors", self.output_factors)):
            check_factors(option, list(factors.values()), len(factors))
            for name in factors:
                if name not in known | {layer.channel for layer in layers}:
                    raise unknown_name(f"mixer or channel mixer in {option}", name, sorted(known - {"none"}))
        for kind, given in (("mixer", self.mixers), ("channel mixer", self.channels)):
            for name, options in given.items():
                if not isinstance(options, dict):
                    raise ValueError(f"{kind} {name!r}: expected a dict of options, got {show(options)}")
                for option in options:
                    if not isinstance(option, str) or option == "d_model":
                        raise ValueError(f"{kind} {name!r} has no option {option!r} of its own: d_model is the stack's")


class StackLayer(nn.Module):
    """``x + mix(norm(x))``, then ``x + channel(norm(x))``.

    Mixers side by side read the same normalised input; their outputs are summed with one learnt weight per branch
    and channel, ``1 / branches`` at first (after Dong et al. 2024, "Hymba", eq. 3; its norm of each branch is
    ``branch_norm``, here after the branch's output projection).

    Constants of the config's ``input_factors`` and ``output_factors`` are no weights: they do not train and are in no
    state dict. What is not 1 there multiplies what a mixer or channel mixer reads and gives.
    """

    no_weight_decay = ("branch_weights",)

    def __init__(self, config: StackConfig, pattern: LayerPattern):
        super().__init__()
        self.width = width = config.d_model
        norm = (width, config.norm_eps, config.zero_centred_norms)
        self.norm = RMSNorm(*norm)
        self.mixers = nn.ModuleList(
            build_mixer(name, d_model=width, **config.mixers.get(name, {})) for name in pattern.mixers
        )
        self.branches = branches = len(self.mixers)
        weights = torch.full((branches, width), 1 / branches)
        self.branch_weights = nn.Parameter(weights) if branches > 1 and config.branch_weights else None
        normed = config.branch_norm and branches > 1
        self.branch_norm = nn.RMSNorm(width, config.norm_eps, elementwise_affine=False) if normed else nn.Identity()
        channel = pattern.channel or config.channel
        self.channel_norm, self.channel = None, None
        if channel != "none":
            self.channel_norm = RMSNorm(*norm)
            self.channel = build_channel_mixer(channel, d_model=width, **config.channels.get(channel, {}))
        names = (*pattern.mixers, channel)  # of each its factors: of what it reads, and of what it gives
        self.factors = [(config.input_factors.get(n, 1.0), config.output_factors.get(n, 1.0)) for n in names]

    def forward(
        self,
        x: Tensor,
        states: Sequence[State],
        cu_seqlens: CuSeqlens,
        token_mask: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, tuple[State, ...]]:
        """The outputs ``[B, T, D]``, or ``[1, M, D]`` of the tokens at ``places``, and the mixers' states after them.

        Args:
            places: int64 ``[M]``, tokens by their places among all ``B T``, where :meth:`narrows` says so.
        """
        normed = self.norm(x)
        *factors, (read, written) = self.factors
        results = [
            mixer(_times(factor, normed), state, cu_seqlens)
            for mixer, state, (factor, _) in zip(self.mixers, states, factors, strict=True)
        ]
        weights = [None] * self.branches if self.branch_weights is None else self.branch_weights.unbind(0)
        for (y, _), (_, factor), weight in zip(results, factors, weights, strict=True):
            y = _times(factor, self.branch_norm(y))
            x = x + (y if weight is None else weight.to(y.dtype) * y)
        if places is not None:
            x, token_mask = _at(places, x), None
        if self.channel is not None and self.channel_norm is not None:
            y = self.channel(_times(read, self.channel_norm(x)), token_mask)
            x = x + _times(written, y)
        return x, tuple(state for _, state in results)

    def narrows(self) -> bool:
        """Whether the channel mixer need not see tokens that nobody asks for, and nobody watches what it sees.

        One that counts tokens, as a router does, needs to see all.
        """
        after = [each for part in (self.channel_norm, self.channel) if part is not None for each in part.modules()]
        counts = self.channel is not None and getattr(_within(self.channel), "takes_mask", False)
        return not counts and all(is_plain(module) for module in (self, *after))


def _within(module: Any) -> Any:
    """The channel mixer in a module that stands in its place, as adapters of its tensors do; else the module itself."""
    return next((inner for inner in module.modules() if isinstance(inner, ChannelMixer)), module)


def _times(factor: float, x: Tensor) -> Tensor:
    return x if factor == 1 else factor * x


def in_turn(
    layers: Sequence[StackLayer],
    x: Tensor,
    state: StackState | None,
    cu_seqlens: CuSeqlens,
    token_mask: Tensor | None = None,
    places: Tensor | None = None,
) -> tuple[Tensor, StackState]:
    """The outputs ``[B, T, D]`` of layers one after another, or ``[1, M, D]`` at some places; the state after them."""
    after = []
    narrow = places is not None and bool(layers) and layers[-1].narrows()
    for i, layer in enumerate(layers):
        before = (None,) * len(layer.mixers) if state is None else state[i]
        if narrow and i == len(layers) - 1:
            x, carried = layer(x, before, cu_seqlens, token_mask, places)
        else:
            x, carried = layer(x, before, cu_seqlens, token_mask)
        after.append(carried)
    return x if places is None or narrow else _at(places, x), tuple(after)


def _at(places: Tensor, x: Tensor) -> Tensor:
    """``[1, M, ...]``: what ``x [B, T, ...]`` holds at these of its ``B T`` places."""
    return x.flatten(0, 1).index_select(0, places).unsqueeze(0)


def _check_state(state: StackState, layers: Sequence[StackLayer]) -> None:
    """Raise unless the state has an entry for each layer, and that one for each mixer; these check their own."""
    if not isinstance(state, (tuple, list)):
        raise ValueError(f"stack: the state is {type(state).__name__}, expected a tuple of {len(layers)} layers")
    if len(state) != len(layers):
        raise ValueError(f"stack: the state is of {len(state)} layers, expected {len(layers)}")
    for i, (layer, own) in enumerate(zip(layers, state, strict=True)):
        if not isinstance(own, (tuple, list)):
            raise ValueError(
                f"stack: the state of layer {i} is {show(own)}, expected a tuple of {layer.branches} mixers"
            )
        if len(own) != layer.branches:
            raise ValueError(f"stack: the state of layer {i} is of {len(own)} mixers, expected {layer.branches}")


Schedule = Callable[..., tuple[Tensor, StackState]]
"""Runs the layers of a stack, as :func:`in_turn` does; :mod:`seqarch.parallel` has another."""


class Stack(Configured):
    """Layers on a residual stream: ``y, state = stack(x, state, cu_seqlens)`` with ``x, y: [B, T, D]``.

    ``token_mask [B, T]`` is false where a token is padding, which routers then do not count. It hides no token from
    mixers: padding belongs after the tokens of its row, and the state after it has read it. Packed rows need neither.

    Where only some tokens' outputs are wanted, ``places``, int64 ``[M]``, names them by their places among all ``B T``:
    the output is ``[1, M, D]``, the same numbers, and the last channel mixer does no work for the others.

    Each mixer and channel mixer initialises itself; the stack overwrites nothing. The output is not normalised.
    """

    Config = StackConfig

    @from_options
    def __init__(self, config: StackConfig):
        super().__init__()
        if not isinstance(config, StackConfig):
            raise ValueError(f"stack: config is {show(config)}, expected a StackConfig")
        self.config = config
        self.layers = nn.ModuleList(StackLayer(config, layer) for layer in tile_pattern(config.pattern, config.depth))
        self.schedule: Schedule = in_turn
        self.token_programs = OneToken(in_turn)

    def forward(
        self,
        x: Tensor,
        state: StackState | None = None,
        cu_seqlens: CuSeqlens = None,
        token_mask: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, StackState]:
        check_features("stack", x, self.config.d_model)
        layers = self._layers()
        if state is not None:
            _check_state(state, layers)
        if token_mask is not None:
            check_mask("stack", token_mask, x)
        # a decoded token takes fewer calls in a compiled program; any other schedule sees every call
        plain = self.schedule is in_turn and cu_seqlens is None and token_mask is None and places is None
        if plain and self.token_programs.serves(x):
            return self.token_programs(layers, x, state)
        if self.schedule is in_turn:
            return in_turn(layers, x, state, cu_seqlens, token_mask, places)
        x, after = self.schedule(layers, x, state, cu_seqlens, token_mask)
        return x if places is None else _at(places, x), after

    def _layers(self) -> list[StackLayer]:
        return [layer for layer in self.layers if isinstance(layer, StackLayer)]

    def _mixers(self) -> list[Any]:
        return [mixer for layer in self._layers() for mixer in layer.mixers]

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> StackState:
        """The state before the first token, as :meth:`seqarch.layers.Mixer.init_state`."""
        make = (batch_size, max_length, device, dtype)
        return tuple(tuple(mixer.init_state(*make) for mixer in layer.mixers) for layer in self._layers())  # type: ignore[operator]

    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        """Bytes of the state after ``length`` tokens."""
        return sum(mixer.state_bytes(length, batch_size) for mixer in self._mixers())

    def flops(self, length: int, batch_size: int = 1) -> int:
        """FLOPs of the forward pass over ``length`` tokens, counted as in :meth:`seqarch.layers.Mixer.flops`."""
        mixers = sum(mixer.flops(length, batch_size) for mixer in self._mixers())
        return mixers + self._channel_flops(length, batch_size)

    def step_flops(self, length: int, batch_size: int = 1) -> int:
        """FLOPs of one more token after ``length`` of them, counted as in :meth:`flops`."""
        mixers = sum(mixer.step_flops(length, batch_size) for mixer in self._mixers())
        return mixers + self._channel_flops(1, batch_size)

    def _channel_flops(self, length: int, batch_size: int) -> int:
        return sum(channel.flops(length, batch_size) for channel in self.channels().values())

    def explain_one_token(self) -> list[str]:
        """For each layer, whether one decoded token of it is compiled (:mod:`seqarch.models.one_token`), or why not."""
        return explain(self._layers())

    def channels(self) -> dict[str, ChannelMixer]:
        """The channel mixers, by ``layer_I``."""
        channels = {f"layer_{i}": layer.channel for i, layer in enumerate(self._layers())}
        return {name: _within(channel) for name, channel in channels.items() if channel is not None}
