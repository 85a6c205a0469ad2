"""One layer of a stack: mixers side by side on the residual stream, then a channel mixer, with their norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seqarch.layers import ChannelMixer, build_channel_mixer, build_mixer
from seqarch.layers.mixer import CuSeqlens, State
from seqarch.layers.modules.norms import build_norm
from seqarch.models.config import StackConfig
from seqarch.models.pattern import LayerPattern
from seqarch.models.streams import CONNECTIONS, Streams, added
from seqarch.ops.dispatch.eager import is_plain

INPUT = "input"
"""The name by which mixers take what the stack was given."""


class StackLayer(nn.Module):
    """``x + mix(norm(x))``, then ``x + channel(norm(x))``; or with the norms elsewhere, as ``norm_placement`` says, or
    both on the same x, as ``parallel`` does.

    Mixers side by side read the same input; their outputs are summed with one learnt weight per branch
    and channel, ``1 / branches`` at first (after Dong et al. 2024, "Hymba", eq. 3; its norm of each branch is
    ``branch_norm``, here after the branch's output projection). Of norms of what is added there is one a mixer.

    Constants of the config's ``input_factors``, ``output_factors`` and ``residual_factors`` are no weights: they do not
    train and are in no state dict. What is not 1 there multiplies what a mixer or channel mixer reads and gives, and
    the residual stream that this is added to.
    """

    no_weight_decay = ("branch_weights",)
    exchanges = False
    """Whether a mixer takes something of an earlier layer, or gives something to later ones."""

    def __init__(self, config: StackConfig, pattern: LayerPattern, number: int = 0):
        super().__init__()
        self.width = width = config.d_model
        channel = config.channel_of(pattern)
        self.placement, self.channel_placement = config.placements_of(pattern)
        self.norm = _norm(config, self.placement.reads or self.placement.sums)
        self.mixers = nn.ModuleList(
            build_mixer(name, d_model=width, **config.options_of(name, own))
            for name, own in zip(pattern.mixers, pattern.options, strict=True)
        )
        self.exchanges = any(mixer.takes or mixer.gives for mixer in self.mixers)  # type: ignore[union-attr]
        self.branches = branches = len(self.mixers)
        weights = torch.full((branches, width), 1 / branches)
        self.branch_weights = nn.Parameter(weights) if branches > 1 and config.branch_weights else None
        normed = config.branch_norm and branches > 1
        self.branch_norm = nn.RMSNorm(width, config.norm_eps, elementwise_affine=False) if normed else nn.Identity()
        norms = [_norm(config, self.placement.writes) for _ in pattern.mixers]
        self.post_norms = nn.ModuleList(norms) if self.placement.writes else None
        self.channel_norm, self.channel, self.channel_post_norm = None, None, None
        self.parallel = config.parallel if channel != "none" else "none"
        if channel != "none":
            place = self.channel_placement
            self.channel_norm = _norm(config, (place.reads or place.sums) and config.parallel != "one_norm")
            options = {**config.channels.get(channel, {}), **pattern.channel_options}
            self.channel = build_channel_mixer(channel, d_model=width, **options)
            self.channel_post_norm = _norm(config, True) if place.writes else None
        self.connection, self.channel_connection = None, None
        if config.residual_streams > 1:
            connection, many = CONNECTIONS[config.stream_mixing], config.residual_streams
            of_all = (width, many, config.norm_eps)
            self.connection = connection(*of_all, 2 * number, config.sinkhorn_steps)
            if channel != "none" and self.parallel == "none":
                self.channel_connection = connection(*of_all, 2 * number + 1, config.sinkhorn_steps)
        names = (*pattern.mixers, channel)  # of each its factors: of what it reads, and of what it gives
        self.factors = [(config.input_factors.get(n, 1.0), config.output_factors.get(n, 1.0)) for n in names]
        self.residual_factors = [config.residual_factors.get(n, 1.0) for n in (pattern.mixers[0], channel)]

    def forward(
        self,
        x: Tensor,
        states: Sequence[State],
        cu_seqlens: CuSeqlens,
        token_mask: Tensor | None = None,
        places: Tensor | None = None,
        handed: Mapping[str, Any] | None = None,
    ) -> Any:
        """The outputs ``[B, T, D]``, or ``[1, M, D]`` of the tokens at ``places``, and the mixers' states after them.

        Args:
            places: int64 ``[M]``, tokens by their places among all ``B T``, where :meth:`narrows` says so.
            handed: by name what earlier layers gave, of a layer that ``exchanges``; it then returns as a third what
                later layers are handed.
        """
        x, streams = self._read(self.connection, x)
        read = self.norm(x) if self.placement.reads else x
        exchanged = () if handed is None else (handed,)
        results = [
            mixer(_times(factor, read), state, cu_seqlens, *exchanged)
            for mixer, state, (factor, _) in zip(self.mixers, states, self.factors[:-1], strict=True)
        ]
        y = self._after_mixers(x, streams, read, self._branches([y for y, *_ in results]), token_mask, places)
        after = tuple(state for _, state, *_ in results)
        if handed is None:
            return y, after
        return y, after, {**handed, **{name: each for *_, given in results for name, each in given.items()}}

    def mixer_input(self, x: Tensor) -> Tensor:
        """What the mixers read of the residual stream ``[B, T, D]``, or of several."""
        x, _ = self._read(self.connection, x)
        return self.norm(x) if self.placement.reads else x

    def mixed(self, read: Tensor) -> Tensor:
        """What is added to the residual stream for mixers that read this from its first token on, ``[B, T, D]``."""
        pairs = zip(self.mixers, self.factors[:-1], strict=True)
        branches = self._branches([mixer(_times(factor, read))[0] for mixer, (factor, _) in pairs])
        return torch.stack(branches).sum(0) if len(branches) > 1 else branches[0]

    @staticmethod
    def _read(connection: nn.Module | None, x: Tensor) -> tuple[Tensor, Streams | None]:
        """What a branch reads of the residual stream, and of several what it is added to."""
        return (x, None) if connection is None else connection(x)

    def _after_mixers(
        self,
        x: Tensor,
        streams: Streams | None,
        read: Tensor,
        branches: list[Tensor],
        token_mask: Tensor | None,
        places: Tensor | None,
    ) -> Tensor:
        """The residual stream after the layer, of what its mixers read and what is added for them."""
        kept = read if self.placement.keeps else x
        if self.parallel == "none":
            x = self._sum(kept, streams, branches)
            if places is not None:
                x, token_mask = at(places, x), None
            return self._mix_channels(x, token_mask)
        read = read if self.parallel == "one_norm" else x
        if places is not None:
            kept, read, *branches = (at(places, each) for each in (kept, read, *branches))
            streams = None if streams is None else (at(places, streams[0]), at(places, streams[1]))
            token_mask = None
        assert self.channel_norm is not None
        return self._sum(kept, streams, [*branches, self._channel_branch(self.channel_norm(read), token_mask)])

    def _sum(self, kept: Tensor, streams: Streams | None, branches: list[Tensor]) -> Tensor:
        """The residual stream, or several, after branches were added."""
        if streams is not None:
            return added(streams, branches)
        x = _times(self.residual_factors[0], kept)
        for y in branches:
            x = x + y
        return self.norm(x) if self.placement.sums else x

    def _branches(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """What is added to the residual stream for the outputs of the mixers."""
        outputs = [self.branch_norm(y) for y in outputs]
        if self.post_norms is not None:
            outputs = [norm(y) for norm, y in zip(self.post_norms, outputs, strict=True)]
        branches = [_times(factor, y) for y, (_, factor) in zip(outputs, self.factors[:-1], strict=True)]
        weights = None if self.branch_weights is None else self.branch_weights.unbind(0)
        return branches if weights is None else [w.to(y.dtype) * y for w, y in zip(weights, branches, strict=True)]

    def _mix_channels(self, x: Tensor, token_mask: Tensor | None) -> Tensor:
        """The residual stream ``[B, T, D]`` after the channel mixer."""
        if self.channel is None or self.channel_norm is None:
            return x
        place = self.channel_placement
        x, streams = self._read(self.channel_connection, x)
        read = self.channel_norm(x) if place.reads else x
        y = self._channel_branch(read, token_mask)
        if streams is not None:
            return added(streams, [y])
        x = _times(self.residual_factors[1], read if place.keeps else x) + y
        return self.channel_norm(x) if place.sums else x

    def _channel_branch(self, read: Tensor, token_mask: Tensor | None) -> Tensor:
        """What is added to the residual stream for the channel mixer, of what it reads."""
        assert self.channel is not None
        factor, written = self.factors[-1]
        y = self.channel(_times(factor, read), token_mask)
        return _times(written, y if self.channel_post_norm is None else self.channel_post_norm(y))

    def example(self) -> Tensor:
        """A residual stream, or several, of one token: zeros."""
        some, connection = next(self.parameters()), self.connection
        streams = () if connection is None else (connection.streams,)
        return some.new_zeros(1, 1, *streams, self.width)

    def narrows(self) -> bool:
        """Whether the channel mixer need not see tokens that nobody asks for, and nobody watches what it sees.

        One that counts tokens, as a router does, needs to see all.
        """
        parts = (self.channel_norm, self.channel, self.channel_post_norm, self.channel_connection)
        after = [each for part in parts if part is not None for each in part.modules()]
        counts = self.channel is not None and getattr(within(self.channel), "takes_mask", False)
        return not counts and all(is_plain(module) for module in (self, *after))


def within(module: Any) -> Any:
    """The channel mixer in a module that stands in its place, as adapters of its tensors do; else the module itself."""
    return next((inner for inner in module.modules() if isinstance(inner, ChannelMixer)), module)


def run_layer(
    layer: StackLayer,
    x: Tensor,
    states: Sequence[State],
    cu_seqlens: CuSeqlens,
    token_mask: Tensor | None,
    places: Tensor | None,
    handed: Mapping[str, Any],
) -> tuple[Tensor, tuple[State, ...], Mapping[str, Any]]:
    """What a layer returns, and what later layers are handed."""
    asked = () if places is None else (places,)
    if not layer.exchanges:
        return *layer(x, states, cu_seqlens, token_mask, *asked), handed
    return layer(x, states, cu_seqlens, token_mask, *asked, handed=handed)


def check_exchange(layers: Sequence[StackLayer]) -> None:
    """Raise unless what each mixer takes is given by an earlier layer and fits, and each name by one mixer of a layer.

    Raises:
        ValueError: naming the layer, the mixer and what.
    """
    known: dict[str, Any] = {INPUT: None}
    for i, layer in enumerate(layers):
        given: dict[str, Any] = {}
        for mixer in layer.mixers:
            who, own = f"stack: layer {i}: {type(mixer).__name__}", dict.fromkeys(mixer.gives, mixer)  # type: ignore[arg-type]
            if missing := [name for name in mixer.takes if name not in known]:  # type: ignore[union-attr]
                raise ValueError(f"{who} takes {' and '.join(missing)}, which no earlier layer gives")
            for name in mixer.takes:  # type: ignore[union-attr]
                if known[name] is not None:
                    _check_pair(who, mixer, known[name])
            if twice := sorted(own.keys() & (given.keys() | {INPUT})):
                raise ValueError(f"{who} gives {' and '.join(twice)}, as a mixer beside it or the stack's input does")
            given |= own
        known |= given


def _check_pair(who: str, taker: Any, giver: Any) -> None:
    try:
        taker.check_giver(giver)
    except ValueError as error:
        raise ValueError(f"{who} takes what {type(giver).__name__} gives, but {error}") from error


def _norm(config: StackConfig, wanted: bool) -> nn.Module:
    """A norm of the residual stream, or none."""
    if not wanted:
        return nn.Identity()
    return build_norm(config.norm, config.d_model, config.norm_eps, config.zero_centred_norms)


def _times(factor: float, x: Tensor) -> Tensor:
    return x if factor == 1 else factor * x


def at(places: Tensor, x: Tensor) -> Tensor:
    """``[1, M, ...]``: what ``x [B, T, ...]`` holds at these of its ``B T`` places."""
    return x.flatten(0, 1).index_select(0, places).unsqueeze(0)
