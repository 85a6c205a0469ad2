"""Stack: layers of mixers and channel mixers on a residual stream, for any ``[B, T, D]``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seqarch.layers import ChannelMixer
from seqarch.layers.mixer import CuSeqlens, State, check_features, check_mask
from seqarch.layers.modules.configured import Configured, from_options
from seqarch.models.config import StackConfig
from seqarch.models.one_token import OneToken
from seqarch.models.pattern import LayerPattern, tile_pattern
from seqarch.models.sharing import copies, share, tie
from seqarch.models.stack_layer import INPUT, StackLayer, at, check_exchange, run_layer, within
from seqarch.models.streams import WeightedStreams, first, split
from seqarch.ops.dispatch.checks import show

StackState = tuple[tuple[State, ...], ...]
"""For each layer, the state of each of its mixers."""


def in_turn(
    layers: Sequence[StackLayer],
    x: Tensor,
    state: StackState | None,
    cu_seqlens: CuSeqlens,
    token_mask: Tensor | None = None,
    places: Tensor | None = None,
) -> tuple[Tensor, StackState]:
    """The outputs ``[B, T, D]`` of layers one after another, or ``[1, M, D]`` at some places; the state after them."""
    handed: Mapping[str, Any] = {INPUT: first(x)}
    after = []
    narrow = places is not None and bool(layers) and layers[-1].narrows()
    for i, layer in enumerate(layers):
        before = (None,) * len(layer.mixers) if state is None else state[i]
        asked = places if narrow and i == len(layers) - 1 else None
        x, carried, handed = run_layer(layer, x, before, cu_seqlens, token_mask, asked, handed)
        after.append(carried)
    return x if places is None or narrow else at(places, x), tuple(after)


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


def _parts(own: LayerPattern, layer: StackLayer) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """The mixers and the channel mixer of a layer, with their names and what is said of sharing."""
    yield from zip(own.mixers, layer.mixers, own.sharing, strict=True)
    if layer.channel is not None:
        yield own.channel or "", layer.channel, own.channel_sharing


def _drop_copies(stack: Stack, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Tensors that layers share are in a state dict once."""
    for name in copies(stack, stack.shared):
        state_dict.pop(prefix + name, None)


def _tie(stack: Stack, *_: Any) -> None:
    tie(stack.shared)


def _add_copies(stack: Stack, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """And are read by each layer."""
    unexpected = others[3]
    for name, original in copies(stack, stack.shared).items():
        if prefix + name in state_dict:
            unexpected.append(prefix + name)
        if prefix + original in state_dict:
            state_dict[prefix + name] = state_dict[prefix + original]


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
        layers = tile_pattern(config.pattern, config.depth)
        self.layers = nn.ModuleList(StackLayer(config, layer, number) for number, layer in enumerate(layers))
        self.weighted_streams = None
        if config.residual_streams > 1 and config.stream_output == "weighted":
            self.weighted_streams = WeightedStreams(config.d_model, config.residual_streams, config.norm_eps)
        check_exchange(self._layers())
        occurrences = [each for own, layer in zip(layers, self._layers(), strict=True) for each in _parts(own, layer)]
        self.shared = share([(name or config.channel, module, own) for name, module, own in occurrences])
        tie(self.shared)
        self.register_state_dict_post_hook(_drop_copies)
        self.register_load_state_dict_pre_hook(_add_copies)
        self.register_load_state_dict_post_hook(_tie)
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
        x, after = self._through(layers, split(x, self.config.residual_streams), state, cu_seqlens, token_mask, places)
        return self.joined(x), after

    def _through(
        self,
        layers: list[StackLayer],
        x: Tensor,
        state: StackState | None,
        cu_seqlens: CuSeqlens,
        token_mask: Tensor | None,
        places: Tensor | None,
    ) -> tuple[Tensor, StackState]:
        """The residual stream, or several, after all layers, at some places or all, and the state."""
        # a decoded token takes fewer calls in a compiled program; any other schedule sees every call
        plain = self.schedule is in_turn and cu_seqlens is None and token_mask is None and places is None
        if plain and self.token_programs.serves(x):
            return self.token_programs(layers, x, state)
        if self.schedule is in_turn:
            return in_turn(layers, x, state, cu_seqlens, token_mask, places)
        x, after = self.schedule(layers, x, state, cu_seqlens, token_mask)
        return x if places is None else at(places, x), after

    def joined(self, x: Tensor) -> Tensor:
        """One residual stream ``[B, T, D]`` of those after the last layer."""
        if self.config.residual_streams == 1:
            return x
        if self.weighted_streams is not None:
            return self.weighted_streams(x)
        return x.sum(2) if self.config.stream_output == "sum" else x.mean(2)

    def _apply(self, fn: Any, recurse: bool = True) -> Stack:
        super()._apply(fn, recurse)
        tie(self.shared)  # each module's tensors are converted by themselves, as by to_empty
        return self

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
        return mixers + self._token_flops(length, batch_size)

    def step_flops(self, length: int, batch_size: int = 1) -> int:
        """FLOPs of one more token after ``length`` of them, counted as in :meth:`flops`."""
        mixers = sum(mixer.step_flops(length, batch_size) for mixer in self._mixers())
        return mixers + self._token_flops(1, batch_size)

    def _token_flops(self, length: int, batch_size: int) -> int:
        """Of what is done with each token by itself: channel mixers, and what reads and mixes several streams."""
        channels = sum(channel.flops(length, batch_size) for channel in self.channels().values())
        connections = (each for layer in self._layers() for each in (layer.connection, layer.channel_connection))
        mixing = [each for each in (*connections, self.weighted_streams) if each is not None]
        return channels + sum(each.flops(length * batch_size) for each in mixing)

    def explain_one_token(self) -> list[str]:
        """For each layer, whether one decoded token of it is compiled (:mod:`seqarch.models.one_token`), or why not."""
        return self.token_programs.explain(self._layers())

    def channels(self) -> dict[str, ChannelMixer]:
        """The channel mixers, by ``layer_I``."""
        channels = {f"layer_{i}": layer.channel for i, layer in enumerate(self._layers())}
        return {name: within(channel) for name, channel in channels.items() if channel is not None}
